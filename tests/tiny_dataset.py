"""A small dataset directory with random sites, in the format of `perturbjax build`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax import dataset

LABEL = "Metadata_pert_iname"


def write_dataset(
    path: Path,
    *,
    sites: int,
    size: int,
    channels: list[str],
    compounds: tuple[str, str] = ("DMSO", "taxol"),
    label_column: str = LABEL,
    maximum: int = 60_000,
) -> Path:
    """Write a dataset: three sites per well, eight wells per plate; every fourth site is constant
    in channel 0.

    Args:
        path: folder to write.
        sites: number of sites.
        size: height and width in pixels.
        channels: channel names.
        compounds: names of the two compounds.
        label_column: column of the labels; "" leaves out the compounds.
        maximum: highest intensity of the other sites.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(100, maximum, (sites, size, size, len(channels)), dtype=np.uint16)
    images[::4, ..., 0] = 500
    masks = np.zeros((sites, size, size), np.uint16)
    masks[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    table = pd.DataFrame(
        {
            "site_id": [f"site{number}" for number in range(sites)],
            "Metadata_Plate": [f"P{number // 24}" for number in range(sites)],
            "Metadata_Well": [f"A{number // 3 % 8 + 1:02d}" for number in range(sites)],
            "Metadata_Site": [str(number % 3 + 1) for number in range(sites)],
            LABEL: [compounds[number // 3 % 2] for number in range(sites)],
        }
    )
    return dataset.write_dataset(
        path,
        table if label_column else table.drop(columns=LABEL),
        map(dataset.SitePixels, images, masks),
        channel_names=channels,
        image_dtype=np.uint16,
        label_column=label_column,
    )
