"""Classification scores from probabilities, all listed in `METRICS`.

Every score is a function of four counts per class, which add up over sites. The bootstrap therefore
resamples clusters (wells) by weighting rows of counts.

Classes that are absent from the truth: balanced accuracy is the mean recall over classes in the
truth; macro-F1 is the mean F1 over classes in the truth or the predictions. Both equal
`balanced_accuracy_score` and `f1_score(average="macro")` of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Num, Shaped

from perturbjax.core.errors import InputError

TOP_K = 5
#: Number of classes from which top-5 accuracy is informative.
_MANY_CLASSES = 21


@dataclass(frozen=True)
class Counts:
    """Counts per class, one row per cluster (for example a well).

    Clusters are resampled by weighting these rows.
    """

    truth: Float[np.ndarray, "*clusters classes"]
    """Examples of each true class."""
    predicted: Float[np.ndarray, "*clusters classes"]
    """Examples of each predicted class."""
    hits: Float[np.ndarray, "*clusters classes"]
    """Correctly predicted examples of each class."""
    top: Any
    """Examples whose true class is among the `TOP_K` most probable, shape (*clusters,)."""
    class_weight: Float[np.ndarray, "*clusters classes"] | None = None
    """Weight of each class in averages over classes; None: 1."""

    def over_classes(
        self, values: Shaped[np.ndarray, "*clusters classes"]
    ) -> Num[np.ndarray, " *clusters"]:
        """Sum values over classes with their weights."""
        return np.asarray(
            (values if self.class_weight is None else values * self.class_weight).sum(axis=-1)
        )


def check_probabilities(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    names: Sequence[str],
    where: str = "predictions",
    advice: str = "run predict again from an intact checkpoint",
) -> None:
    """Check that labels and probabilities can be scored.

    Args:
        labels: class numbers.
        probabilities: one row per site.
        names: site ids, for the message.
        where: file, for the message.
        advice: end of the message.

    Raises:
        InputError: no rows, a label out of range, or a row of probabilities that is not finite, is
            negative or does not sum to 1 (within 1e-3).
    """
    if len(labels) == 0:
        raise InputError(f"{where}: no sites to score; the test set is empty")
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
    for problem, bad in checks.items():
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(f"{where}: site {names[row]}: probabilities {problem}; {advice}")


def top_k_hits(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], k: int = TOP_K
) -> Bool[np.ndarray, " n"]:
    """Whether the true class is among the k most probable.

    Equally probable classes rank in their order, as in argmax, so that k = 1 equals accuracy.
    """
    # Probability of the true class, (n, 1).
    own = probabilities[np.arange(len(labels)), labels][:, None]
    # Classes before the true class win ties, as in argmax.
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(axis=1)
    return rank < k


def count(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    clusters: Int[np.ndarray, " n"] | None = None,
) -> Counts:
    """Count true, predicted and correct examples per cluster and class.

    Args:
        labels: class numbers.
        probabilities: one row per example.
        clusters: cluster numbers from 0; None: every example is a cluster.
    """
    classes = probabilities.shape[1]
    clusters = np.arange(len(labels)) if clusters is None else clusters
    rows = int(clusters.max()) + 1
    predicted = probabilities.argmax(axis=1)

    def table(numbers: np.ndarray, keep: np.ndarray | slice = slice(None)) -> np.ndarray:
        # One bincount over pairs (cluster, class) instead of a loop over clusters.
        cells = np.bincount(clusters[keep] * classes + numbers[keep], minlength=rows * classes)
        return cells.reshape(rows, classes).astype(float)

    top = np.bincount(clusters, weights=top_k_hits(labels, probabilities), minlength=rows)
    return Counts(table(labels), table(predicted), table(labels, labels == predicted), top)


def accuracy(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Fraction of examples whose most probable class is the true class."""
    return counts.hits.sum(axis=-1) / counts.truth.sum(axis=-1)


def top5(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Fraction of examples whose true class is among the `TOP_K` most probable."""
    return counts.top / counts.truth.sum(axis=-1)


def balanced_accuracy(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Mean recall of the classes that occur in the truth."""
    in_truth = counts.truth > 0
    # Absent classes get 0 / 1 = 0 here and do not count in the denominator below.
    recall = counts.hits / np.where(in_truth, counts.truth, 1)
    return counts.over_classes(recall) / counts.over_classes(in_truth)


def macro_f1(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Mean F1 of the classes that occur in the truth or among the predictions."""
    either = counts.truth + counts.predicted
    # F1 = 2 TP / (2 TP + FP + FN); the denominator is true plus predicted examples.
    f1 = 2 * counts.hits / np.where(either > 0, either, 1)
    return counts.over_classes(f1) / counts.over_classes(either > 0)


def matthews(counts: Counts) -> Num[np.ndarray | np.generic, " *clusters"]:
    """Matthews correlation of truth and prediction over all classes.

    0 for constant or random predictions, independent of class frequencies.

    Source: Gorodkin 2004, Comput Biol Chem 28, 367.
    """
    total, right = counts.truth.sum(axis=-1), counts.hits.sum(axis=-1)
    covariance = right * total - (counts.truth * counts.predicted).sum(axis=-1)
    variances = [total**2 - (part**2).sum(axis=-1) for part in (counts.truth, counts.predicted)]
    # Constant labels or predictions have variance 0; the division by infinity below gives MCC 0.
    product = np.maximum(variances[0], 0) * np.maximum(variances[1], 0)
    return covariance / np.sqrt(np.where(product > 0, product, np.inf))


@dataclass(frozen=True)
class Metric:
    """A score: name, description, function and properties for confidence intervals.

    Attributes:
        words: name in tables and figures.
        description: one sentence for tooltips and the glossary.
        function: (Counts) -> one value per row, of counts summed over a replicate's clusters.
        class_averaged: whether all classes have equal weight (see `bootstrap`).
        correlation: whether it is a correlation coefficient, with skewed replicates near 1.
        bounds: minimum and maximum possible value; intervals end there.
        min_classes: minimum number of classes for which it is displayed.
    """

    words: str
    description: str
    function: Callable[[Counts], Any]
    class_averaged: bool = False
    correlation: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    min_classes: int = 0

    def pooled_value(self, counts: Counts) -> float:
        """Value over all clusters together."""
        return float(self.function(Counts(*(part.sum(axis=0) for part in additive_counts(counts)))))


#: Every score that is computed, written and displayed. To add one, add an entry.
METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "accuracy",
        "Fraction whose most probable class is the true class; frequent classes dominate.",
        accuracy,
    ),
    "top5": Metric(
        f"top-{TOP_K} accuracy",
        f"Fraction whose true class is among the {TOP_K} most probable classes.",
        top5,
        min_classes=_MANY_CLASSES,
    ),
    "balanced_accuracy": Metric(
        "balanced accuracy",
        "Mean recall over classes; all classes have equal weight.",
        balanced_accuracy,
        class_averaged=True,
    ),
    "macro_f1": Metric(
        "macro-F1",
        "Mean over classes of F1, the harmonic mean of precision and recall.",
        macro_f1,
        class_averaged=True,
    ),
    "mcc": Metric(
        "MCC",
        "Matthews correlation coefficient of true and predicted class: 1 is perfect, 0 is random.",
        matthews,
        correlation=True,
        bounds=(-1.0, 1.0),
    ),
}
#: Metric for ranking, headlines and warnings.
HEADLINE = "balanced_accuracy"


def additive_counts(counts: Counts) -> tuple[Any, Any, Any, Any]:
    """The counts that add up over clusters."""
    return counts.truth, counts.predicted, counts.hits, counts.top


def score(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> dict[str, float]:
    """Compute every score of `METRICS` over all examples."""
    return pooled_scores(count(labels, probabilities, np.zeros(len(labels), dtype=int)))


def pooled_scores(counts: Counts) -> dict[str, float]:
    """Compute every score of `METRICS` over all clusters together."""
    return {name: metric.pooled_value(counts) for name, metric in METRICS.items()}


def confusion_matrix(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Examples by true class (rows) and predicted class (columns)."""
    # The cell (row, column) has the flat index row * classes + column.
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    wells: Int[np.ndarray, " n"],
    class_names: Sequence[str],
) -> pd.DataFrame:
    """Test sites and wells, precision, recall and F1, one row per class.

    Recall is NaN for classes absent from the truth, precision for classes that are never
    predicted, F1 if both hold.
    """
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), len(class_names)).astype(float)
    hits, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    # Distinct (class, well) pairs, so that each well counts once per class.
    pairs = np.unique(np.stack([labels, wells], axis=1), axis=0)
    with np.errstate(invalid="ignore"):  # 0/0 is NaN, as documented
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
