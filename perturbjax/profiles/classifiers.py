"""The classical classifiers by name: their settings, what may be tuned, and their probabilities.

This module needs scikit-learn: import it where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.naive_bayes import BernoulliNB, GaussianNB
from sklearn.neighbors import KNeighborsClassifier

from perturbjax.core.config import LINEAR_C
from perturbjax.core.errors import InputError
from perturbjax.core.options import names_in
from perturbjax.profiles.plda import PLDA

#: Penalties from which Ridge chooses by its closed-form leave-one-out error.
ALPHAS = tuple(float(10.0**power) for power in range(-2, 7))
#: Boosting grows one tree a class and round: rounds such that all trees are about 3,000, within 10 to 100.
_BOOSTED_TREES = 3000


@dataclass(frozen=True)
class Classifier:
    """How to make one, given the training rows, the classes among them, and a seed; and what tuning may try."""

    make: Callable[[int, int, int], BaseEstimator]
    grid: tuple[dict[str, Any], ...] = ()


def _grid(parameter: str, *values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({parameter: value} for value in values)


CLASSIFIERS: dict[str, Classifier] = {
    "ridge": Classifier(lambda rows, classes, seed: RidgeClassifierCV(alphas=ALPHAS)),
    "random_forest": Classifier(
        lambda rows, classes, seed: RandomForestClassifier(
            n_estimators=500, random_state=seed, n_jobs=-1
        )
    ),
    "bernoulli_nb": Classifier(
        lambda rows, classes, seed: BernoulliNB(), _grid("alpha", 0.1, 1.0, 10.0)
    ),
    "gaussian_nb": Classifier(
        lambda rows, classes, seed: GaussianNB(), _grid("var_smoothing", 1e-9, 1e-2, 1e-1, 1.0)
    ),
    "knn": Classifier(
        lambda rows, classes, seed: KNeighborsClassifier(
            n_neighbors=min(5, rows), weights="distance", metric="cosine"
        ),
        _grid("n_neighbors", 1, 3, 5, 10, 20),
    ),
    "logistic": Classifier(
        lambda rows, classes, seed: LogisticRegression(C=0.01, max_iter=300),
        _grid("C", 0.001, 0.01, 0.1),
    ),
    "logistic_balanced": Classifier(  # every class counts the same
        lambda rows, classes, seed: LogisticRegression(
            C=LINEAR_C, max_iter=300, class_weight="balanced"
        ),
        _grid("C", 0.001, 0.01, 0.1),
    ),
    "lda": Classifier(
        lambda rows, classes, seed: LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.5),
        _grid("shrinkage", 0.1, 0.3, 0.5, 0.7, 0.9),
    ),
    "plda": Classifier(
        lambda rows, classes, seed: PLDA(),
        tuple(
            {"shrinkage": shrinkage, "prior": prior}
            for shrinkage in (0.2, 0.4, 0.6)
            for prior in (1.0, 2.0)
        ),
    ),
    "gradient_boosting": Classifier(
        lambda rows, classes, seed: HistGradientBoostingClassifier(
            max_iter=int(np.clip(_BOOSTED_TREES / classes, 10, 100)),
            early_stopping=False,
            random_state=seed,
        )
    ),
}


def parse_models(text: str) -> tuple[str, ...]:
    """`a,b,c`, or `all`, as names.

    Raises:
        InputError: a name is unknown; the message lists those there are.
    """
    names = tuple(CLASSIFIERS) if text == "all" else names_in(text)
    if unknown := [name for name in names if name not in CLASSIFIERS]:
        raise InputError(
            f"--models {unknown[0]}: unknown; choose from all, {', '.join(CLASSIFIERS)}"
        )
    if not names:
        raise InputError(
            f"--models {text!r}: names none; choose from all, {', '.join(CLASSIFIERS)}"
        )
    return tuple(dict.fromkeys(names))


def probabilities(
    model: BaseEstimator, features: Float[np.ndarray, "n d"], classes: int
) -> Float[np.ndarray, "n classes"]:
    """(n, classes) that sum to 1 a row; 0 for classes that were not in training.

    The model was fitted on class numbers. Where it knows no probabilities (Ridge) they are its decision function
    raised to start at 0 and divided by its sum: they rank the classes, and their size means nothing more.
    """
    if hasattr(model, "predict_proba"):
        known = model.predict_proba(features)
    else:
        decision = model.decision_function(features)
        decision = np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
        known = decision - decision.min(axis=1, keepdims=True)
    known = np.nan_to_num(known)
    total = known.sum(axis=1, keepdims=True)
    known = np.where(total > 0, known / np.where(total > 0, total, 1), 1 / known.shape[1])
    out = np.zeros((len(features), classes))
    out[:, model.classes_] = known
    return out
