"""Scores of a classifier from its probabilities: one table, `METRICS`, that every part of the judge goes by.

Most are functions of a few counts. Classes absent from the truth: balanced accuracy is the mean recall over the classes
that occur in the truth, and macro-F1 the mean F1 over the classes that occur in the truth or among the predictions.
Both are what scikit-learn's `balanced_accuracy_score` and `f1_score(average="macro")` compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Num, Shaped

from perturbjax.core.errors import InputError

TOP_K = 5
#: Classes from which being among the five most probable says something.
_MANY_CLASSES = 21


@dataclass(frozen=True)
class Examples:
    """What was answered example by example, for the metrics that are not made of counts."""

    labels: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n classes"]
    clusters: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Counts:
    """All that the scores need, a row a cluster (a well, say), so that clusters can be resampled by weighing rows."""

    truth: Float[np.ndarray, "*clusters classes"]
    """Examples whose true class it is."""
    predicted: Float[np.ndarray, "*clusters classes"]
    """Examples predicted to be it."""
    hits: Float[np.ndarray, "*clusters classes"]
    """Both."""
    top: Any
    """Examples whose true class is among the `TOP_K` most probable, (*clusters,)."""
    class_weight: Float[np.ndarray, "*clusters classes"] | None = None
    """How often each class counts in an average over classes; None: each once."""
    examples: Examples | None = None
    """The same, example by example; None where the answer is no probabilities (a class drawn by chance)."""

    def over_classes(
        self, values: Shaped[np.ndarray, "*clusters classes"]
    ) -> Num[np.ndarray, " *clusters"]:
        """Sum over classes, each as often as it counts."""
        return np.asarray(
            (values if self.class_weight is None else values * self.class_weight).sum(axis=-1)
        )


def check_probabilities(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    names: Sequence[str],
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
        raise InputError(
            f"predictions: site {names[row]}: label {labels[row]} is not one of {classes} classes"
        )
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

    def table(
        predicted_class_names: np.ndarray, keep: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        cells = np.bincount(
            clusters[keep] * classes + predicted_class_names[keep], minlength=rows * classes
        )
        return cells.reshape(rows, classes).astype(float)

    top = np.bincount(clusters, weights=top_k_hits(labels, probabilities), minlength=rows)
    examples = Examples(labels, probabilities, clusters)
    return Counts(
        table(labels), table(predicted), table(labels, labels == predicted), top, examples=examples
    )


def accuracy(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Share of the examples whose most probable class is the true one."""
    return counts.hits.sum(axis=-1) / counts.truth.sum(axis=-1)


def top5(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Share of the examples whose true class is among the `TOP_K` most probable."""
    return counts.top / counts.truth.sum(axis=-1)


def balanced_accuracy(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Mean recall of the classes that occur in the truth."""
    in_truth = counts.truth > 0
    recall = counts.hits / np.where(in_truth, counts.truth, 1)
    return counts.over_classes(recall) / counts.over_classes(in_truth)


def macro_f1(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Mean F1 of the classes that occur in the truth or among the predictions."""
    either = counts.truth + counts.predicted
    f1 = 2 * counts.hits / np.where(either > 0, either, 1)
    return counts.over_classes(f1) / counts.over_classes(either > 0)


def matthews(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Correlation of truth and prediction over all classes (Gorodkin 2004): 0 for an answer that knows nothing, or is
    constant, however unequal the classes are."""
    total, right = counts.truth.sum(axis=-1), counts.hits.sum(axis=-1)
    together = right * total - (counts.truth * counts.predicted).sum(axis=-1)
    spreads = [total**2 - (part**2).sum(axis=-1) for part in (counts.truth, counts.predicted)]
    product = np.maximum(spreads[0], 0) * np.maximum(spreads[1], 0)
    return together / np.sqrt(np.where(product > 0, product, np.inf))


@dataclass(frozen=True)
class Metric:
    """A score: what it is called, and how it is computed for every row of counts or of weights at once.

    Attributes:
        words: its name in every table and figure.
        function: made of counts: (Counts) -> a value a row, of the sums over a resample's clusters. Made of
            probabilities: (labels (n,), probabilities (n, classes), weights (rows, n)) -> a value a row, where a weight
            says how often the example counts (calibration error, log loss).
        made_of: which of the two.
        class_averaged: whether every class counts alike, so that a resample may lose none (see `bootstrap`).
        correlation: whether it is one, whose draws lie the more askew the nearer it is to 1 (see `bootstrap`).
        bounds: least and greatest value there can be; intervals end there.
        least_classes: shown where there are as many classes: top 5 says nothing of five.
    """

    words: str
    function: Callable[..., Any]
    made_of: Literal["counts", "probabilities"] = "counts"
    class_averaged: bool = False
    correlation: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    min_classes: int = 0

    def defined(self, counts: Counts) -> bool:
        """Whether it can be computed: one of probabilities needs an answer that is probabilities."""
        return self.made_of == "counts" or counts.examples is not None

    def pooled_value(self, counts: Counts) -> float:
        """The value over all clusters together."""
        if self.made_of == "counts":
            return float(
                self.function(Counts(*(part.sum(axis=0) for part in additive_counts(counts))))
            )
        if (examples := counts.examples) is None:
            raise ValueError(f"{self.words} needs probabilities")
        return float(
            self.function(
                examples.labels, examples.probabilities, np.ones((1, len(examples.labels)))
            )[0]
        )


#: Every score that is computed, written and shown. A new one is one line here.
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", accuracy),
    "top5": Metric(f"top-{TOP_K} accuracy", top5, min_classes=_MANY_CLASSES),
    "balanced_accuracy": Metric("balanced accuracy", balanced_accuracy, class_averaged=True),
    "macro_f1": Metric("macro-F1", macro_f1, class_averaged=True),
    "mcc": Metric("MCC", matthews, correlation=True, bounds=(-1.0, 1.0)),
}
#: The one that ranks, that headlines name and that warnings go by.
HEADLINE = "balanced_accuracy"


def additive_counts(counts: Counts) -> tuple[Any, Any, Any, Any]:
    """The counts that add up over clusters."""
    return counts.truth, counts.predicted, counts.hits, counts.top


def score(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> dict[str, float]:
    """Every score of `METRICS`, over all examples."""
    return point(count(labels, probabilities, np.zeros(len(labels), dtype=int)))


def point(counts: Counts) -> dict[str, float]:
    """Every score of `METRICS` that these counts allow, over all clusters together."""
    return {
        name: metric.pooled_value(counts)
        for name, metric in METRICS.items()
        if metric.defined(counts)
    }


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
