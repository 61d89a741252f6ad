"""Ensemble classifier: features of single channels, site statistics and a trainable branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax.models import Mode
from perturbjax.models.backbone import SYMMETRIC_SCALING
from perturbjax.models.ensemble_head import (
    BRANCH_WEIGHT,
    COMPONENTS,
    SITES_PER_CHUNK,
    EnsembleClassifier,
    LinearReduction,
    downsample_by_2,
    rename_saved_arrays,
)
from perturbjax.models.layers import Conv
from perturbjax.models.symmetries import dihedral

pytestmark = pytest.mark.full

#: Features per channel: three statistics of the first stage's 7 maps.
PER_CHANNEL = 3 * 7


class Backbone(nnx.Module):
    """Two convolutions with the interface of a pretrained backbone."""

    stage_widths = (7, 5)

    def __init__(self):
        self.conv = Conv(3, 7, stride=2, rngs=nnx.Rngs(0))
        self.last = Conv(7, 5, stride=2, rngs=nnx.Rngs(1))

    def stage_maps(self, x, mode):
        fine = jax.nn.relu(self.conv(x))
        return [fine, self.last(fine)]


def forward(model: EnsembleClassifier, x: jax.Array):
    return nnx.jit(lambda model, x: model(x, Mode()))(model, x)


def compute_features(model: EnsembleClassifier, x: jax.Array) -> jax.Array:
    return nnx.jit(lambda model, x: model.compute_features(x, Mode()))(model, x)


def small(channels: int = 2, copies: int = 1, symmetries: int = 1) -> EnsembleClassifier:
    shape = {"classes": 3, "channels": channels, "copies": copies, "symmetries": symmetries}
    return EnsembleClassifier(
        Backbone(), **shape, dropout=0.0, input_scaling=SYMMETRIC_SCALING, rngs=nnx.Rngs(1)
    )


def site(channels: int, n: int = 2) -> jax.Array:
    image = jax.random.uniform(jax.random.key(0), (n, 40, 40, channels))
    return jnp.concatenate([jnp.ones((n, 40, 40, 1)).at[:, :9].set(0), image], axis=-1)


@pytest.mark.parametrize(("channels", "copies"), [(1, 1), (6, 1), (14, 1), (12, 2)])
def test_features_cover_stored_channels_and_statistics_of_all_copies(channels, copies):
    model, x = small(channels, copies), site(channels)
    backbone, statistics = channels // copies * PER_CHANNEL, channels * 5 + 2
    shape = jax.eval_shape(lambda x: model.compute_features(x, Mode()), x).shape
    assert shape == (2, backbone + statistics) and model.backbone_feature_size == backbone
    out = jax.eval_shape(lambda x: model(x, Mode()), x)
    assert out.features.shape == (2, model.feature_size) and out.logits.shape == (2, 3)
    reduced = min(COMPONENTS, backbone) + statistics
    assert model.reduce.kernel[...].shape == (backbone + statistics, reduced)


def test_channel_features_do_not_depend_on_other_channels_or_exposure():
    model, x = small(), site(2)
    other = x.at[..., 2].set(x[::-1, ..., 2])
    brighter = jnp.log1p(3 * jnp.expm1(x[..., 1:]) + 1)
    brighter = jnp.concatenate([x[..., :1], brighter], axis=-1)
    backbone, with_other, exposed = (compute_features(model, one) for one in (x, other, brighter))
    np.testing.assert_allclose(with_other[:, :PER_CHANNEL], backbone[:, :PER_CHANNEL], atol=1e-5)
    np.testing.assert_allclose(
        exposed[:, : 2 * PER_CHANNEL], backbone[:, : 2 * PER_CHANNEL], atol=1e-3
    )


def test_features_averaged_over_symmetries_are_rotation_invariant():
    x = site(1)
    for symmetries, same in ((1, False), (8, True)):
        model = small(1, symmetries=symmetries)
        assert (
            np.allclose(
                compute_features(model, dihedral(x, 5)), compute_features(model, x), atol=1e-4
            )
            == same
        )


@pytest.mark.parametrize("n", [SITES_PER_CHUNK - 1, SITES_PER_CHUNK, 2 * SITES_PER_CHUNK + 1])
def test_features_of_chunked_sites_match_single_sites(n):
    model, x = small(2, symmetries=3), site(2, n)
    batch = compute_features(model, x)
    for row in (0, n - 1):
        np.testing.assert_allclose(
            batch[row], compute_features(model, x[row : row + 1])[0], rtol=1e-4, atol=1e-5
        )


def test_window_of_the_size_of_the_site_gives_the_features_of_the_site():
    """One cell: one window has weight 1. Without cells all windows of the grid are the same."""
    model, x = small(2), site(2)
    labels = jnp.zeros((2, 40, 40), jnp.uint16).at[0, 12:20, 10:30].set(7)
    pool = nnx.jit(
        lambda model, x: model.pool_windows(x, labels, 40, Mode()),
    )
    expected = compute_features(model, x)[:, : 2 * PER_CHANNEL]
    np.testing.assert_allclose(pool(model, x), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_weighted_mean_and_only_branch_is_trained():
    model, x = small(), site(2)
    branch = nnx.jit(lambda model, x: model.trainable_branch(downsample_by_2(x), Mode()))(model, x)
    out = forward(model, x)
    reduced = model.reduce(compute_features(model, x))
    head = jax.nn.log_softmax(model.head(reduced, Mode()))
    hidden = model.head.mlp.activations(reduced)
    np.testing.assert_allclose(out.features[:, : hidden.shape[1]], hidden, atol=1e-4)
    np.testing.assert_allclose(out.features[:, hidden.shape[1] :], branch.features, atol=1e-5)
    expected = (1 - BRANCH_WEIGHT) * head + BRANCH_WEIGHT * jax.nn.log_softmax(branch.logits)
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)
    assert out.attention.shape == (2, 2, 2)  # 40 pixels, divided by 2 four times

    def loss(params, x):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return jnp.square(model(x, Mode(train=True)).logits).sum()

    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    gradients = jax.jit(jax.grad(loss))(params, x)
    trained = {
        name for name in gradients if any(np.any(leaf) for leaf in jax.tree.leaves(gradients[name]))
    }
    assert trained == {"trainable_branch"}


def test_bfloat16_logits_match_float32():
    model, x = small(2, symmetries=2), site(2, SITES_PER_CHUNK + 1)
    logits = nnx.jit(lambda model, x: model(x, Mode(dtype=jnp.bfloat16)).logits)(model, x)
    np.testing.assert_allclose(logits, forward(model, x).logits, atol=0.02)


def test_downsample_by_2_averages_cell_fraction_and_channels():
    x = (
        jnp.zeros((1, 5, 4, 2))
        .at[0, 0, 0, 0]
        .set(7)
        .at[0, :2, :2, 1]
        .set(jnp.array([[1, 2], [3, 6]]))
    )
    half = downsample_by_2(x)
    assert half.shape == (1, 2, 2, 2)
    np.testing.assert_allclose(half[0, 0, 0], [0.25, 3])


def test_unfitted_reduction_keeps_first_features():
    np.testing.assert_array_equal(
        LinearReduction(5, 3)(jnp.arange(10.0).reshape(2, 5)), [[0, 1, 2], [5, 6, 7]]
    )


def test_rename_saved_arrays_maps_former_names_to_present_ones():
    former = ("eyes/head/bias", "head/perceptron/past", "head/linear/kernel", "head/shares")
    present = (
        "trainable_branch/head/bias",
        "head/mlp/skip",
        "head/logistic_regression/kernel",
        "head/ensemble_weights",
    )
    saved = {f"opt_state/0/mu/{name}/value": number for number, name in enumerate(former)}
    renamed = {f"opt_state/0/mu/{name}/value": number for number, name in enumerate(present)}
    assert rename_saved_arrays(saved) == renamed
    state = nnx.to_flat_state(nnx.state(small()))
    assert {"/".join(map(str, path)) for path, _ in state} >= set(present)
