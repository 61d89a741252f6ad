"""The one writer of a dataset directory: pixels in order, the index beside them, and what both are, in provenance."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.dataset.opened import FORMATS, content_digest
from perturbjax.dataset.schema import (
    INDEX,
    PROVENANCE,
    SCHEMA_VERSION,
    UNLABELLED,
    Contents,
    SitePixels,
    index_row,
    metadata_of,
)
from perturbjax.files import file_digest, write_json, write_parquet


def write_dataset(
    folder: Path,
    table: pd.DataFrame,
    sites: Iterable[SitePixels],
    *,
    channel_names: Iterable[str],
    image_dtype: np.dtype | type,
    label_column: str,
    pixel_bytes: int = 0,
    facts: dict[str, Any] | None = None,
    format: str = "array_record",
) -> Path:
    """Write a dataset into a folder that holds none yet; it opens only once this has returned.

    Args:
        folder: made where it is missing.
        table: one row a site, in record order: `site_id` (unique) and every `Metadata_*` as text.
        sites: their pixels, in the same order; read once, never gathered.
        channel_names: of the image's channels, in stored order.
        image_dtype: uint8 or uint16, of every image.
        label_column: column of `table` whose sorted values are the classes; empty where the sites have no labels.
        pixel_bytes: image and mask of all sites together, uncompressed; more than one shard holds makes several.
        facts: more to say in the provenance of how it was made.
        format: how pixels are stored, one of `FORMATS`.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    channel_names, dtype = list(channel_names), np.dtype(image_dtype)
    labels = table[label_column] if label_column else pd.Series(UNLABELLED, table.index)
    classes = sorted(labels.unique())
    columns = metadata_of(table.columns)
    contents = Contents(len(table), len(channel_names), dtype, classes, columns, pixel_bytes)
    index: list[dict[str, Any]] = []

    def records() -> Iterator[dict[str, Any]]:
        for label, texts, site in zip(labels, table[["site_id", *columns]].to_dict("records"), sites, strict=True):
            index.append(index_row(texts, classes.index(label), site, channel_names))
            yield {"image": site.image, "mask": site.mask, "label": label, **texts}

    importlib.import_module(FORMATS[format]).write_pixels(folder, records, contents)
    write_parquet(folder / INDEX, pd.DataFrame(index))
    held = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    facts = {
        **(facts or {}),
        "schema_version": SCHEMA_VERSION,
        "format": format,
        "channels_stored": channel_names,
        "label_column": label_column,
        "image_dtype": dtype.name,
        "n_sites": len(index),
        "n_classes": len(classes) if label_column else 0,
        "n_cells": sum(row["n_cells"] for row in index),
    }
    write_json(folder / PROVENANCE, {**facts, "content_sha256": content_digest(held), "files": held})
    return folder
