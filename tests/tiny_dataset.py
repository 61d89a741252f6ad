"""A small dataset directory of random sites, written by the builder itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.builder import write_shards
from perturbjax.dataset import INDEX, PROVENANCE, SCHEMA_VERSION, record_features
from perturbjax.files import write_json


def write_dataset(path: Path, *, sites: int, size: int, channels: list[str]) -> Path:
    """Three sites a well, eight wells a plate; every fourth site is flat in its first channel."""
    rng = np.random.default_rng(0)
    images = rng.integers(100, 60_000, (sites, size, size, len(channels)), dtype=np.uint16)
    images[::4, ..., 0] = 500
    masks = np.zeros((sites, size, size), np.uint16)
    masks[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    index = pd.DataFrame(
        {
            "site_id": [f"site{number}" for number in range(sites)],
            "label": [number // 3 % 2 for number in range(sites)],
            "Metadata_Plate": [f"P{number // 24}" for number in range(sites)],
            "Metadata_Well": [f"A{number // 3 % 8 + 1:02d}" for number in range(sites)],
            "Metadata_Site": [str(number % 3 + 1) for number in range(sites)],
            "Metadata_pert_iname": [("DMSO", "taxol")[number // 3 % 2] for number in range(sites)],
            "height": size,
            "width": size,
            "n_cells": 1,
            "mask_area": masks.astype(bool).sum((1, 2)),
        }
    )
    for position, name in enumerate(channels):
        pixels = images[..., position].reshape(sites, -1)
        index[f"mean_{name}"], index[f"std_{name}"] = pixels.mean(1), pixels.std(1)
        for percentile in (1, 50, 99):
            index[f"p{percentile:02d}_{name}"] = np.percentile(pixels, percentile, axis=1)
    metadata = [column for column in index if column.startswith("Metadata_")]

    def records():
        for number, row in enumerate(index[["site_id", *metadata]].to_dict("records")):
            yield {"image": images[number], "mask": masks[number], "label": row["Metadata_pert_iname"], **row}

    features = record_features(
        channels=len(channels), image_dtype=np.uint16, label_names=["DMSO", "taxol"], metadata_columns=metadata
    )
    shards = write_shards(path / "tfds", features=features, records=records, count=sites, pixel_bytes=images.nbytes)
    for file in shards.iterdir():
        shutil.move(file, path)
    shutil.rmtree(path / "tfds")
    index.to_parquet(path / INDEX, index=False)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "channels_stored": channels,
        "image_dtype": "uint16",
        "label_column": "Metadata_pert_iname",
    }
    write_json(path / PROVENANCE, facts)
    return path
