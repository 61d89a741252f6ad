"""Classical classifiers: name, description for help, settings, grid for tuning.

Importing this module does not import scikit-learn, so that help texts can list the classifiers
quickly.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from perturbjax.core.config import LINEAR_C
from perturbjax.core.errors import InputError
from perturbjax.core.options import names_in

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

#: Penalties from which ridge regression chooses by its closed-form leave-one-out error.
ALPHAS = tuple(float(10.0**power) for power in range(-2, 7))
#: Number of trees of gradient boosting, which grows one tree per class and iteration; 10 to 100
#: iterations.
_BOOSTED_TREES = 3000


@dataclass(frozen=True)
class Classifier:
    """One classifier.

    Attributes:
        description: short text for help.
        estimator: "module:class" of a scikit-learn estimator.
        settings: keyword arguments of the estimator from (training rows, training classes, seed).
        grid: settings that tuning tries; empty if nothing is tuned.
    """

    description: str
    estimator: str
    settings: Callable[[int, int, int], dict[str, Any]] = lambda rows, classes, seed: {}
    grid: tuple[dict[str, Any], ...] = ()

    def make(self, rows: int, classes: int, seed: int) -> BaseEstimator:
        """Return the unfitted estimator for a number of training rows and classes."""
        module, _, name = self.estimator.partition(":")
        return getattr(importlib.import_module(module), name)(**self.settings(rows, classes, seed))


def _grid(parameter: str, *values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({parameter: value} for value in values)


CLASSIFIERS: dict[str, Classifier] = {
    "ridge": Classifier(
        "ridge regression on class indicators, penalty by leave-one-out error",
        "sklearn.linear_model:RidgeClassifierCV",
        lambda rows, classes, seed: {"alphas": ALPHAS},
    ),
    "random_forest": Classifier(
        "random forest of 500 trees",
        "sklearn.ensemble:RandomForestClassifier",
        lambda rows, classes, seed: {"n_estimators": 500, "random_state": seed, "n_jobs": -1},
    ),
    "bernoulli_nb": Classifier(
        "naive Bayes on the signs of the features",
        "sklearn.naive_bayes:BernoulliNB",
        grid=_grid("alpha", 0.1, 1.0, 10.0),
    ),
    "gaussian_nb": Classifier(
        "naive Bayes with normal distributions",
        "sklearn.naive_bayes:GaussianNB",
        grid=_grid("var_smoothing", 1e-9, 1e-2, 1e-1, 1.0),
    ),
    "knn": Classifier(
        "5 nearest neighbors by cosine distance",
        "sklearn.neighbors:KNeighborsClassifier",
        lambda rows, classes, seed: {
            # scikit-learn refuses more neighbors than training rows.
            "n_neighbors": min(5, rows),
            "weights": "distance",
            "metric": "cosine",
        },
        _grid("n_neighbors", 1, 3, 5, 10, 20),
    ),
    "logistic": Classifier(
        "logistic regression",
        "sklearn.linear_model:LogisticRegression",
        lambda rows, classes, seed: {"C": 0.01, "max_iter": 300},
        _grid("C", 0.001, 0.01, 0.1),
    ),
    "logistic_balanced": Classifier(
        "logistic regression in which all classes have the same weight",
        "sklearn.linear_model:LogisticRegression",
        lambda rows, classes, seed: {"C": LINEAR_C, "max_iter": 300, "class_weight": "balanced"},
        _grid("C", 0.001, 0.01, 0.1),
    ),
    "lda": Classifier(
        "linear discriminant analysis with shrinkage",
        "sklearn.discriminant_analysis:LinearDiscriminantAnalysis",
        lambda rows, classes, seed: {"solver": "eigen", "shrinkage": 0.5},
        _grid("shrinkage", 0.1, 0.3, 0.5, 0.7, 0.9),
    ),
    "plda": Classifier(
        "probabilistic linear discriminant analysis, for many classes with few replicates",
        "perturbjax.profiles.plda:PLDA",
        grid=tuple(
            {"shrinkage": shrinkage, "prior": prior}
            for shrinkage in (0.2, 0.4, 0.6)
            for prior in (1.0, 2.0)
        ),
    ),
    "gradient_boosting": Classifier(
        "gradient boosted trees on feature histograms",
        "sklearn.ensemble:HistGradientBoostingClassifier",
        lambda rows, classes, seed: {
            "max_iter": int(np.clip(_BOOSTED_TREES / classes, 10, 100)),
            "early_stopping": False,
            "random_state": seed,
        },
    ),
}


def parse_models(text: str) -> tuple[str, ...]:
    """Read `--models`: names separated by commas, or `all`.

    Raises:
        InputError: A name is unknown, or there is none; the message lists the names.
    """
    names = tuple(CLASSIFIERS) if text == "all" else names_in(text)
    wrong = [name for name in names if name not in CLASSIFIERS]
    if wrong or not names:
        reason = f"{wrong[0]}: unknown" if wrong else f"{text!r}: contains no name"
        raise InputError(f"--models {reason} (available: all, {', '.join(CLASSIFIERS)})")
    return tuple(dict.fromkeys(names))


def probabilities(
    model: BaseEstimator, features: Float[np.ndarray, "n d"], classes: int
) -> Float[np.ndarray, "n classes"]:
    """Predict class probabilities.

    Args:
        model: estimator fitted on class numbers.
        features: rows to predict.
        classes: number of classes, including those without training rows.

    Returns:
        Rows that sum to 1; 0 for classes without training rows. Ridge regression has no
        probabilities: its decision values, shifted to start at 0 and divided by their sum, rank the
        classes only.
    """
    if hasattr(model, "predict_proba"):
        scores = model.predict_proba(features)
    else:
        decision = model.decision_function(features)
        # With two classes there is one column, the decision value of the second class.
        decision = np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
        scores = decision - decision.min(axis=1, keepdims=True)
    scores = np.nan_to_num(scores)
    total = scores.sum(axis=1, keepdims=True)
    # Rows without any positive score get equal probabilities.
    scores = np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / scores.shape[1])
    out = np.zeros((len(features), classes))
    # `classes_` contains the numbers of the classes with training rows.
    out[:, model.classes_] = scores
    return out
