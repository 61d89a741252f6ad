"""Where a well is, which sites are its own, and what they say together."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, WELL


def well_ids(index: pd.DataFrame) -> Int[np.ndarray, " n"]:
    """A number from 0 for each (plate, well), in order of first appearance.

    Raises:
        InputError: the index lacks `Metadata_Plate` or `Metadata_Well`.
    """
    for column in (PLATE, WELL):
        if column not in index.columns:
            raise InputError(
                f"index: no column {column}; scores need the plate and the well of every site"
            )
    return index.groupby([PLATE, WELL], sort=False, dropna=False).ngroup().to_numpy()


def aggregate_wells(
    wells: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
) -> tuple[Int[np.ndarray, " wells"], Float[np.ndarray, "wells classes"]]:
    """What the sites of a well say together: the mean of their probabilities.

    The mean of probabilities, not of their logarithms: classifiers that give exact zeros (neighbours, forests)
    would otherwise let one site veto a class.

    Args:
        wells: number of each site's well, 0 to wells - 1 (see `well_ids`).
        labels: true class of each site.
        probabilities: one row a site.

    Returns:
        true class and mean probabilities of each well.

    Raises:
        InputError: the sites of one well have different labels.
    """
    count = int(wells.max()) + 1
    well_labels = np.zeros(count, dtype=int)
    well_labels[wells] = labels
    if (differs := well_labels[wells] != labels).any():
        row = int(np.flatnonzero(differs)[0])
        raise InputError(
            f"index: row {row} and another site of its well have different labels; no well level"
        )
    sites = np.bincount(wells, minlength=count)[:, None]
    sums = np.zeros((count, probabilities.shape[1]))
    np.add.at(sums, wells, probabilities)
    return well_labels, sums / sites
