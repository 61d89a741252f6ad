"""How far a score could have fallen otherwise: intervals from resampling whole wells (or plates).

Sites of one well share everything that went wrong with it, so wells are drawn with replacement, not sites
(the cluster bootstrap: Davison & Hinkley 1997, section 3.8). A score is a function of sums of counts, so a replicate is
one row of weights times the clusters' counts, and all replicates are a matrix product.

Scores that average over classes are another matter: a resample that loses a class averages over fewer, and the constant
answer of two classes scores 0, 1/2 or 1 by luck. For these, wells are drawn within each class. Of a class's n wells
n - 1 are drawn, each counting n / (n - 1) times (Rao & Wu 1988, JASA 83, 231), since to draw n of few wells shows too
little spread. Classes of a single well show none; they are drawn among each other, whole (as survey statisticians
collapse strata of one unit). A class that alone has a single well is taken as it is: its interval speaks of the others.
Where a cluster holds several classes (plates) there is nothing to draw within, and clusters are drawn as for any score.

A correlation (MCC) is drawn within classes too where each has two clusters or more, since a class's wells are fixed by
the plate map. Its draws are spread and moved as their z = artanh (Fisher 1915, Biometrika 10, 507), of even spread.

Few wells tell little of their own spread, so replicates are spread by as much as Student's t is wider than the normal
distribution, with as many degrees of freedom as there are clusters beyond one a stratum.

How often 95 % intervals hold the true score is measured by `experiments/audit_truth.py`; docs/audit.md has the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse, stats

from perturbjax.evaluation.scores import METRICS, Counts, Metric, additive_counts, point

#: Replicates at a time: bounds memory at this times the clusters and the classes.
_CHUNK = 250


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, and the interval that holds it."""

    value: float
    low: float
    high: float


#: Of one subject: {metric: …}, over the same resamples for all subjects.
Draws = dict[str, Float[np.ndarray, " replicates"]]


def _weights(
    clusters: int, replicates: int, seed: int
) -> Iterator[Float[np.ndarray, "chunk clusters"]]:
    """How often each cluster is drawn in each replicate, `_CHUNK` replicates at a time."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(replicates):
        drawn = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        yield (
            np.bincount(drawn.ravel(), minlength=rows * clusters)
            .reshape(rows, clusters)
            .astype(np.float32)
        )


def _chunks(replicates: int) -> list[int]:
    return [min(_CHUNK, replicates - start) for start in range(0, replicates, _CHUNK)]


def _weights_within(
    strata: Int[np.ndarray, " clusters"], replicates: int, seed: int
) -> Iterator[Float[np.ndarray, "chunk clusters"]]:
    """How often each cluster counts where n - 1 of each stratum's n clusters are drawn and scaled to count as n.

    A stratum of one cluster is always there, once.
    """
    rng = np.random.default_rng(
        [seed, 1]
    )  # other draws than those of the scores that go by whole resamples
    order = np.argsort(strata, kind="stable")
    sizes = np.bincount(strata)
    first = np.cumsum(sizes) - sizes
    of_draw = np.repeat(np.arange(len(sizes)), sizes - 1)
    scale = (sizes / np.maximum(sizes - 1, 1))[strata[order]]
    alone = sizes[strata[order]] == 1
    clusters = len(strata)
    for rows in _chunks(replicates):
        drawn = first[of_draw] + rng.integers(sizes[of_draw], size=(rows, len(of_draw)))
        drawn += clusters * np.arange(rows)[:, None]
        times = (
            np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters) * scale
        )
        times[:, alone] = 1
        weights = np.empty((rows, clusters), dtype=np.float32)
        weights[:, order] = times
        yield weights


@dataclasses.dataclass(frozen=True)
class _Classes:
    """Clusters of one class each: what is drawn within what."""

    strata: Int[np.ndarray, " clusters"]
    """Clusters of one class; those that are their class's only one are together."""
    single: Int[np.ndarray, " singles"]
    """Clusters that are their class's only one."""
    class_of_single: Int[np.ndarray, " singles"]

    def draws(
        self, classes: int, replicates: int, seed: int
    ) -> Iterator[tuple[Float[np.ndarray, "chunk clusters"], Float[np.ndarray, "chunk classes"]]]:
        """Weights of the clusters, and how often each class counts: a single cluster is drawn as its class is."""
        for weights in _weights_within(self.strata, replicates, seed):
            times = np.ones((len(weights), classes), dtype=np.float32)
            times[:, self.class_of_single] = weights[:, self.single]
            weights[:, self.single] = 1
            yield weights, times


def _one_class_a_cluster(truth: Float[np.ndarray, "clusters classes"]) -> _Classes | None:
    """None where a cluster holds several classes."""
    if ((truth > 0).sum(axis=1) != 1).any():
        return None
    class_of = truth.argmax(axis=1)
    alone = np.bincount(class_of)[class_of] == 1
    strata = np.unique(np.where(alone, -1, class_of), return_inverse=True)[1].ravel()
    return _Classes(strata, np.flatnonzero(alone), class_of[alone])


def replicate(
    model_names: Mapping[str, Counts], *, replicates: int = 2000, seed: int = 0
) -> dict[str, Draws]:
    """Scores of every subject over the same resamples of the same clusters, so that they may be subtracted.

    Args:
        subjects: counts of each subject, a row a cluster; all of the same examples in the same clusters.

    Returns:
        for each subject and metric that it allows, one value a replicate.
    """
    clusters = {len(counts.top) for counts in model_names.values()}
    if len(clusters) != 1:
        raise ValueError(f"subjects stand on different numbers of clusters: {sorted(clusters)}")
    truth = next(iter(model_names.values())).truth
    within = _one_class_a_cluster(truth)
    repeated = within is not None and not len(within.single)
    averaged = {
        name: one
        for name, one in METRICS.items()
        if one.class_averaged or (repeated and one.correlation)
    }
    plain = {
        name: metric for name, metric in METRICS.items() if within is None or name not in averaged
    }
    of = clusters.pop()
    wider = dict.fromkeys(plain, _wider(of - 1))
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in model_names}
    summed = {name: _Sums(counts) for name, counts in model_names.items()}
    if plain:
        for weights in _weights(of, replicates, seed):
            for name, sums in summed.items():
                sums.score(plain, weights, None, found[name])
    if within is not None and averaged:
        wider |= dict.fromkeys(averaged, _wider(of - len(np.unique(within.strata))))
        for weights, times in within.draws(truth.shape[1], replicates, seed):
            for name, sums in summed.items():
                sums.score(averaged, weights, times, found[name])
    return {
        name: {
            metric: _widened(metric, np.concatenate(parts), wider[metric], of)
            for metric, parts in metrics.items()
        }
        for name, metrics in found.items()
    }


def _wider(freedom: int) -> float:
    """How much wider a 95 % interval of Student's t is than that of the normal distribution."""
    return float(stats.t.ppf(0.975, max(freedom, 1)) / stats.norm.ppf(0.975))


def _widened(
    metric: str, values: Float[np.ndarray, " replicates"], factor: float, clusters: int
) -> Float[np.ndarray, " replicates"]:
    """Replicates spread by a factor, those of a correlation as its z."""
    if not METRICS[metric].correlation:
        return _spread(values, factor)
    return _from_z(_spread(_z(values, clusters), factor), clusters)


def _z(values: Any, clusters: int) -> Any:
    """Fisher's z of correlations, shrunk by as little as so many clusters can tell: 1 itself has none."""
    return np.arctanh(values * (1 - 1 / (clusters + 1)))


def _from_z(values: Any, clusters: int) -> Any:
    return np.tanh(values) / (1 - 1 / (clusters + 1))


def _spread(
    values: Float[np.ndarray, " replicates"], factor: float
) -> Float[np.ndarray, " replicates"]:
    """Replicates moved away from their mean by a factor."""
    mean = values.mean(dtype=float)
    return mean + factor * (values - mean)


class _Sums:
    """A subject's counts, ready to be weighed and added up."""

    def __init__(self, counts: Counts):
        self.counts = counts
        truth, predicted, hits, top = additive_counts(counts)
        self.parts = [_compact(part) for part in (truth, predicted, hits, top[:, None])]

    def score(
        self,
        metrics: Mapping[str, Metric],
        weights: Float[np.ndarray, "chunk clusters"],
        class_weight: Float[np.ndarray, "chunk classes"] | None,
        into: dict[str, list[np.ndarray]],
    ) -> None:
        """Append the values of a chunk of replicates to each metric's list."""
        truth, predicted, hits, top = (weights @ part for part in self.parts)
        sums, examples = (
            Counts(truth, predicted, hits, top[:, 0], class_weight),
            self.counts.examples,
        )
        for name, metric in metrics.items():
            if metric.made_of == "counts":
                into.setdefault(name, []).append(metric.function(sums))
            elif examples is not None:
                values = metric.function(
                    examples.labels, examples.probabilities, weights[:, examples.clusters]
                )
                into.setdefault(name, []).append(values)


def _compact(part: Float[np.ndarray, "clusters columns"]) -> np.ndarray | sparse.csc_array:
    """A well holds few of many classes: as a sparse array its product with the weights takes a tenth of the time."""
    part = part.astype(np.float32)
    return sparse.csc_array(part) if np.count_nonzero(part) < 0.1 * part.size else part


def interval(
    values: Float[np.ndarray, " replicates"], value: float, confidence: float = 0.95
) -> tuple[float, float]:
    """The percentile interval that holds `confidence` of the replicates, moved so that their mean is `value`.

    Replicates tell the spread of a score, not its place: that of macro-F1 lies lower in them, since drawn wells repeat.
    """
    low, high = (
        np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        + value
        - values.mean(dtype=float)
    )
    return float(min(low, value)), float(max(high, value))


@dataclasses.dataclass(frozen=True)
class Resampled:
    """Scores of several subjects over all examples, and over the same resamples of them."""

    points: dict[str, dict[str, float]]
    draws: dict[str, Draws]
    clusters: int

    def scores(self, subject: str) -> dict[str, Estimate]:
        """Every score of a subject, with its interval (95 %)."""
        return {
            metric: _scored(METRICS[metric], value, self.draws[subject][metric], self.clusters)
            for metric, value in self.points[subject].items()
        }

    def lead(self, subject: str, other: str) -> dict[str, Estimate]:
        """Every score of `subject` minus that of `other`; the interval is of the difference over the same resamples."""
        found = {}
        for metric in (metric for metric in self.points[subject] if metric in self.points[other]):
            value = self.points[subject][metric] - self.points[other][metric]
            values = self.draws[subject][metric] - self.draws[other][metric]
            low, high = METRICS[metric].bounds
            found[metric] = _estimate(value, values, low - high, high - low)
        return found


def _scored(
    metric: Metric, value: float, values: Float[np.ndarray, " replicates"], clusters: int
) -> Estimate:
    least, greatest = metric.bounds
    if not metric.correlation:
        return _estimate(value, values, least, greatest)
    low, high = _from_z(
        np.array(interval(_z(values, clusters), float(_z(value, clusters)))), clusters
    )
    return Estimate(
        value, max(float(min(low, value)), least), min(float(max(high, value)), greatest)
    )


def _estimate(
    value: float, values: Float[np.ndarray, " replicates"], least: float, greatest: float
) -> Estimate:
    low, high = interval(values, value)
    return Estimate(value, max(low, least), min(high, greatest))


def resample(
    model_names: Mapping[str, Counts], *, replicates: int = 2000, seed: int = 0
) -> Resampled:
    """Score every subject and resample them all once; arguments as in `replicate`."""
    points = {name: point(counts) for name, counts in model_names.items()}
    draws = replicate(model_names, replicates=replicates, seed=seed)
    return Resampled(points, draws, len(next(iter(model_names.values())).top))
