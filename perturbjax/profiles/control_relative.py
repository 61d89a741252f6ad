"""Features relative to their plate.

Staining, exposure and week shift all features of a plate. Subtracting the mean of the plate's
negative controls removes such a shift, because controls are the same on every plate. Subtracting
the mean of *all* rows of the plate does so only if plates hold about the same classes: on a plate
with few classes, that mean contains the effect to be predicted. Whether it helps cannot be seen
from plate names, so `choose_reference` compares both on training groups left out.

This module needs scikit-learn: import it where it is used.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.metrics import recall_score
from sklearn.model_selection import GroupKFold

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE
from perturbjax.profiles.classifiers import CLASSIFIERS
from perturbjax.profiles.profile_options import Relative
from perturbjax.profiles.table_steps import (
    NEGCON,
    TableStep,
    feature_names,
    feature_values,
    reference_rows,
    rows_by_plate,
)

#: Group of the split that a row belongs to; without this column a group is a plate.
GROUP = "Metadata_group"
#: Minimum number of negative controls per plate for "auto": the mean of fewer adds more noise than
#: it removes.
MIN_CONTROLS = 4
#: Number of folds of the comparison in `choose_reference`.
_FOLDS = 3


class PlateRelative(TableStep):
    """Add every feature a second time, minus the mean of reference rows of its plate.

    A plate with training rows keeps their mean. A new plate uses its own rows, without labels:
    predict whole plates. A negative control is compared with the mean of the *other* controls:
    with its own value in the mean, it would be recognizable by its small distance.

    Args:
        how: "negcon", "plate" or "none"; "auto" chooses one in `fit`, see `choose_reference`.

    Raises:
        InputError: A plate has fewer than two negative controls (with "negcon").
    """

    def __init__(self, how: Relative = "auto"):
        self.how = how

    def fit(self, X: pd.DataFrame, y: object = None) -> PlateRelative:
        """Compute the means of the training plates; `y` are class numbers, used by "auto" only."""
        self.chosen_, self.reason_ = self.how, ""
        if self.how == "auto":
            self.chosen_, self.reason_ = choose_reference(X, np.asarray(y))
        # `transform` recognizes training controls by the index.
        self.rows_ = X.index
        self.means_ = {plate: self._mean(plate, X[rows]) for plate, rows in rows_by_plate(X)}
        return self

    def notes(self) -> list[str]:
        """Return the choice of "auto" and its reason."""
        return [self.reason_] if self.reason_ else []

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        names = feature_names(X)
        if self.chosen_ == "none":
            return values, names
        relative, in_training = np.empty_like(values), X.index.isin(self.rows_)
        for plate, rows in rows_by_plate(X):
            new = plate not in self.means_
            mean, count = self._mean(plate, X[rows]) if new else self.means_[plate]
            relative[rows] = values[rows] - mean
            if self.chosen_ == "negcon":
                # The mean without this row: x - (sum - x) / (n - 1) = (x - mean) n / (n - 1).
                own = rows & X[NEGCON].to_numpy() & (new | in_training)
                relative[own] *= count / (count - 1)
        # The original features stay; relative ones are appended.
        added = [f"{name}_on_plate" for name in names]
        return np.concatenate([values, relative], axis=1), names + added

    def _mean(self, plate: str, X: pd.DataFrame) -> tuple[Float[np.ndarray, " d"], int]:
        """Return the mean of the reference rows of a plate, and their number."""
        rows = reference_rows(feature_values(X), X, self.chosen_)
        if self.chosen_ == "negcon" and len(rows) < 2:
            raise InputError(
                f"plate {plate}: {len(rows)} negative controls, but features relative to them "
                "need at least two. Choose another preparation, or check --negcon."
            )
        return rows.mean(axis=0), len(rows)


def choose_reference(X: pd.DataFrame, y: Int[np.ndarray, " n"]) -> tuple[Relative, str]:
    """Choose the reference of `PlateRelative` for the plates of a training set.

    Negative controls if every plate has at least `MIN_CONTROLS`. Otherwise the mean of the plate,
    if training groups left out are then classified better (balanced accuracy of a balanced logistic
    regression, three folds).

    Args:
        X: n training rows.
        y: class numbers.

    Returns:
        "negcon", "plate" or "none", and one sentence with the reason.
    """
    controls = X.groupby(PLATE, sort=False)[NEGCON].sum()
    # The plate with fewest controls decides, since all plates are treated alike.
    fewest = int(controls.min())
    if fewest >= MIN_CONTROLS:
        return "negcon", (
            f"features relative to the plate's negative controls: added (at least {fewest} "
            "controls per plate)"
        )
    few = f"plate {controls.idxmin()} has {fewest} negative controls, fewer than {MIN_CONTROLS}"
    omitted = "features relative to the plate: not added"
    groups = (X[GROUP] if GROUP in X else X[PLATE]).to_numpy()
    if len(np.unique(groups)) < 2:
        return "none", f"{omitted} ({few}; all training rows are one group, so no comparison)"
    # Number of classes on each plate, for the explanation.
    classes = pd.Series(y).groupby(X[PLATE].to_numpy()).nunique()
    present = f"plates hold {classes.median():g} of {len(np.unique(y))} classes (median)"
    none, relative = (_cross_validate(how, X, y, groups) for how in ("none", "plate"))
    scores = f"balanced accuracy in cross-validation {relative:.3f} with them, {none:.3f} without"
    if relative > none:
        return "plate", f"features relative to the plate's mean: added ({few}; {present}; {scores})"
    return "none", f"{omitted} ({few}; {present}; {scores})"


def _cross_validate(
    how: Relative, X: pd.DataFrame, y: Int[np.ndarray, " n"], groups: np.ndarray
) -> float:
    """Compute the balanced accuracy of cross-validation over training groups."""
    # -1 is no class: rows of folds that cannot be fitted count as wrong.
    predicted = np.full(len(X), -1)
    folds = GroupKFold(min(_FOLDS, len(np.unique(groups))))
    for fit, test in folds.split(X, groups=groups):
        if len(np.unique(y[fit])) < 2:
            continue
        step = PlateRelative(how).fit(X.iloc[fit])
        model = CLASSIFIERS["logistic_balanced"].make(len(fit), len(np.unique(y[fit])), 0)
        model.fit(feature_values(step.transform(X.iloc[fit])), y[fit])
        predicted[test] = model.predict(feature_values(step.transform(X.iloc[test])))
    return float(recall_score(y, predicted, labels=np.unique(y), average="macro", zero_division=0))
