"""All of a dataset against its digests and its index: what opening it leaves for the moment a record is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.core.progress import track
from perturbjax.dataset.reader import SiteDataset
from perturbjax.dataset.schema import INDEX, STATISTICS, count_cells, metadata_of, site_statistics


def verify_dataset(path: Path) -> str:
    """Digests of all files; of every record its texts, label, shape, cells and statistics. What was checked.

    Raises:
        InputError: something differs; the message names the file or the record.
    """
    dataset = SiteDataset(path)
    for name, file in dataset.provenance["files"].items():
        if file_digest(dataset.path / name) != file["sha256"]:
            raise InputError(
                f"{dataset.path / name}: is not what was written there; build the dataset again"
            )
    for position in track(range(len(dataset)), total=len(dataset), label="verifying", unit="sites"):
        _verify_record(dataset, position)
    return f"{len(dataset)} sites and {len(dataset.provenance['files'])} files are what was written"


def _verify_record(dataset: SiteDataset, position: int) -> None:
    row = dataset.index.iloc[position]
    record = dataset.record(position)
    image, mask = dataset.pixels(position)
    found = {
        "label": int(record["label"]),
        "n_cells": count_cells(mask),
        "mask_area": int(np.count_nonzero(mask)),
    }
    found |= {column: record[column].decode() for column in metadata_of(dataset.index.columns)}
    for name, value in found.items():
        if row[name] != value:
            raise InputError(
                f"{dataset.path}: record {position} ({row['site_id']}) has {name} {value!r}, {INDEX} says {row[name]!r}"
            )
    for channel, values in zip(dataset.channel_names, site_statistics(image), strict=True):
        said = [row[f"{name}_{channel}"] for name in STATISTICS]
        if not np.allclose(values, np.asarray(said, float)):
            raise InputError(
                f"{dataset.path}: record {position} ({row['site_id']}) has other intensities in {channel} "
                f"than {INDEX} says"
            )
