"""How far a score could have fallen otherwise: intervals from resampling whole wells (or plates).

Sites of one well share everything that went wrong with it, so wells are drawn with replacement, not sites
(the cluster bootstrap: Davison & Hinkley 1997, section 3.8). A score is a function of sums of counts, so a replicate is
one row of weights times the clusters' counts, and all replicates are a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from perturbjax.console import InputError
from perturbjax.evaluation.scores import METRICS, Counts, count, score_counts

#: Replicates at a time: bounds memory at this times the clusters and the classes.
_CHUNK = 250

Estimate = dict[str, float]


def _weights(clusters: int, replicates: int, seed: int) -> Iterator[Float[np.ndarray, "chunk clusters"]]:
    """How often each cluster is drawn in each replicate, `_CHUNK` replicates at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, replicates, _CHUNK):
        rows = min(_CHUNK, replicates - start)
        drawn = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float32)


def replicate(
    subjects: Mapping[str, Counts], *, replicates: int = 2000, seed: int = 0
) -> dict[str, dict[str, Float[np.ndarray, " replicates"]]]:
    """Scores of every subject over the same resamples of the same clusters, so that they may be subtracted.

    Args:
        subjects: counts of each subject, a row a cluster; all over the same clusters in the same order.

    Returns:
        for each subject and metric, one value a replicate.
    """
    clusters = {len(counts.top) for counts in subjects.values()}
    if len(clusters) != 1:
        raise ValueError(f"subjects stand on different numbers of clusters: {sorted(clusters)}")
    parts = {
        name: [_compact(part) for part in (counts.truth, counts.predicted, counts.hits, counts.top[:, None])]
        for name, counts in subjects.items()
    }
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {m: [] for m in METRICS} for name in subjects}
    for weights in _weights(clusters.pop(), replicates, seed):
        for name, (truth, predicted, hits, top) in parts.items():
            sums = Counts(weights @ truth, weights @ predicted, weights @ hits, (weights @ top)[:, 0])
            for metric, values in score_counts(sums).items():
                found[name][metric].append(values)
    return {name: {m: np.concatenate(v) for m, v in by_metric.items()} for name, by_metric in found.items()}


def _compact(part: Float[np.ndarray, "clusters columns"]) -> np.ndarray | sparse.csc_array:
    """A well holds few of many classes: as a sparse array its product with the weights takes a tenth of the time."""
    part = part.astype(np.float32)
    return sparse.csc_array(part) if np.count_nonzero(part) < 0.1 * part.size else part


def point(counts: Counts) -> dict[str, float]:
    """Every score over all clusters together."""
    parts = (counts.truth, counts.predicted, counts.hits, counts.top)
    whole = Counts(*(part.sum(axis=0) for part in parts))
    return {metric: float(value) for metric, value in score_counts(whole).items()}


def interval(values: Float[np.ndarray, " replicates"], value: float, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval that holds `confidence` of the replicates, moved so that their mean is `value`.

    A resample leaves out a third of the wells and with them classes that stand in a single well. This lowers macro-F1
    in every replicate: the replicates tell the spread of the score, not its place. In simulations of 40 classes, 95 %
    intervals held the expected score in 96 to 97 % (accuracy, top 5), 93 % (balanced accuracy) and 91 % (macro-F1) of
    300 experiments with three wells a class; with a single well a class in 97, 90 and 85 %.
    """
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]) + value - values.mean(dtype=float)
    return float(min(low, value)), float(max(high, value))


def estimate(
    subjects: Mapping[str, Counts], *, replicates: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """Every score of every subject with its interval, and the first subject's lead over each other one.

    Returns:
        {subject: {metric: {"value", "low", "high"}}}, and the same for (first subject - other), where the interval
        is of the difference over the same resamples.
    """
    draws = replicate(subjects, replicates=replicates, seed=seed)
    points = {name: point(counts) for name, counts in subjects.items()}

    def with_interval(value: float, values: np.ndarray, least: float) -> Estimate:
        low, high = interval(values, value, confidence)
        return {"value": value, "low": max(low, least), "high": min(high, 1.0)}

    def lead(metric: str, other: str) -> Estimate:
        value, values = points[first][metric] - points[other][metric], draws[first][metric] - draws[other][metric]
        return with_interval(value, values, -1.0)

    first, *others = subjects
    scores = {name: {m: with_interval(points[name][m], draws[name][m], 0.0) for m in METRICS} for name in subjects}
    return scores, {name: {m: lead(m, name) for m in METRICS} for name in others}


def compare(
    labels: Int[np.ndarray, " n"],
    first: Float[np.ndarray, "n classes"],
    second: Float[np.ndarray, "n classes"],
    clusters: Int[np.ndarray, " n"],
    *,
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Every score of `first` minus that of `second` on the same sites, with the interval of the paired difference.

    Raises:
        InputError: the two do not have the same shape.
    """
    if first.shape != second.shape:
        raise InputError(f"compare: predictions of shape {first.shape} and {second.shape}; both need the same sites")
    subjects = {"first": count(labels, first, clusters), "second": count(labels, second, clusters)}
    return estimate(subjects, replicates=replicates, seed=seed, confidence=confidence)[1]["second"]
