"""Confidence intervals have their nominal coverage and resample wells, not sites."""

from __future__ import annotations

import numpy as np
import pytest

from perturbjax.evaluation.bootstrap import Estimate, draw_replicates, resample
from perturbjax.evaluation.scores import METRICS, Counts, count, score


def scores(counts: Counts, **options) -> dict[str, Estimate]:
    return resample({"model": counts}, **options).scores("model")


def coin(rng: np.random.Generator, clusters: int, fraction: float, size: int = 1) -> Counts:
    """Simulate clusters of `size` identical sites, a `fraction` of them correct."""
    right = np.repeat(rng.random(clusters) < fraction, size)
    probabilities = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    return count(
        np.zeros(len(right), dtype=int), probabilities, np.repeat(np.arange(clusters), size)
    )


def test_resample_interval_covers_true_accuracy():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        result = scores(coin(rng, 120, 0.4), replicates=400, seed=seed)["accuracy"]
        covered += result.low <= 0.4 <= result.high
    assert 0.91 <= covered / 300 <= 0.98


def test_replicates_have_binomial_variance():
    counts = coin(np.random.default_rng(1), 400, 0.3)
    fraction = counts.hits.sum() / 400
    draws = draw_replicates({"model": counts}, replicates=4000)["model"]["accuracy"]
    assert draws.std() == pytest.approx(np.sqrt(fraction * (1 - fraction) / 400), rel=0.05)


def test_resample_counts_identical_sites_once():
    """Nine copies of each site leave the interval unchanged if clustered."""
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


def test_resample_values_equal_scores_within_intervals():
    rng = np.random.default_rng(3)
    labels, probabilities = rng.integers(4, size=300), rng.dirichlet(np.ones(4), size=300)
    every = scores(count(labels, probabilities, np.arange(300) // 3))
    plain = score(labels, probabilities)
    for metric in METRICS:
        result = every[metric]
        assert result.value == pytest.approx(plain[metric])
        assert result.low <= result.value <= result.high


def test_resample_keeps_balanced_accuracy_of_constant_prediction():
    """A replicate without the class of two wells would score 1, without the other 0."""
    labels = np.repeat([0] * 9 + [1] * 2, 3)
    constant = count(labels, np.tile([0.9, 0.1], (33, 1)), np.arange(33) // 3)
    result = scores(constant)
    assert result["balanced_accuracy"] == Estimate(0.5, 0.5, 0.5)
    assert result["accuracy"].low < result["accuracy"].value < result["accuracy"].high


@pytest.mark.parametrize("wells", [2, 3, 8])
def test_resampling_within_classes_has_variance_of_mean_recall(wells):
    rng = np.random.default_rng(11)
    labels = np.repeat(np.arange(30), wells)
    right = rng.random(len(labels)) < 0.6
    probabilities = np.eye(30)[np.where(right, labels, (labels + 1) % 30)]
    draws = draw_replicates({"model": count(labels, probabilities)}, replicates=4000)["model"][
        "balanced_accuracy"
    ]
    class_variance = right.reshape(30, wells).var(axis=1, ddof=1) / wells
    assert draws.std() == pytest.approx(np.sqrt(class_variance.sum()) / 30, rel=0.05)


def test_resample_draws_single_well_classes_together():
    """Their variance is that of a mean over classes."""
    right = np.random.default_rng(12).random(60) < 0.4
    probabilities = np.eye(60)[np.where(right, np.arange(60), (np.arange(60) + 1) % 60)]
    draws = draw_replicates({"model": count(np.arange(60), probabilities)}, replicates=4000)[
        "model"
    ]["balanced_accuracy"]
    assert draws.mean() == pytest.approx(right.mean(), abs=0.01)
    assert draws.std() == pytest.approx(np.sqrt(right.var(ddof=1) / 60), rel=0.05)


def test_resample_draws_plates_for_every_score():
    """Clusters with several classes cannot be drawn within classes."""
    rng = np.random.default_rng(13)
    labels, plates = np.tile(np.arange(4), 30), np.arange(120) // 12
    counts = count(labels, rng.dirichlet(np.ones(4), size=120), plates)
    result = draw_replicates({"model": counts}, replicates=500)["model"]
    np.testing.assert_allclose(result["balanced_accuracy"], result["accuracy"], atol=1e-6)


def test_resample_is_reproducible():
    counts = coin(np.random.default_rng(4), 50, 0.5)
    first, second, other = (scores(counts, replicates=300, seed=seed) for seed in (1, 1, 2))
    assert first == second != other


def test_resample_of_perfect_predictions_has_no_width():
    labels = np.resize(np.arange(6), 60)
    for result in scores(count(labels, np.eye(6)[labels]), replicates=200).values():
        assert result == Estimate(1.0, 1.0, 1.0)


def test_lead_has_paired_interval():
    """Two models with nearly the same errors have a narrow difference."""
    rng = np.random.default_rng(5)
    labels, wells = rng.integers(4, size=400), np.arange(400) // 2
    first = rng.dirichlet(np.ones(4), size=400)
    second = first.copy()
    second[:20] = np.eye(4)[(labels[:20] + 1) % 4]
    both = resample({"first": count(labels, first, wells), "second": count(labels, second, wells)})
    result, own = both.lead("first", "second")["accuracy"], both.scores("first")["accuracy"]
    assert result.value == pytest.approx(
        score(labels, first)["accuracy"] - score(labels, second)["accuracy"]
    )
    assert result.high - result.low < 0.6 * (own.high - own.low)


def test_lead_over_itself_is_zero():
    rng = np.random.default_rng(6)
    labels, probabilities = rng.integers(3, size=50), rng.dirichlet(np.ones(3), size=50)
    counts = count(labels, probabilities)
    for result in (
        resample({"one": counts, "two": counts}, replicates=100).lead("one", "two").values()
    ):
        assert result == Estimate(0.0, 0.0, 0.0)


def test_draw_replicates_requires_equal_clusters():
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match="different numbers of clusters"):
        draw_replicates({"one": coin(rng, 5, 0.5), "two": coin(rng, 6, 0.5)})


def test_correlation_interval_is_asymmetric_near_one():
    """24 wells of two classes, one wrong; perfect and constant predictions have no variance."""
    labels = np.repeat([0, 1], 12)
    predicted = labels.copy()
    predicted[0] = 1
    result = scores(count(labels, np.eye(2)[predicted]))["mcc"]
    assert 0.6 < result.low < result.value < result.high <= 1
    assert result.value - result.low > 1.5 * (result.high - result.value)
    perfect, constant = (
        scores(count(labels, np.eye(2)[one]))["mcc"] for one in (labels, 0 * labels)
    )
    assert (perfect.value, perfect.high) == (1, 1) and perfect.low == pytest.approx(1)
    assert (constant.low, constant.value, constant.high) == (0, 0, 0)
