"""Base of the preparation steps: transformers of features with plate, well and control status.

A step takes a table as `as_table` makes it: feature columns next to `Metadata_Plate`,
`Metadata_Well` and `NEGCON`. This module needs scikit-learn: import it where it is used.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin

from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.profile_table import METADATA, Profiles

#: Whether a row is a negative control, true or false.
NEGCON = "Metadata_negcon"


def as_table(profiles: Profiles, negcon: np.ndarray) -> pd.DataFrame:
    """Return the table that the preparation takes.

    Args:
        profiles: n profiles with d features.
        negcon: (n,) bool, whether a profile is a negative control.

    Returns:
        n rows: plate, well, `NEGCON`, and d features in float64.
    """
    table = pd.DataFrame(profiles.values.astype(np.float64), columns=list(profiles.names))
    position = {
        PLATE: profiles.column(PLATE),
        WELL: profiles.column(WELL),
        NEGCON: np.asarray(negcon, dtype=bool),
    }
    return pd.concat([pd.DataFrame(position), table], axis=1)


class TableStep(TransformerMixin, BaseEstimator):
    """A step that changes the features of a table and passes its metadata on.

    Subclasses define `_fit(values, X)` and `_transform(values, X)`, where `values` are the features
    (n, d) of the table `X`. `_transform` returns the new features and their names.
    """

    def fit(self, X: pd.DataFrame, y: object = None) -> TableStep:
        """Fit the step to training rows."""
        self._fit(feature_values(X), X)
        return self

    def transform(self, X: pd.DataFrame) -> pd.DataFrame:
        """Return the table with transformed features."""
        values, names = self._transform(feature_values(X), X)
        metadata = X[[c for c in X.columns if c.startswith(METADATA)]]
        return pd.concat([metadata, pd.DataFrame(values, columns=names, index=X.index)], axis=1)


def feature_names(X: pd.DataFrame) -> list[str]:
    """Return the columns that are not metadata."""
    return [c for c in X.columns if not c.startswith(METADATA)]


def feature_values(X: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """Return the columns that are not metadata, as (n, d) float64."""
    return X[feature_names(X)].to_numpy(dtype=np.float64)


def select_names(X: pd.DataFrame, selected: np.ndarray) -> list[str]:
    """Return the names of the features that a boolean mask selects."""
    return [name for name, keep in zip(feature_names(X), selected, strict=True) if keep]


def reference_rows(values: np.ndarray, X: pd.DataFrame, reference: str) -> np.ndarray:
    """Select the features of all rows ("all") or of the negative controls ("negcon")."""
    return values[X[NEGCON].to_numpy()] if reference == "negcon" else values


def rows_by_plate(X: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Return (plate, boolean mask of its rows) in order of first occurrence."""
    plates = X[PLATE].to_numpy()
    # Masks instead of positions, because they also select rows of data frames.
    return [(plate, plates == plate) for plate in pd.unique(plates)]


def nonzero(scale: np.ndarray) -> np.ndarray:
    """Replace scales that are not above 0 by 1, for division."""
    return np.where(scale > 0, scale, 1.0)
