"""Tests of the frozen members of the ensemble classifier, and of the ensemble weights."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax.core.config import (
    LINEAR_C,
    LINEAR_VARIANCE,
)
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import (
    COMPONENTS,
    MLP,
    EnsembleHead,
    compute_statistics,
)
from perturbjax.models.layers import Dense
from perturbjax.training.ensemble_fit import (
    MIN_ENSEMBLE_WEIGHT,
    estimate_ensemble_weights,
    fit_ensemble,
    fit_logistic_regression,
    fit_mlp,
    fit_reduction,
)

pytestmark = pytest.mark.full


def blobs(n: int = 120, d: int = 20, classes: int = 3):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return (rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))).astype(
        np.float32
    ) * 5 + 7, labels


@pytest.mark.parametrize("n", [120, 12])
def test_reduction_balances_variance_of_uncorrelated_components_and_statistics(n):
    x, _ = blobs(n)
    mean, kernel = fit_reduction(x, backbone_features=15)
    z = (x - mean) @ kernel
    assert z.shape == (n, 20)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose([z[:, :15].var(0).sum(), z[:, 15:].var(0).sum()], 10, rtol=1e-4)
    covariance = np.cov(z[:, : min(15, n - 1)].T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert n > 15 or not z[:, n:15].any()  # fewer sites than components


def test_reduction_limits_number_of_components():
    x = np.random.default_rng(0).normal(size=(300, COMPONENTS + 40)).astype(np.float32)
    _, kernel = fit_reduction(x, backbone_features=COMPONENTS + 30)
    assert kernel.shape == (COMPONENTS + 40, COMPONENTS + 10)


def test_reduction_ignores_constant_feature():
    x, _ = blobs()
    x[:, 3] = 4
    assert not np.any(fit_reduction(x, backbone_features=15)[1][3])


def fit_blobs(x, labels, weight, seed: int = 0) -> MLP:
    return fit_mlp(MLP(x.shape[1], 4, rngs=nnx.Rngs(0)), x, labels, weight, 0.1, seed)


def test_mlp_predicts_held_out_sites_and_depends_on_seed():
    x, labels = blobs(240)
    x = (x - x.mean(0)) / x.std(0)
    head = fit_blobs(x[:160], labels[:160], np.ones(160))
    predicted = np.asarray(head(jnp.asarray(x[160:]), Mode())).argmax(1)
    assert (predicted == labels[160:]).mean() > 0.9
    other = fit_blobs(x[:160], labels[:160], np.ones(160), seed=1)
    assert not np.array_equal(other.hidden.kernel[...], head.hidden.kernel[...])


def test_mlp_uses_site_weights():
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    labels = (np.arange(300) % 10 == 0).astype(int)
    for weight, low, high in ((np.ones(300), 0, 0.05), (np.where(labels, 9.0, 1.0), 0.15, 0.7)):
        predicted = np.asarray(fit_blobs(x, labels, weight)(jnp.asarray(x), Mode())).argmax(1)
        assert low <= (predicted == 1).mean() <= high


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2], [1]])
def test_logistic_regression_predicts_training_classes_only(classes):
    x, labels = blobs(240)
    x = ((x - x.mean(0)) / x.std(0))[np.isin(labels, classes)]
    labels = labels[np.isin(labels, classes)]
    half = len(x) // 2
    model = fit_logistic_regression(
        Dense(20, 3, rngs=nnx.Rngs(0)), x[:half], labels[:half], np.ones(half)
    )
    probabilities = np.asarray(jax.nn.softmax(model(jnp.asarray(x[half:]))))
    assert (probabilities.argmax(1) == labels[half:]).mean() > 0.9
    assert np.all(np.delete(probabilities, classes, axis=1) < 1e-9)


def test_logistic_regression_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, labels = blobs(90)
    x = (x - x.mean(0)) / x.std(0)
    scale = np.sqrt(2 * LINEAR_VARIANCE / 20)
    theirs = LogisticRegression(C=LINEAR_C, max_iter=300, class_weight="balanced").fit(
        x * scale, labels
    )
    ours = fit_logistic_regression(Dense(20, 3, rngs=nnx.Rngs(0)), x, labels, np.ones(90))
    np.testing.assert_allclose(
        jax.nn.softmax(ours(jnp.asarray(x))), theirs.predict_proba(x * scale), atol=1e-4
    )


def test_ensemble_weights_maximize_likelihood():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    informative = 2 * np.eye(4)[labels] + rng.normal(size=(400, 4))
    scores = np.stack([informative, rng.normal(size=(400, 4))])
    log_probabilities = np.asarray(jax.nn.log_softmax(jnp.asarray(scores)), np.float64)

    def loss(weights):
        logits = np.tensordot(weights, log_probabilities, 1)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(400), labels])

    best = estimate_ensemble_weights(log_probabilities, labels)
    assert best[0] > 0.8 and MIN_ENSEMBLE_WEIGHT <= best[1] < 0.2
    for change in ([0.05, 0], [-0.05, 0], [0, 0.05], [0.05, 0.05]):
        assert loss(best) <= loss(np.maximum(best + change, MIN_ENSEMBLE_WEIGHT)) + 1e-9


@pytest.mark.parametrize("groups", [np.arange(120) // 30, np.zeros(120)])
def test_ensemble_combines_members_with_their_weights(groups):
    x, labels = blobs()
    x = (x - x.mean(0)) / x.std(0)
    head = fit_ensemble(
        EnsembleHead(20, 3, rngs=nnx.Rngs(0)),
        x,
        labels,
        np.ones(120),
        groups,
        smoothing=0.1,
        seed=0,
    )
    x = jnp.asarray(x)
    members = [
        jax.nn.log_softmax(logits) for logits in (head.mlp(x, Mode()), head.logistic_regression(x))
    ]
    weights = np.asarray(head.ensemble_weights[...])
    assert weights.min() >= np.float32(MIN_ENSEMBLE_WEIGHT) and weights.max() > 0.5
    expected = weights[0] * members[0] + weights[1] * members[1]
    np.testing.assert_allclose(head(x, Mode()), expected, atol=1e-4)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ensemble_fits_one_or_two_sites(n):
    x, labels = blobs(n)
    head = fit_ensemble(
        EnsembleHead(20, 3, rngs=nnx.Rngs(0)),
        x,
        labels,
        np.ones(n),
        np.zeros(n),
        smoothing=0.1,
        seed=0,
    )
    np.testing.assert_array_equal(head.ensemble_weights[...], [0.5, 0.5])
    assert np.isfinite(head(jnp.asarray(x), Mode())).all()


def test_ensemble_weights_ignore_classes_of_a_single_group():
    x, labels = blobs()
    x = (x - x.mean(0)) / x.std(0)
    head = fit_ensemble(
        EnsembleHead(20, 3, rngs=nnx.Rngs(0)),
        x,
        labels,
        np.ones(120),
        labels,
        smoothing=0.1,
        seed=0,
    )
    np.testing.assert_array_equal(head.ensemble_weights[...], [0.5, 0.5])


def test_site_statistics_count_cells_and_intensities():
    mask = jnp.zeros((2, 8, 8)).at[0, :2, :2].set(1).at[0, 4:, 4:].set(7)
    image = jnp.stack([jnp.full((8, 8, 1), 2.0), jnp.arange(64.0).reshape(8, 8, 1)])
    statistics = np.asarray(compute_statistics(mask, image))
    np.testing.assert_allclose(statistics[0, :5], [2, 0, 2, 2, 2], atol=1e-6)
    np.testing.assert_allclose(statistics[1, [0, 3]], [31.5, 31.5])
    np.testing.assert_allclose(np.expm1(statistics[:, 5]), [2, 0], atol=1e-6)
    np.testing.assert_allclose(np.exp(statistics[:, 6]), [20 / 64 + 1e-3, 1e-3], rtol=1e-5)
