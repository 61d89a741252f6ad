"""Contents of a dataset: records, index columns, and the plan from which both are written."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float64, UInt, UInt16

from perturbjax.core.errors import InputError

#: Changes with the meaning of records or index; directories of another version are refused.
SCHEMA_VERSION = "2.0.0"
#: Name of the only TFDS split of a dataset. Train/test splits are made later (`data/splits.py`).
SPLIT = "sites"
INDEX = "index.parquet"
PROVENANCE = "provenance.json"
#: Entry of the provenance: plate → height and width of a stored pixel in micrometers, if known.
PIXEL_SIZES = "pixel_size_um"

#: Columns of each `index.parquet` besides `Metadata_*`. For each channel NAME it also has
#: `mean_NAME`, `std_NAME`, `p01_NAME`, `p50_NAME` and `p99_NAME`: statistics of the stored pixels,
#: in stored units. `perturbjax build` adds the columns of `data_prep.quality`.
INDEX_COLUMNS = ("site_id", "label", "height", "width", "n_cells", "mask_area")
#: Index column of datasets with nuclei: number of pixels of the nuclei of a site.
NUCLEI_AREA = "nuclei_area"
#: Field of a record with the labels of the nuclei; `mask` then contains whole cells.
NUCLEI = "nuclei"
STATISTICS = ("mean", "std", "p01", "p50", "p99")
#: Index column with the SHA-256 of the source pixels of a site; it does not depend on file names.
SOURCE_DIGEST = "source_sha256"
#: The only class of a dataset without labels, since each record has a class.
UNLABELLED = "unlabelled"
#: Maximum number of pixels of one channel of a site. Larger sizes are errors and would fill the
#: memory.
LARGEST_SITE = 1 << 27


@runtime_checkable
class SiteSource(Protocol):
    """Sites by position and index columns by name: the input of batch pipelines."""

    path: Path

    def __len__(self) -> int: ...

    @property
    def channel_names(self) -> list[str]:
        """Names of the image channels in stored order; `aggregate` after aggregation."""
        ...

    @property
    def image_dtype(self) -> np.dtype: ...

    @property
    def label_column(self) -> str:
        """Label column chosen at build time, or empty. Training can use any other column."""
        ...

    def column(self, name: str) -> pd.Series:
        """A column of the index, `Metadata_*` as text; raises InputError if it is absent."""
        ...

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Image and mask of one record; raises InputError if the record is damaged."""
        ...


@runtime_checkable
class EqualSites(SiteSource, Protocol):
    """Sites of one size."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of all sites; raises InputError if sites differ in size."""
        ...


@dataclass(frozen=True)
class SitePixels:
    """Pixels of one site that is written to a dataset.

    Attributes:
        image: (H, W, C) uint8 or uint16.
        mask: (H, W) uint16 instance labels, 0 is background.
        statistics: result of `site_statistics`, if computed before.
        source_sha256: SHA-256 of the source pixels.
        quality: additional index columns with image quality metrics.
        nuclei: (H, W) uint16 labels of the nuclei, each with the label of the cell that contains
            it; None if there are none.
    """

    image: UInt[np.ndarray, "h w c"]
    mask: UInt16[np.ndarray, "h w"]
    statistics: Float64[np.ndarray, "c 5"] | None = None
    source_sha256: str = ""
    quality: dict[str, float] = field(default_factory=dict)
    nuclei: UInt16[np.ndarray, "h w"] | None = None


@dataclass(frozen=True)
class DatasetPlan:
    """Everything about a dataset except its pixels.

    Attributes:
        table: one row for each site, in record order: `site_id` (unique) and `Metadata_*` as text.
        channel_names: names of the image channels in stored order.
        image_dtype: uint8 or uint16.
        label_column: column of `table` with the classes; empty if sites have no labels.
        pixel_bytes: uncompressed size of all images and masks; determines the number of shards.
        facts: additional entries of `provenance.json`.
        leading_classes: classes that come first, in this order; remaining classes follow sorted.
        has_nuclei: whether each site has the labels of its nuclei.
    """

    table: pd.DataFrame
    channel_names: tuple[str, ...]
    image_dtype: np.dtype
    label_column: str = ""
    pixel_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    leading_classes: Sequence[str] = ()
    has_nuclei: bool = False

    @property
    def labels(self) -> list[str]:
        """Class name of each site."""
        if not self.label_column:
            return [UNLABELLED] * len(self.table)
        return list(self.table[self.label_column])

    @functools.cached_property
    def class_names(self) -> list[str]:
        """Class names; a record stores the position of its class in this list."""
        return [*self.leading_classes, *sorted(set(self.labels) - set(self.leading_classes))]

    @property
    def texts(self) -> list[dict[str, str]]:
        """`site_id` and `Metadata_*` of each site."""
        return self.table[["site_id", *metadata_columns(self.table.columns)]].to_dict("records")

    def select(self, start: int, stop: int) -> DatasetPlan:
        """Return the plan of some of the records, with the same class names."""
        part = self.table.iloc[start:stop]
        # `leading_classes` fixes the class numbers, also of classes without a site in this part.
        return replace(self, table=part, leading_classes=self.class_names, facts={})


def site_statistics(image: UInt[np.ndarray, "h w c"]) -> Float64[np.ndarray, "c 5"]:
    """Compute mean, standard deviation and 1st, 50th and 99th percentile of each channel.

    Args:
        image: (H, W, C) stored pixels.

    Returns:
        (C, 5) in stored units, in the order of `STATISTICS`.
    """
    channels = np.moveaxis(image, -1, 0)
    return np.stack([_channel_statistics(channel.ravel()) for channel in channels])


def _channel_statistics(pixels: UInt[np.ndarray, " n"]) -> Float64[np.ndarray, " 5"]:
    # Statistics of the counts of each value equal those of the pixels. `np.percentile` would sort
    # the pixels, which takes ten times as long.
    counts = np.bincount(pixels)
    values = np.flatnonzero(counts)
    counts = counts[values]
    mean = (values * counts).sum() / pixels.size
    variance = (np.square(values - mean) * counts).sum() / pixels.size
    # Linear interpolation between the two sorted pixels nearest to each percentile.
    place = np.array([1, 50, 99]) / 100 * (pixels.size - 1)
    below = np.floor(place)
    ranks = np.stack([below, np.minimum(below + 1, pixels.size - 1)])
    low, high = values[np.searchsorted(counts.cumsum(), ranks, side="right")]
    p01, p50, p99 = low + (high - low) * (place - below)
    statistics = {"mean": mean, "std": np.sqrt(variance), "p01": p01, "p50": p50, "p99": p99}
    return np.array([statistics[name] for name in STATISTICS])


def count_cells(mask: UInt16[np.ndarray, "h w"]) -> int:
    """Count the instance labels of a mask; 0 is background."""
    return int(np.unique(mask[mask > 0]).size)


def nuclei_lie_in_cells(mask: UInt16[np.ndarray, "h w"], nuclei: UInt16[np.ndarray, "h w"]) -> bool:
    """Check that each pixel of a nucleus belongs to the cell of the same label.

    Cells without a nucleus are valid; nuclei without a cell are not.
    """
    return mask.shape == nuclei.shape and bool(np.all((nuclei == 0) | (nuclei == mask)))


def metadata_columns(columns: Iterable[str]) -> list[str]:
    """Select the `Metadata_*` columns."""
    return [column for column in columns if column.startswith("Metadata_")]


def index_row(
    texts: dict[str, str], label: int, site: SitePixels, channel_names: Sequence[str]
) -> dict[str, Any]:
    """Create the index row of a site.

    Args:
        texts: `site_id` and `Metadata_*` columns.
        label: number of its class.
        site: its pixels.
        channel_names: names of the image channels.

    Raises:
        InputError: a nucleus lies outside the cell of its label.
    """
    height, width = site.mask.shape
    row: dict[str, Any] = {
        "site_id": texts["site_id"],
        "label": label,
        **{column: text for column, text in texts.items() if column != "site_id"},
        "height": height,
        "width": width,
        "n_cells": count_cells(site.mask),
        "mask_area": int(np.count_nonzero(site.mask)),
    }
    if site.nuclei is not None:
        if not nuclei_lie_in_cells(site.mask, site.nuclei):
            raise InputError(
                f"site {texts['site_id']}: a nucleus lies outside the cell of its label. Give each "
                "nucleus the label of the cell that contains it."
            )
        row[NUCLEI_AREA] = int(np.count_nonzero(site.nuclei))
    statistics = site_statistics(site.image) if site.statistics is None else site.statistics
    for channel, values in zip(channel_names, statistics, strict=True):
        row.update(
            {f"{name}_{channel}": value for name, value in zip(STATISTICS, values, strict=True)}
        )
    row.update(site.quality)
    if site.source_sha256:
        row[SOURCE_DIGEST] = site.source_sha256
    return row
