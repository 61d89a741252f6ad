"""Features relative to their plate, and what on the plate they may be relative to.

A plate's stain, exposure and week shift all its features; so does what was put on it. Negative controls are the same
on every plate, and their mean is the plate's own. The mean of all rows is that only where plates hold much the same
classes: on a plate of few, it is the answer, and taking it away takes the answer away. Which of the two a set of plates
is cannot be read off their names: `Relative` tries it on training plates held out. It needs scikit-learn.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE
from perturbjax.profiles.preparation import NEGCON, TableStep, feature_names, feature_values
from perturbjax.profiles.profile_options import Relative as How

#: What a split keeps whole, where the table says it; else a plate is.
GROUP = "Metadata_group"
#: Negative controls from which on their mean is a plate's own: that of fewer adds more noise than it takes away.
LEAST_CONTROLS = 4
#: Parts in which training groups are dealt for the trial.
_PARTS = 3


class Relative(TableStep):
    """Every feature once more, minus the mean of what a plate's rows are relative to.

    A plate seen in `fit` keeps the mean of its training rows; that of another plate is of the rows to be transformed,
    without their labels: so predict plates whole. A control is relative to the other controls, never to itself, or it
    would be told by lying too near.

    Args:
        how: "negcon", "plate", "none", or "auto": which of them is decided in `fit`, by what `choose` says.

    Raises:
        InputError: a plate has fewer than two negative controls, and these were asked for.
    """

    def __init__(self, how: How = "auto"):
        self.how = how

    def fit(self, X: pd.DataFrame, y: object = None) -> Relative:
        """Learn the means of training plates; `y` are class numbers, which only "auto" looks at."""
        self.chosen_, self.reason_ = (
            (self.how, "") if self.how != "auto" else choose(X, np.asarray(y))
        )
        self.rows_ = X.index
        self.means_ = {plate: self._mean(plate, X[rows]) for plate, rows in self._plates(X)}
        return self

    def notes(self) -> list[str]:
        """What was chosen and why, where there was a choice."""
        return [self.reason_] if self.reason_ else []

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        names = feature_names(X)
        if self.chosen_ == "none":
            return values, names
        relative, known = np.empty_like(values), X.index.isin(self.rows_)
        for plate, rows in self._plates(X):
            seen = plate in self.means_
            mean, count = self.means_[plate] if seen else self._mean(plate, X[rows])
            relative[rows] = values[rows] - mean
            if self.chosen_ == "negcon":  # x - (sum - x) / (n - 1) = (x - mean) n / (n - 1)
                within = rows & X[NEGCON].to_numpy() & (known if seen else True)
                relative[within] *= count / (count - 1)
        return np.concatenate([values, relative], axis=1), [
            *names,
            *(f"{name}_on_plate" for name in names),
        ]

    def _plates(self, X: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
        plates = X[PLATE].to_numpy()
        return [(plate, plates == plate) for plate in pd.unique(plates)]

    def _mean(self, plate: str, X: pd.DataFrame) -> tuple[Float[np.ndarray, " d"], int]:
        """The mean that rows of a plate are relative to, and of how many rows it is."""
        reference = feature_values(X[X[NEGCON].to_numpy()] if self.chosen_ == "negcon" else X)
        if self.chosen_ == "negcon" and len(reference) < 2:
            raise InputError(
                f"plate {plate}: {len(reference)} negative controls to be relative to (--relative negcon), and it "
                "needs two: choose --relative plate or none, or another --negcon"
            )
        return reference.mean(axis=0), len(reference)


def choose(X: pd.DataFrame, y: Int[np.ndarray, " n"]) -> tuple[How, str]:
    """What the rows of these plates are best relative to, and one sentence that says why.

    Negative controls, where every plate holds `LEAST_CONTROLS`. Otherwise the plate's own mean, if with it held-out
    training groups are told apart better (balanced accuracy of a balanced logistic regression, groups in three parts).
    """
    controls = X.groupby(PLATE, sort=False)[NEGCON].sum()
    fewest = int(controls.min())
    if fewest >= LEAST_CONTROLS:
        return (
            "negcon",
            f"relative to the plate's negative controls: every plate holds {fewest} or more",
        )
    few = f"plate {controls.idxmin()} holds {fewest} negative controls, fewer than {LEAST_CONTROLS}"
    classes = pd.Series(y).groupby(X[PLATE].to_numpy()).nunique()
    holds = f"plates hold {classes.median():g} of {len(np.unique(y))} classes (median)"
    groups = (X[GROUP] if GROUP in X else X[PLATE]).to_numpy()
    if len(np.unique(groups)) < 2:
        return (
            "none",
            f"not relative to the plate: {few}, and all training rows are one group: no trial is possible",
        )
    without, having = (_tried(how, X, y, groups) for how in ("none", "plate"))
    trial = f"on held-out training groups, balanced accuracy is {having:.3f} with its own mean, {without:.3f} without"
    if having > without:
        return "plate", f"relative to the plate's own mean: {few}; {holds}, and {trial}"
    return (
        "none",
        f"not relative to the plate: {few}; {holds}, so its own mean is no reference: {trial}",
    )


def _tried(how: How, X: pd.DataFrame, y: Int[np.ndarray, " n"], groups: np.ndarray) -> float:
    """Balanced accuracy on training groups, each predicted by a model that did not see it."""
    from sklearn.metrics import recall_score
    from sklearn.model_selection import GroupKFold

    from perturbjax.profiles.classifiers import CLASSIFIERS

    said = np.full(len(X), -1)
    parts = GroupKFold(min(_PARTS, len(np.unique(groups))))
    for fit, held in parts.split(X, groups=groups):
        if len(np.unique(y[fit])) < 2:
            continue
        step = Relative(how).fit(X.iloc[fit])
        model = CLASSIFIERS["logistic_balanced"].make(len(fit), len(np.unique(y[fit])), 0)
        model.fit(feature_values(step.transform(X.iloc[fit])), y[fit])
        said[held] = model.predict(feature_values(step.transform(X.iloc[held])))
    return float(recall_score(y, said, labels=np.unique(y), average="macro", zero_division=0))
