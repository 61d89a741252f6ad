"""Features of consecutive sites: one row for each site, or for each cell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32

from perturbjax.core.config import Summary
from perturbjax.data.cells import CellCounts, CellTable


class PartFeatures(NamedTuple):
    """Features of some consecutive sites.

    Attributes:
        values: one row for each site, or for each cell.
        cells: for rows that are cells, see `describe_cells`; None for rows that are sites.
        counts: number of cells of these sites; None for tiles and whole sites.
    """

    values: Float32[np.ndarray, "n d"]
    cells: pd.DataFrame | None = None
    counts: CellCounts | None = None


def describe_cells(positions: Sequence[int], tables: Sequence[CellTable]) -> pd.DataFrame:
    """Return one row for each cell: its site as `position` in the dataset, and its measurements.

    Args:
        positions: of the sites in the dataset.
        tables: cells of each site.
    """
    centroids = np.concatenate([table.centroids for table in tables])
    return pd.DataFrame(
        {
            "position": np.repeat(list(positions), [len(table) for table in tables]),
            "object": np.concatenate([table.objects for table in tables]),
            "center_x": centroids[:, 1],
            "center_y": centroids[:, 0],
            "area": np.concatenate([table.areas for table in tables]),
        }
    )


#: Summary -> statistics over the windows of a site.
STATISTICS: dict[str, tuple[str, ...]] = {
    "mean": ("mean",),
    "median": ("median",),
    "mean-std": ("mean", "std"),
}


def summarize(values: Float[np.ndarray, "n d"], how: Summary) -> Float32[np.ndarray, " e"]:
    """Summarize the windows of a site: mean, median, or mean followed by standard deviation.

    A site without windows gives NaN.
    """
    if not len(values):
        return np.full(values.shape[1] * len(STATISTICS[how]), np.nan, np.float32)
    # Missing values are left out. The functions that allow them take longer.
    prefix = "nan" if np.isnan(values).any() else ""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # a feature that no window has is NaN
        parts = [getattr(np, prefix + name)(values, axis=0) for name in STATISTICS[how]]
    summary = np.concatenate(parts)
    return np.where(np.isfinite(summary), summary, np.nan).astype(np.float32)


def summary_names(names: list[str], how: Summary) -> list[str]:
    """Return the names of the summarized features."""
    return names + [f"{name}_std" for name in names] if how == "mean-std" else names
