"""Intervals hold what they promise, and count wells rather than sites."""

from __future__ import annotations

import numpy as np
import pytest

from perturbjax.evaluation.bootstrap import Estimate, replicate, resample
from perturbjax.evaluation.scores import METRICS, Counts, count, score


def scores(counts: Counts, **options) -> dict[str, Estimate]:
    return resample({"model": counts}, **options).scores("model")


def coin(rng: np.random.Generator, clusters: int, share: float, size: int = 1) -> Counts:
    """Clusters of `size` identical sites of one class, a `share` of them right."""
    right = np.repeat(rng.random(clusters) < share, size)
    probabilities = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    return count(
        np.zeros(len(right), dtype=int), probabilities, np.repeat(np.arange(clusters), size)
    )


def test_the_interval_covers_the_true_accuracy_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        found = scores(coin(rng, 120, 0.4), replicates=400, seed=seed)["accuracy"]
        held += found.low <= 0.4 <= found.high
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
        *(
            np.repeat(part / 9, 9, axis=0)
            for part in (nine.truth, nine.predicted, nine.hits, nine.top)
        )
    )
    width = {}
    for name, counts in {"one": one, "nine": nine, "independent": independent}.items():
        accuracy = scores(counts, replicates=2000)["accuracy"]
        width[name] = accuracy.high - accuracy.low
    assert width["nine"] == pytest.approx(width["one"])
    assert width["nine"] / width["independent"] == pytest.approx(3, rel=0.15)


def test_values_are_the_plain_scores_and_lie_within_their_intervals():
    rng = np.random.default_rng(3)
    labels, probabilities = rng.integers(4, size=300), rng.dirichlet(np.ones(4), size=300)
    every = scores(count(labels, probabilities, np.arange(300) // 3))
    plain = score(labels, probabilities)
    for metric in METRICS:
        found = every[metric]
        assert found.value == pytest.approx(plain[metric])
        assert found.low <= found.value <= found.high


def test_a_constant_answer_has_its_chance_as_balanced_accuracy_in_every_resample():
    """Two classes, one of two wells only: a resample that lost it would score 1, one that lost the other 0."""
    labels = np.repeat([0] * 9 + [1] * 2, 3)
    constant = count(labels, np.tile([0.9, 0.1], (33, 1)), np.arange(33) // 3)
    found = scores(constant)
    assert found["balanced_accuracy"] == Estimate(0.5, 0.5, 0.5)
    assert found["accuracy"].low < found["accuracy"].value < found["accuracy"].high


@pytest.mark.parametrize("wells", [2, 3, 8])
def test_within_classes_of_few_wells_the_spread_is_that_of_the_mean_of_recalls(wells):
    rng = np.random.default_rng(11)
    labels = np.repeat(np.arange(30), wells)
    right = rng.random(len(labels)) < 0.6
    probabilities = np.eye(30)[np.where(right, labels, (labels + 1) % 30)]
    draws = replicate({"model": count(labels, probabilities)}, replicates=4000)["model"][
        "balanced_accuracy"
    ]
    of_class = right.reshape(30, wells).var(axis=1, ddof=1) / wells
    assert draws.std() == pytest.approx(np.sqrt(of_class.sum()) / 30, rel=0.05)


def test_classes_of_a_single_well_are_drawn_among_each_other():
    """Nothing is seen of their spread within; between them it is that of a mean over classes."""
    right = np.random.default_rng(12).random(60) < 0.4
    probabilities = np.eye(60)[np.where(right, np.arange(60), (np.arange(60) + 1) % 60)]
    draws = replicate({"model": count(np.arange(60), probabilities)}, replicates=4000)["model"][
        "balanced_accuracy"
    ]
    assert draws.mean() == pytest.approx(right.mean(), abs=0.01)
    assert draws.std() == pytest.approx(np.sqrt(right.var(ddof=1) / 60), rel=0.05)


def test_clusters_of_several_classes_are_drawn_whole_for_every_score():
    """Plates: all classes stand on each, and nothing can be drawn within a class."""
    rng = np.random.default_rng(13)
    labels, plates = np.tile(np.arange(4), 30), np.arange(120) // 12
    counts = count(labels, rng.dirichlet(np.ones(4), size=120), plates)
    found = replicate({"model": counts}, replicates=500)["model"]
    np.testing.assert_allclose(found["balanced_accuracy"], found["accuracy"], atol=1e-6)


def test_the_seed_decides_the_interval():
    counts = coin(np.random.default_rng(4), 50, 0.5)
    first, again, other = (scores(counts, replicates=300, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_perfect_model_has_an_interval_of_no_width():
    labels = np.resize(np.arange(6), 60)
    for found in scores(count(labels, np.eye(6)[labels]), replicates=200).values():
        assert found == Estimate(1.0, 1.0, 1.0)


def test_a_paired_difference_is_sharper_than_two_intervals_apart():
    """Two models that err on nearly the same sites: their difference is known better than either."""
    rng = np.random.default_rng(5)
    labels, wells = rng.integers(4, size=400), np.arange(400) // 2
    first = rng.dirichlet(np.ones(4), size=400)
    second = first.copy()
    second[:20] = np.eye(4)[(labels[:20] + 1) % 4]
    both = resample({"first": count(labels, first, wells), "second": count(labels, second, wells)})
    found, alone = both.lead("first", "second")["accuracy"], both.scores("first")["accuracy"]
    assert found.value == pytest.approx(
        score(labels, first)["accuracy"] - score(labels, second)["accuracy"]
    )
    assert found.high - found.low < 0.6 * (alone.high - alone.low)


def test_a_model_beside_itself_differs_by_nothing():
    rng = np.random.default_rng(6)
    labels, probabilities = rng.integers(3, size=50), rng.dirichlet(np.ones(3), size=50)
    counts = count(labels, probabilities)
    for found in (
        resample({"one": counts, "two": counts}, replicates=100).lead("one", "two").values()
    ):
        assert found == Estimate(0.0, 0.0, 0.0)


def test_subjects_on_other_clusters_are_not_compared():
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match="different numbers of clusters"):
        replicate({"one": coin(rng, 5, 0.5), "two": coin(rng, 6, 0.5)})


def test_the_interval_of_a_correlation_near_one_reaches_further_down_than_up():
    """24 wells of two classes, one wrong; where none is, or all are answered alike, there is nothing to tell."""
    labels = np.repeat([0, 1], 12)
    told = labels.copy()
    told[0] = 1
    found = scores(count(labels, np.eye(2)[told]))["mcc"]
    assert 0.6 < found.low < found.value < found.high <= 1
    assert found.value - found.low > 1.5 * (found.high - found.value)
    perfect, constant = (
        scores(count(labels, np.eye(2)[told]))["mcc"] for told in (labels, 0 * labels)
    )
    assert (perfect.value, perfect.high) == (1, 1) and perfect.low == pytest.approx(1)
    assert (constant.low, constant.value, constant.high) == (0, 0, 0)
