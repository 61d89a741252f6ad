"""A small dataset of fields with several cells, in the format of `perturbjax build`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from skimage.draw import disk

from perturbjax.dataset import SitePixels, write_dataset

LABEL = "Metadata_pert_iname"


def write_fields(
    path: Path, *, cells: Sequence[int], sizes: Sequence[int] = (96,), wells: int = 0
) -> Path:
    """Write a dataset of sites with disks as cells.

    Half of the cells of class taxol have a bright center; cells of DMSO have none. Mean intensities
    are equal. Cells stay away from the border.

    Args:
        path: folder to write.
        cells: number of cells of each site, at most 9.
        sizes: height and width of the sites in pixels, in turn.
        wells: number of wells; 0: one for each site. Wells have the two classes in turn.
    """
    rng = np.random.default_rng(0)
    wells = wells or len(cells)
    sites = [
        _draw(rng, count, sizes[number % len(sizes)], number % wells % 2 == 1)
        for number, count in enumerate(cells)
    ]
    numbers = np.arange(len(cells))
    table = pd.DataFrame(
        {
            "site_id": [f"site{number}" for number in numbers],
            "Metadata_Plate": "P1",
            "Metadata_Well": [
                f"{'ABCD'[n % wells // 12]}{n % wells % 12 + 1:02d}" for n in numbers
            ],
            "Metadata_Site": [str(number // wells + 1) for number in numbers],
            LABEL: [("DMSO", "taxol")[number % wells % 2] for number in numbers],
        }
    )
    return write_dataset(
        path,
        table,
        sites,
        channel_names=["DNA", "Actin"],
        image_dtype=np.uint16,
        label_column=LABEL,
    )


def _draw(rng: np.random.Generator, count: int, size: int, treated: bool) -> SitePixels:
    mask = np.zeros((size, size), np.uint16)
    light = np.full((size, size, 2), 300.0)
    places = rng.permutation(9)[:count]
    for label, place in enumerate(places, start=1):
        center = 16 + 24 * np.array(divmod(int(place), 3)) + rng.integers(-3, 4, 2)
        rows, columns = disk(center, 6, shape=mask.shape)
        mask[rows, columns] = label
        light[rows, columns] = 1500
        if treated and label % 2:
            light[rows, columns, 1] = 800
            rows, columns = disk(center, 3, shape=mask.shape)
            light[rows, columns, 1] = 3500
    return SitePixels(rng.poisson(light).astype(np.uint16), mask)
