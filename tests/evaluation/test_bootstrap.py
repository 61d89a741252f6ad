"""Intervals hold what they promise, and count wells rather than sites."""

from __future__ import annotations

import numpy as np
import pytest

from perturbjax.console import InputError
from perturbjax.evaluation.bootstrap import compare, estimate, replicate
from perturbjax.evaluation.scores import METRICS, Counts, count, score


def coin(rng: np.random.Generator, clusters: int, share: float, size: int = 1) -> Counts:
    """Clusters of `size` identical sites of one class, a `share` of them right."""
    right = np.repeat(rng.random(clusters) < share, size)
    probabilities = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    return count(np.zeros(len(right), dtype=int), probabilities, np.repeat(np.arange(clusters), size))


def test_the_interval_covers_the_true_accuracy_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        scores, _ = estimate({"model": coin(rng, 120, 0.4)}, replicates=400, seed=seed)
        held += scores["model"]["accuracy"]["low"] <= 0.4 <= scores["model"]["accuracy"]["high"]
    assert 0.91 <= held / 300 <= 0.98


def test_the_spread_is_that_of_the_binomial():
    counts = coin(np.random.default_rng(1), 400, 0.3)
    share = counts.hits.sum() / 400
    draws = replicate({"model": counts}, replicates=4000)["model"]["accuracy"]
    assert draws.std() == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.05)


def test_identical_sites_of_a_well_count_as_one():
    """Nine copies of each site add nothing: clustered, the interval stays; as if independent, it shrinks by three."""
    one = coin(np.random.default_rng(2), 80, 0.5)
    nine = coin(np.random.default_rng(2), 80, 0.5, size=9)
    independent = Counts(
        *(np.repeat(part / 9, 9, axis=0) for part in (nine.truth, nine.predicted, nine.hits, nine.top))
    )
    width = {}
    for name, counts in {"one": one, "nine": nine, "independent": independent}.items():
        accuracy = estimate({"model": counts}, replicates=2000)[0]["model"]["accuracy"]
        width[name] = accuracy["high"] - accuracy["low"]
    assert width["nine"] == pytest.approx(width["one"])
    assert width["nine"] / width["independent"] == pytest.approx(3, rel=0.15)


def test_values_are_the_plain_scores_and_lie_within_their_intervals():
    rng = np.random.default_rng(3)
    labels, probabilities = rng.integers(4, size=300), rng.dirichlet(np.ones(4), size=300)
    scores, _ = estimate({"model": count(labels, probabilities, np.arange(300) // 3)})
    plain = score(labels, probabilities)
    for metric in METRICS:
        found = scores["model"][metric]
        assert found["value"] == pytest.approx(plain[metric])
        assert found["low"] <= found["value"] <= found["high"]


def test_macro_f1_lies_in_its_interval_also_where_every_class_has_one_well():
    """Resamples lack a third of such classes, so all their macro-F1 are lower than that of the whole."""
    labels = np.repeat(np.arange(150), 4)
    probabilities = np.random.default_rng(7).dirichlet(np.full(150, 0.1), size=600)
    probabilities[::2] = np.eye(150)[labels[::2]]
    counts = count(labels, probabilities, labels)
    replicates = replicate({"model": counts}, replicates=500)["model"]["macro_f1"]
    found = estimate({"model": counts}, replicates=500)[0]["model"]["macro_f1"]
    assert found["value"] > np.quantile(replicates, 0.975)
    assert found["low"] < found["value"] < found["high"]


def test_the_seed_decides_the_interval():
    counts = coin(np.random.default_rng(4), 50, 0.5)
    first, again, other = (estimate({"m": counts}, replicates=300, seed=seed)[0]["m"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_perfect_model_has_an_interval_of_no_width():
    labels = np.resize(np.arange(6), 60)
    scores, _ = estimate({"model": count(labels, np.eye(6)[labels])}, replicates=200)
    for found in scores["model"].values():
        assert found == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_paired_difference_is_sharper_than_two_intervals_apart():
    """Two models that err on nearly the same sites: their difference is known better than either."""
    rng = np.random.default_rng(5)
    labels = rng.integers(4, size=400)
    first = rng.dirichlet(np.ones(4), size=400)
    second = first.copy()
    second[:20] = np.eye(4)[(labels[:20] + 1) % 4]
    found = compare(labels, first, second, np.arange(400) // 2)["accuracy"]
    alone = estimate({"first": count(labels, first, np.arange(400) // 2)})[0]["first"]["accuracy"]
    assert found["value"] == pytest.approx(score(labels, first)["accuracy"] - score(labels, second)["accuracy"])
    assert found["high"] - found["low"] < 0.6 * (alone["high"] - alone["low"])


def test_a_model_beside_itself_differs_by_nothing():
    rng = np.random.default_rng(6)
    labels, probabilities = rng.integers(3, size=50), rng.dirichlet(np.ones(3), size=50)
    for found in compare(labels, probabilities, probabilities, np.arange(50), replicates=100).values():
        assert found == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_predictions_of_different_sites_are_not_compared():
    with pytest.raises(InputError, match="same sites"):
        compare(np.zeros(2, dtype=int), np.ones((2, 1)), np.ones((3, 1)), np.arange(2))
