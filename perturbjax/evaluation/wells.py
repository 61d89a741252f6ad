"""Group sites into wells, and average their predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, WELL


def well_ids(index: pd.DataFrame) -> Int[np.ndarray, " n"]:
    """Number each (plate, well) from 0, in order of first occurrence.

    Raises:
        InputError: the index lacks `Metadata_Plate` or `Metadata_Well`.
    """
    for column in (PLATE, WELL):
        if column not in index.columns:
            raise InputError(
                f"index: no column {column}; scores need the plate and the well of every site"
            )
    # dropna=False numbers missing names as well; otherwise these sites would get no valid number.
    return index.groupby([PLATE, WELL], sort=False, dropna=False).ngroup().to_numpy()


def aggregate_wells(
    wells: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
) -> tuple[Int[np.ndarray, " wells"], Float[np.ndarray, "wells classes"]]:
    """Average the probabilities of the sites of each well.

    Probabilities are averaged, not their logarithms: an exact zero (neighbors, forests) of one
    site would otherwise exclude a class.

    Args:
        wells: well number of each site, 0 to wells - 1 (see `well_ids`).
        labels: true class of each site.
        probabilities: one row per site.

    Returns:
        True class and mean probabilities of each well.

    Raises:
        InputError: sites of one well have different labels.
    """
    count = int(wells.max()) + 1
    well_labels = np.zeros(count, dtype=int)
    # One site of each well sets the label; the check below finds sites that differ from it.
    well_labels[wells] = labels
    if (differs := well_labels[wells] != labels).any():
        raise InputError(
            "sites of the same well have different labels "
            f"(e.g. row {int(np.flatnonzero(differs)[0])} of the index)"
        )
    sites = np.bincount(wells, minlength=count)[:, None]
    sums = np.zeros((count, probabilities.shape[1]))
    np.add.at(sums, wells, probabilities)
    return well_labels, sums / sites
