"""Which rows of a table are negative controls: one rule for all commands."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool

from perturbjax.core.errors import InputError
from perturbjax.core.plates import COMPOUND, CONTROL_TYPE, NEGATIVE, VEHICLES


def negative_controls(
    metadata: pd.DataFrame, label_column: str = COMPOUND, control: str = ""
) -> Bool[np.ndarray, " n"]:
    """Mark the negative controls.

    Args:
        metadata: one row per site, well or cell.
        label_column: column with the name of the treatment.
        control: `COLUMN=VALUE`; by default `Metadata_control_type=negcon`, or, if no row is marked
            so, rows whose label or `Metadata_pert_iname` names a vehicle (DMSO, untreated, ...).

    Returns:
        One value per row; all false if there is no negative control.

    Raises:
        InputError: no row matches `control`.
    """
    if control:
        column, _, value = control.partition("=")
        marked = _equals(metadata, column, value)
        if not marked.any():
            raise InputError(f"--negcon {control}: no row matches. {_remedy(metadata, column)}")
        return marked
    marked = _equals(metadata, CONTROL_TYPE, NEGATIVE)
    for column in dict.fromkeys((label_column, COMPOUND)):
        if not marked.any() and column in metadata.columns:
            marked = metadata[column].astype(str).str.lower().isin(VEHICLES).to_numpy()
    return marked


def _equals(metadata: pd.DataFrame, column: str, value: str) -> Bool[np.ndarray, " n"]:
    if column not in metadata.columns:
        return np.zeros(len(metadata), dtype=bool)
    return (metadata[column].astype(str) == value).to_numpy()


def _remedy(metadata: pd.DataFrame, column: str) -> str:
    if column not in metadata.columns:
        return f"There is no column {column}."
    values = sorted(set(metadata[column].astype(str)) - {""})
    more = ", …" if len(values) > 8 else ""
    return f"Values of {column}: {', '.join(values[:8])}{more}."
