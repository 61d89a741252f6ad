"""What a dataset holds of each site, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt, UInt16

#: Raised when a record's or the index's meaning changes; a directory of another version is refused.
SCHEMA_VERSION = "2.0.0"
#: The one TFDS split of a dataset directory; who trains and who judges is decided later, in `splits.py`.
SPLIT = "sites"
INDEX = "index.parquet"
PROVENANCE = "provenance.json"

#: Columns every `index.parquet` has beside `Metadata_*`. Per channel NAME it also has `mean_NAME`, `std_NAME`,
#: `p01_NAME`, `p50_NAME` and `p99_NAME`: statistics of the site's stored pixels, in stored units. Those that
#: `perturbjax build` wrote also have the columns of `data_prep.quality`, of every channel that was read.
INDEX_COLUMNS = ("site_id", "label", "height", "width", "n_cells", "mask_area")
STATISTICS = ("mean", "std", "p01", "p50", "p99")
#: Index column with the SHA-256 of the planes of pixels a site was made from, whatever files they lay in.
SOURCE_DIGEST = "source_sha256"
#: The one class of a dataset without labels: every record must have one, and its features name it.
UNLABELLED = "unlabelled"
#: Pixels a channel of one site may have: more is no camera's image, and would fill the memory.
LARGEST_SITE = 1 << 27


@dataclass(frozen=True)
class SitePixels:
    """One site on its way into a dataset."""

    image: UInt[np.ndarray, "h w c"]
    mask: UInt16[np.ndarray, "h w"]
    statistics: Float64[np.ndarray, "c 5"] | None = None
    """What `site_statistics` gives, where it was computed elsewhere already."""
    source_sha256: str = ""
    """Digest of the planes it was made from."""
    quality: dict[str, float] = field(default_factory=dict)
    """More columns of the index: how good its images are."""


@dataclass(frozen=True)
class Contents:
    """What a pixel store must know before it writes its first record."""

    count: int
    channels: int
    image_dtype: np.dtype
    label_names: Sequence[str]
    metadata_columns: Sequence[str]
    pixel_bytes: int
    """Image and mask of all sites together, uncompressed: decides how many files they are spread over."""


def site_statistics(image: UInt[np.ndarray, "h w c"]) -> Float64[np.ndarray, "c 5"]:
    """Mean, standard deviation, and the 1st, 50th and 99th percentile of each channel, in stored units."""
    pixels = image.reshape(-1, image.shape[-1])
    p01, p50, p99 = np.percentile(pixels, (1, 50, 99), axis=0)
    columns = {"mean": pixels.mean(0), "std": pixels.std(0), "p01": p01, "p50": p50, "p99": p99}
    return np.stack([columns[name] for name in STATISTICS], axis=-1)


def count_cells(mask: UInt16[np.ndarray, "h w"]) -> int:
    """Instances of a mask; 0 is background."""
    return int(np.unique(mask[mask > 0]).size)


def metadata_of(columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column.startswith("Metadata_")]


def index_row(
    texts: dict[str, str], label: int, site: SitePixels, channel_names: Sequence[str]
) -> dict[str, Any]:
    """A site's row of the index: `texts` (site_id and `Metadata_*`), and what its pixels say."""
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
    statistics = site_statistics(site.image) if site.statistics is None else site.statistics
    for channel, values in zip(channel_names, statistics, strict=True):
        row.update(
            {f"{name}_{channel}": value for name, value in zip(STATISTICS, values, strict=True)}
        )
    row.update(site.quality)
    if site.source_sha256:
        row[SOURCE_DIGEST] = site.source_sha256
    return row
