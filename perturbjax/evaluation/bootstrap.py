"""Confidence intervals of scores from the cluster bootstrap over wells (or plates).

Idea. Sites of one well are not independent: they share treatment, position and staining. The
bootstrap therefore draws whole wells (cluster bootstrap: Davison & Hinkley 1997, section 3.8). A
score is a function of sums of counts, so that all replicates are one product of a weight matrix
(replicates x clusters) with the counts.

There are two resampling strategies:

- `_resample_clusters`: n of n clusters with replacement, for scores that sum over examples
  (accuracy) and for clusters with several classes (plates).
- `_resample_within_classes`: for averages over classes. A replicate without any well of a class
  would average over fewer classes. Wells are therefore drawn within each class: n - 1 of the n
  wells, each with weight n / (n - 1), because drawing n of few wells underestimates the variance
  (Rao & Wu 1988, JASA 83, 231). Classes with a single well have no variance of their own; they are
  drawn among each other (collapsed strata of survey statistics). A class that is the only one with
  a single well is constant, and the interval describes the other classes.

Corrections. Correlations (MCC) are also drawn within classes if each class has at least two
clusters. Their replicates are widened and shifted as z = artanh (Fisher 1915, Biometrika 10, 507),
which has constant variance. A few wells underestimate their own variance, so replicates are widened
by the ratio of Student's t to the normal distribution (degrees of freedom: clusters minus strata).

Coverage of the 95 % intervals is measured by `experiments/audit_truth.py`; see docs/audit.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from perturbjax.evaluation.scores import METRICS, Counts, Metric, additive_counts, pooled_scores

#: Replicates per matrix product, which bounds the memory.
_CHUNK = 250


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two scores, with its 95 % confidence interval."""

    value: float
    low: float
    high: float


#: Replicates of one model, {metric: values}; replicate i uses the same clusters for all models.
Draws = dict[str, Float[np.ndarray, " replicates"]]
#: Weights of clusters and (optionally) of classes, for a chunk of replicates.
Weights = tuple[Float[np.ndarray, "chunk clusters"], Float[np.ndarray, "chunk classes"] | None]


def _chunks(replicates: int) -> list[int]:
    # Sizes of the chunks; the last one can be smaller.
    return [min(_CHUNK, replicates - start) for start in range(0, replicates, _CHUNK)]


def _count_draws(drawn: Int[np.ndarray, "rows draws"], clusters: int) -> np.ndarray:
    """Count how often each cluster occurs in each row of drawn cluster numbers."""
    # Offset the numbers of row i by i * clusters, so that one bincount counts all rows.
    offsets = clusters * np.arange(len(drawn))[:, None]
    flat = np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * clusters)
    return flat.reshape(len(drawn), clusters)


def _resample_clusters(clusters: int, replicates: int, seed: int) -> Iterator[Weights]:
    """Draw n of n clusters with replacement."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(replicates):
        drawn = rng.integers(clusters, size=(rows, clusters))
        # Without class weights, all classes have weight 1.
        yield _count_draws(drawn, clusters).astype(np.float32), None


@dataclasses.dataclass(frozen=True)
class _Strata:
    """Clusters of one class each, grouped for drawing within classes."""

    strata: Int[np.ndarray, " clusters"]
    """Stratum of each cluster: its class; all classes with a single cluster share one stratum."""
    single: Int[np.ndarray, " singles"]
    """Clusters that are the only one of their class."""
    single_classes: Int[np.ndarray, " singles"]
    """Classes of these clusters."""


def _class_strata(truth: Float[np.ndarray, "clusters classes"]) -> _Strata | None:
    """Group clusters by class; None if a cluster contains several classes."""
    if ((truth > 0).sum(axis=1) != 1).any():
        return None
    labels = truth.argmax(axis=1)
    single = np.bincount(labels)[labels] == 1
    # All classes with a single cluster share the label -1, hence one stratum.
    strata = np.unique(np.where(single, -1, labels), return_inverse=True)[1].ravel()
    return _Strata(strata, np.flatnonzero(single), labels[single])


def _resample_within_classes(
    strata: _Strata, classes: int, replicates: int, seed: int
) -> Iterator[Weights]:
    """Draw n - 1 of each class's n clusters, scaled by n / (n - 1).

    The draws of single-cluster classes become class weights, since a class counts as often as it
    is drawn. A stratum of one cluster has weight 1.
    """
    rng = np.random.default_rng([seed, 1])  # independent of `_resample_clusters`
    # Sort clusters by stratum: stratum s then occupies sizes[s] positions from first[s] on.
    order = np.argsort(strata.strata, kind="stable")
    sizes = np.bincount(strata.strata)
    first = np.cumsum(sizes) - sizes
    stratum = np.repeat(np.arange(len(sizes)), sizes - 1)  # stratum of each draw
    # n / (n - 1) of each cluster, in sorted order.
    scale = (sizes / np.maximum(sizes - 1, 1))[strata.strata[order]]
    constant = sizes[strata.strata[order]] == 1
    clusters = len(strata.strata)
    for rows in _chunks(replicates):
        # Sorted positions of the drawn clusters, (rows, draws); n - 1 draws for each stratum of n.
        drawn = first[stratum] + rng.integers(sizes[stratum], size=(rows, len(stratum)))
        scaled = _count_draws(drawn, clusters) * scale
        scaled[:, constant] = 1
        weights = np.empty((rows, clusters), dtype=np.float32)
        # Return to the original order of the clusters.
        weights[:, order] = scaled
        class_weight = np.ones((rows, classes), dtype=np.float32)
        # A single cluster cannot vary within its class. Its weight is transferred to the class.
        class_weight[:, strata.single_classes] = weights[:, strata.single]
        weights[:, strata.single] = 1
        yield weights, class_weight


def draw_replicates(
    models: Mapping[str, Counts], *, replicates: int = 2000, seed: int = 0
) -> dict[str, Draws]:
    """Compute the scores of every model over the same resampled clusters.

    Replicates of two models can be subtracted, since they use the same clusters.

    Args:
        models: counts of each model, one row per cluster; all of the same examples and clusters.
        replicates: number of replicates.
        seed: seed of the random numbers.

    Returns:
        {model: {metric: one value per replicate}}.
    """
    sizes = {len(counts.top) for counts in models.values()}
    if len(sizes) != 1:
        raise ValueError(f"models have different numbers of clusters: {sorted(sizes)}")
    clusters = sizes.pop()
    # The truth is the same for all models, so the first one defines the strata.
    truth = next(iter(models.values())).truth
    strata = _class_strata(truth)
    # Correlations are drawn within classes only if each class has at least two clusters.
    repeated = strata is not None and not len(strata.single)
    within = {
        name: metric
        for name, metric in METRICS.items()
        if strata is not None and (metric.class_averaged or (repeated and metric.correlation))
    }
    plain = {name: metric for name, metric in METRICS.items() if name not in within}
    sums = {name: _Sums(counts) for name, counts in models.items()}
    draws: dict[str, Draws] = {name: {} for name in models}
    # Each strategy: metrics, weights per chunk, degrees of freedom (clusters minus strata).
    strategies = [(plain, _resample_clusters(clusters, replicates, seed), clusters - 1)]
    if strata is not None:
        weights = _resample_within_classes(strata, truth.shape[1], replicates, seed)
        strategies.append((within, weights, clusters - len(np.unique(strata.strata))))
    for metrics, weights, freedom in strategies:
        chunks: dict[str, list[Draws]] = {name: [] for name in models}
        for cluster_weight, class_weight in weights if metrics else ():
            for name, one in sums.items():
                chunks[name].append(one.scores(metrics, cluster_weight, class_weight))
        factor = _t_ratio(freedom)
        for name, parts in chunks.items():
            for metric in metrics:
                values = np.concatenate([part[metric] for part in parts])
                draws[name][metric] = _widen_scores(metric, values, factor, clusters)
    return draws


def _t_ratio(freedom: int) -> float:
    """Ratio of the 95 % intervals of Student's t and the normal distribution."""
    # Quantiles from scipy.special: the import of scipy.stats takes most of a second. Both are
    # imported here, because `predict` needs none of them.
    from scipy import special

    return float(special.stdtrit(max(freedom, 1), 0.975) / special.ndtri(0.975))


def _widen_scores(
    metric: str, values: Float[np.ndarray, " replicates"], factor: float, clusters: int
) -> Float[np.ndarray, " replicates"]:
    """Widen replicates by a factor, correlations on the z scale."""
    if not METRICS[metric].correlation:
        return _widen(values, factor)
    return _from_z(_widen(_to_z(values, clusters), factor), clusters)


def _to_z(values: Any, clusters: int) -> Any:
    """Fisher's z of slightly shrunken correlations, since artanh(1) is infinite."""
    return np.arctanh(values * (1 - 1 / (clusters + 1)))


def _from_z(values: Any, clusters: int) -> Any:
    return np.tanh(values) / (1 - 1 / (clusters + 1))


def _widen(
    values: Float[np.ndarray, " replicates"], factor: float
) -> Float[np.ndarray, " replicates"]:
    """Move replicates away from their mean by a factor."""
    mean = values.mean(dtype=float)
    return mean + factor * (values - mean)


class _Sums:
    """Counts of a model, prepared for products with weights."""

    def __init__(self, counts: Counts):
        truth, predicted, hits, top = additive_counts(counts)
        self.parts = [_compact(part) for part in (truth, predicted, hits, top[:, None])]

    def scores(
        self,
        metrics: Mapping[str, Metric],
        weights: Float[np.ndarray, "chunk clusters"],
        class_weight: Float[np.ndarray, "chunk classes"] | None,
    ) -> Draws:
        # Summed counts of each replicate, (chunk, columns).
        truth, predicted, hits, top = (weights @ part for part in self.parts)
        sums = Counts(truth, predicted, hits, top[:, 0], class_weight)
        return {name: metric.function(sums) for name, metric in metrics.items()}


def _compact(part: Float[np.ndarray, "clusters columns"]) -> Any:
    """Use a sparse array for wells with few of many classes: the product takes 10 % of the time."""
    from scipy import sparse

    # Whole counts up to 2^24 are exact in float32.
    part = part.astype(np.float32)
    return sparse.csc_array(part) if np.count_nonzero(part) < 0.1 * part.size else part


def interval(
    values: Float[np.ndarray, " replicates"], value: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the replicates, shifted so that their mean equals `value`.

    Replicates estimate the spread of a score but not its location: macro-F1, for example, is lower
    in replicates because drawn wells repeat.
    """
    quantiles = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    # A skewed distribution can exclude the score after the shift; the interval always contains it.
    low, high = quantiles + value - values.mean(dtype=float)
    return float(min(low, value)), float(max(high, value))


@dataclasses.dataclass(frozen=True)
class ResampledScores:
    """Scores of several models, and their replicates over the same resampled clusters."""

    points: dict[str, dict[str, float]]
    draws: dict[str, Draws]
    clusters: int

    def scores(self, model: str) -> dict[str, Estimate]:
        """Every score of a model with its 95 % interval."""
        return {
            metric: _estimate_score(
                METRICS[metric], value, self.draws[model][metric], self.clusters
            )
            for metric, value in self.points[model].items()
        }

    def lead(self, model: str, other: str) -> dict[str, Estimate]:
        """Every score of `model` minus that of `other`, with paired 95 % intervals."""
        leads = {}
        for metric, value in self.points[model].items():
            low, high = METRICS[metric].bounds
            # Replicate i uses the same clusters for both models, so the differences are paired.
            leads[metric] = _estimate(
                value - self.points[other][metric],
                self.draws[model][metric] - self.draws[other][metric],
                (low - high, high - low),
            )
        return leads


def _estimate_score(
    metric: Metric, value: float, values: Float[np.ndarray, " replicates"], clusters: int
) -> Estimate:
    if not metric.correlation:
        return _estimate(value, values, metric.bounds)
    # Percentiles and shift are computed on the z scale and transformed back to correlations.
    low, high = _from_z(
        np.array(interval(_to_z(values, clusters), float(_to_z(value, clusters)))), clusters
    )
    minimum, maximum = metric.bounds
    return Estimate(
        value, max(float(min(low, value)), minimum), min(float(max(high, value)), maximum)
    )


def _estimate(
    value: float, values: Float[np.ndarray, " replicates"], bounds: tuple[float, float]
) -> Estimate:
    low, high = interval(values, value)
    # An interval cannot exceed the possible values of the metric.
    return Estimate(value, max(low, bounds[0]), min(high, bounds[1]))


def resample(
    models: Mapping[str, Counts], *, replicates: int = 2000, seed: int = 0
) -> ResampledScores:
    """Score every model and resample all of them once; arguments as in `draw_replicates`."""
    points = {name: pooled_scores(counts) for name, counts in models.items()}
    draws = draw_replicates(models, replicates=replicates, seed=seed)
    return ResampledScores(points, draws, len(next(iter(models.values())).top))
