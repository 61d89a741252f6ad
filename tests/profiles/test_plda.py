"""PLDA: agreement with its model's predictive densities, and classes of few replicates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from perturbjax.profiles.plda import PLDA


def draw(
    rows: list[int], d: int, *, spread: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of classes with normal centers, their labels, and one new row per class."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(d, d)) / np.sqrt(d) + np.eye(d)
    centers = spread * rng.normal(size=(len(rows), d))
    labels = np.repeat(np.arange(len(rows)), rows)
    return (
        centers[labels] + rng.normal(size=(len(labels), d)) @ noise,
        labels,
        centers + rng.normal(size=(len(rows), d)) @ noise,
    )


@pytest.mark.parametrize(("shrinkage", "noise", "prior"), [(0.2, 1.0, 1.0), (0.7, 1.5, 2.0)])
def test_plda_decisions_are_predictive_densities(
    shrinkage: float, noise: float, prior: float
) -> None:
    """Centers are B (B + W/n)^-1 (mean - m), covariances W + B - B (B + W/n)^-1 B."""
    rows = [2, 3, 3, 4, 10, 3, 2, 5, 3, 3]
    x, y, new = draw(rows, 3, spread=4.0, seed=0)
    decisions = PLDA(shrinkage, noise, prior).fit(x, y).decision_function(new)

    means = np.array([x[y == c].mean(axis=0) for c in range(10)])
    overall = means.mean(axis=0)
    within = (x - means[y]).T @ (x - means[y]) / (len(x) - 10)
    within = noise * ((1 - shrinkage) * within + shrinkage * np.trace(within) / 3 * np.eye(3))
    between = (means - overall).T @ (means - overall) / 9 - np.mean(1 / np.array(rows)) * within
    assert np.linalg.eigvalsh(between).min() > 0, "B must be positive definite in this case"
    expected = np.empty((10, 10))
    for c, n in enumerate(rows):
        gain = between @ np.linalg.inv(between + within / n)
        density = multivariate_normal(
            overall + gain @ (means[c] - overall), within + between - gain @ between
        )
        expected[:, c] = density.logpdf(new) + prior * np.log(n / sum(rows))
    np.testing.assert_allclose(decisions - decisions[:, :1], expected - expected[:, :1], atol=1e-8)


def test_plda_does_not_favor_frequent_class_in_many_dimensions() -> None:
    """A mean of 3 rows is farther from new rows than a mean of 150 rows, which misleads LDA."""
    x, y, new = draw([150] + [3] * 60, 200, spread=0.5, seed=0)
    truth = np.arange(61)
    plda = PLDA(shrinkage=0.3).fit(x, y).predict(new)
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.3).fit(x, y).predict(new)
    assert (plda == 0).mean() < 0.2 < (lda == 0).mean()
    assert (plda == truth).mean() > (lda == truth).mean()


def test_plda_probabilities_sum_to_one_and_agree_with_prediction() -> None:
    x, y, new = draw([3] * 8, 20, spread=2.0, seed=2)
    model = PLDA().fit(x, np.array(list("abcdefgh"))[y])
    probabilities = model.predict_proba(new)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (model.predict(new) == model.classes_[probabilities.argmax(axis=1)]).all()


def test_plda_predicts_prior_without_signal() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4000, 3)), np.repeat([0, 1], [3000, 1000])
    np.testing.assert_allclose(
        PLDA().fit(x, y).predict_proba(x).mean(axis=0), [0.75, 0.25], atol=0.02
    )


def test_plda_can_be_cloned() -> None:
    model = clone(PLDA(shrinkage=0.6)).set_params(prior=2.0)
    assert model.get_params() == {"noise": 1.0, "prior": 2.0, "shrinkage": 0.6}


def test_plda_refuses_classes_without_replicates() -> None:
    with pytest.raises(ValueError, match="no class has two training rows"):
        PLDA().fit(np.eye(4), np.arange(4))
    with pytest.raises(ValueError, match="identical"):
        PLDA().fit(np.repeat(np.eye(2), 2, axis=0), np.repeat([0, 1], 2))
