"""Simple measurements of the cells of a dataset: number, area, shape, intensity and texture.

Features of a network have no meaning that can be put into words. These measurements have.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import UInt, UInt16

from perturbjax.core.plates import PLATE, WELL, in_empty_wells
from perturbjax.core.progress import track
from perturbjax.dataset import Dataset
from perturbjax.profiles.profile_table import METADATA, SITE_ID, Profiles, aggregate_to_wells


def measure_wells(dataset: Dataset) -> Profiles:
    """Measure the cells of every site, and aggregate sites to wells.

    Args:
        dataset: images and masks.

    Returns:
        One profile per well with `n_cells` (mean number of cells of a site), and medians over
        cells of `cell_area` (pixels), `eccentricity` (0: circle, 1: line), `mean_CHANNEL` and
        `texture_CHANNEL` (standard deviation of the pixels of a cell over their mean). Sites
        without cells have missing values. Empty wells are left out.
    """
    names = dataset.channel_names
    rows = [
        _measure_site(*dataset.pixels(position), names)
        for position in track(
            range(len(dataset)), total=len(dataset), label="Measuring cells", unit="sites"
        )
    ]
    table = pd.DataFrame(rows)
    index = dataset.index
    metadata = index[[SITE_ID, *(c for c in index.columns if c.startswith(METADATA))]]
    values = table.to_numpy(np.float32)
    wells = aggregate_to_wells(
        Profiles(metadata.astype(str), values, tuple(table.columns), (), dataset.label_column)
    )
    # The mean number of cells: a median over two or three sites would lose information.
    counts = table["n_cells"].groupby([index[PLATE].astype(str), index[WELL].astype(str)]).mean()
    keys = pd.MultiIndex.from_frame(wells.metadata[[PLATE, WELL]])
    wells.values[:, wells.names.index("n_cells")] = counts.loc[keys]
    return wells.take(~in_empty_wells(wells.metadata))


def _measure_site(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"], channels: list[str]
) -> dict[str, float]:
    """Number of cells and medians over the cells of one site."""
    from skimage.measure import regionprops_table

    names = ["n_cells", "cell_area", "eccentricity"]
    names += [f"{kind}_{channel}" for kind in ("mean", "texture") for channel in channels]
    if not mask.any():
        return dict.fromkeys(names, np.nan) | {"n_cells": 0.0}
    cells = regionprops_table(mask.astype(np.int32), properties=("label", "area", "eccentricity"))
    row = {
        "n_cells": float(len(cells["label"])),
        "cell_area": float(np.median(cells["area"])),
        "eccentricity": float(np.median(cells["eccentricity"])),
    }
    inside = mask > 0
    # Consecutive cell numbers from 0, in the order of the labels.
    number = np.unique(mask[inside], return_inverse=True)[1]
    area = np.bincount(number)
    for channel, name in enumerate(channels):
        pixels = image[..., channel][inside].astype(float)
        mean = np.bincount(number, pixels) / area
        variance = np.bincount(number, pixels**2) / area - mean**2
        spread = np.sqrt(np.maximum(variance, 0)) / np.maximum(mean, 1e-9)
        row |= {f"mean_{name}": float(np.median(mean)), f"texture_{name}": float(np.median(spread))}
    return {name: row[name] for name in names}
