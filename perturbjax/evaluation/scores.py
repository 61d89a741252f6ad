"""Scores of a classifier from its probabilities, all of them functions of a few counts.

Classes absent from the truth: balanced accuracy is the mean recall over the classes that occur in the truth, and
macro-F1 the mean F1 over the classes that occur in the truth or among the predictions. Both are what scikit-learn's
`balanced_accuracy_score` and `f1_score(average="macro")` compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.console import InputError

METRICS = ("accuracy", "top5", "balanced_accuracy", "macro_f1")
TOP_K = 5


@dataclass(frozen=True)
class Counts:
    """All that the scores need, a row a cluster (a well, say), so that clusters can be resampled by weighing rows."""

    truth: Float[np.ndarray, "*clusters classes"]
    """Examples whose true class it is."""
    predicted: Float[np.ndarray, "*clusters classes"]
    """Examples predicted to be it."""
    hits: Float[np.ndarray, "*clusters classes"]
    """Both."""
    top: Float[np.ndarray | np.float64, " *clusters"]
    """Examples whose true class is among the `TOP_K` most probable."""


def check_probabilities(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], names: Sequence[str]
) -> None:
    """Refuse what cannot be scored; `names` are the rows' site ids, for the message.

    Raises:
        InputError: no rows, a label out of range, or a row of probabilities that is not finite, is negative or does
            not sum to 1 (within 1e-3).
    """
    if len(labels) == 0:
        raise InputError("predictions: no sites to score; the test part is empty")
    classes = probabilities.shape[1]
    if (bad := (labels < 0) | (labels >= classes)).any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"predictions: site {names[row]}: label {labels[row]} is not one of {classes} classes")
    checks = {
        "are not all finite": ~np.isfinite(probabilities).all(axis=1),
        "are not all positive": (probabilities < 0).any(axis=1),
        "do not sum to 1": np.abs(probabilities.sum(axis=1) - 1) > 1e-3,
    }
    for what, bad in checks.items():
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"predictions: site {names[row]}: its probabilities {what}; predict again from an intact checkpoint"
            )


def top_k_hits(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], k: int = TOP_K
) -> Bool[np.ndarray, " n"]:
    """Whether the true class is among the k most probable. Of equally probable classes the first is taken first, as
    argmax does, so that k = 1 is accuracy."""
    own = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(axis=1)
    return rank < k


def count(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    clusters: Int[np.ndarray, " n"] | None = None,
) -> Counts:
    """Counts a cluster; one cluster for each example where `clusters` (numbers from 0) is not given."""
    classes = probabilities.shape[1]
    clusters = np.arange(len(labels)) if clusters is None else clusters
    rows = int(clusters.max()) + 1
    predicted = probabilities.argmax(axis=1)

    def table(classes_of: np.ndarray, keep: np.ndarray | slice = slice(None)) -> np.ndarray:
        cells = np.bincount(clusters[keep] * classes + classes_of[keep], minlength=rows * classes)
        return cells.reshape(rows, classes).astype(float)

    top = np.bincount(clusters, weights=top_k_hits(labels, probabilities), minlength=rows)
    return Counts(table(labels), table(predicted), table(labels, labels == predicted), top)


def score_counts(counts: Counts) -> dict[str, Float[np.ndarray | np.float64, " *clusters"]]:
    """Every score of `METRICS`, for each row of counts."""
    total = counts.truth.sum(axis=-1)
    in_truth = counts.truth > 0
    either = counts.truth + counts.predicted
    recall = counts.hits / np.where(in_truth, counts.truth, 1)
    f1 = 2 * counts.hits / np.where(either > 0, either, 1)
    return {
        "accuracy": counts.hits.sum(axis=-1) / total,
        "top5": counts.top / total,
        "balanced_accuracy": recall.sum(axis=-1) / in_truth.sum(axis=-1),
        "macro_f1": f1.sum(axis=-1) / (either > 0).sum(axis=-1),
    }


def score(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]) -> dict[str, float]:
    """Every score of `METRICS`, over all examples."""
    whole = count(labels, probabilities, np.zeros(len(labels), dtype=int))
    return {metric: float(values[0]) for metric, values in score_counts(whole).items()}


def confusion_matrix(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Examples by true class (rows) and predicted class (columns)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    wells: Int[np.ndarray, " n"],
    class_names: Sequence[str],
) -> pd.DataFrame:
    """One row a class: test sites and wells, precision, recall, F1.

    Recall is NaN for a class absent from the truth, precision for one never predicted, F1 where both hold.
    """
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), len(class_names)).astype(float)
    hits, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    pairs = np.unique(np.stack([labels, wells], axis=1), axis=0)
    with np.errstate(invalid="ignore"):  # 0/0 is the NaN that the docstring states
        return pd.DataFrame(
            {
                "class": list(class_names),
                "sites": truth.astype(int),
                "wells": np.bincount(pairs[:, 0], minlength=len(class_names)),
                "predicted": predicted.astype(int),
                "precision": hits / predicted,
                "recall": hits / truth,
                "f1": 2 * hits / (truth + predicted),
            }
        )
