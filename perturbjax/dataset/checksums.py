"""Verify all files and records of a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.core.progress import track
from perturbjax.dataset.reader import Dataset
from perturbjax.dataset.schema import (
    INDEX,
    NUCLEI_AREA,
    STATISTICS,
    count_cells,
    metadata_columns,
    nuclei_lie_in_cells,
    site_statistics,
)


def verify_dataset(path: Path) -> str:
    """Verify the checksums of all files, and each record against its index row.

    Returns:
        A sentence with the number of sites and files.

    Raises:
        InputError: names the first file or record that differs.
    """
    dataset = Dataset(path)
    for name, file in dataset.provenance["files"].items():
        if file_digest(dataset.path / name) != file["sha256"]:
            raise InputError(
                f"{dataset.path / name}: was changed (its SHA-256 differs); build the dataset again"
            )
    # File checksums do not detect an index that never matched its records.
    for position in track(range(len(dataset)), total=len(dataset), label="verifying", unit="sites"):
        _verify_record(dataset, position)
    return f"{len(dataset)} sites and {len(dataset.provenance['files'])} files are unchanged"


def _verify_record(dataset: Dataset, position: int) -> None:
    row = dataset.index.iloc[position]
    where = f"{dataset.path}: record {position} ({row['site_id']})"
    # The record is read twice: by TFDS for its texts, and by the fast reader that training uses.
    record = dataset.record(position)
    image, mask = dataset.pixels(position)
    values = {
        "label": int(record["label"]),
        "n_cells": count_cells(mask),
        "mask_area": int(np.count_nonzero(mask)),
    }
    if dataset.has_nuclei:
        nuclei = dataset.nuclei(position)
        if not nuclei_lie_in_cells(mask, nuclei):
            raise InputError(f"{where} has a nucleus outside the cell of its label")
        values[NUCLEI_AREA] = int(np.count_nonzero(nuclei))
    values |= {name: record[name].decode() for name in metadata_columns(dataset.index.columns)}
    for name, value in values.items():
        if row[name] != value:
            raise InputError(f"{where} has {name} {value!r}, but {INDEX} has {row[name]!r}")
    for channel, statistics in zip(dataset.channel_names, site_statistics(image), strict=True):
        expected = np.asarray([row[f"{name}_{channel}"] for name in STATISTICS], float)
        # With a tolerance, because sums can differ in the last bit between versions of numpy.
        if not np.allclose(statistics, expected):
            raise InputError(f"{where} has other intensities in {channel} than {INDEX}")
