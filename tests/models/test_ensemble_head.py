"""The network of channels: every channel alone, however many, and eyes of its own beside what photographs taught."""

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
)
from perturbjax.models.layers import Conv
from perturbjax.models.symmetries import dihedral

#: Features of a channel: the first stage's, three copies.
SEEN = 3 * 7


class Backbone(nnx.Module):
    """Two convolutions: a network of photographs as far as its inputs and outputs go."""

    stage_widths = (7, 5)

    def __init__(self):
        self.conv = Conv(3, 7, stride=2, rngs=nnx.Rngs(0))
        self.last = Conv(7, 5, stride=2, rngs=nnx.Rngs(1))

    def stage_maps(self, x, mode):
        found = jax.nn.relu(self.conv(x))
        return [found, self.last(found)]


def forward(model: EnsembleClassifier, x: jax.Array):
    return nnx.jit(lambda model, x: model(x, Mode()))(model, x)


def described(model: EnsembleClassifier, x: jax.Array) -> jax.Array:
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
def test_the_stored_channels_are_described_and_statistics_of_all(channels, copies):
    model, x = small(channels, copies), site(channels)
    seen, known = channels // copies * SEEN, channels * 5 + 2
    shape = jax.eval_shape(lambda x: model.compute_features(x, Mode()), x).shape
    assert shape == (2, seen + known) and model.backbone_feature_size == seen
    out = jax.eval_shape(lambda x: model(x, Mode()), x)
    assert out.features.shape == (2, min(COMPONENTS, seen) + known) and out.logits.shape == (2, 3)


def test_what_is_found_in_a_channel_depends_neither_on_the_others_nor_on_its_exposure():
    model, x = small(), site(2)
    other = x.at[..., 2].set(x[::-1, ..., 2])
    brighter = jnp.log1p(3 * jnp.expm1(x[..., 1:]) + 1)
    brighter = jnp.concatenate([x[..., :1], brighter], axis=-1)
    seen, with_other, exposed = (described(model, one) for one in (x, other, brighter))
    np.testing.assert_allclose(with_other[:, :SEEN], seen[:, :SEEN], atol=1e-5)
    np.testing.assert_allclose(exposed[:, : 2 * SEEN], seen[:, : 2 * SEEN], atol=1e-3)


def test_averaged_over_all_symmetries_a_turned_site_is_described_alike():
    x = site(1)
    for symmetries, same in ((1, False), (8, True)):
        model = small(1, symmetries=symmetries)
        assert np.allclose(described(model, dihedral(x, 5)), described(model, x), atol=1e-4) == same


@pytest.mark.parametrize("n", [SITES_PER_CHUNK - 1, SITES_PER_CHUNK, 2 * SITES_PER_CHUNK + 1])
def test_sites_in_turn_are_described_as_they_are_alone(n):
    model, x = small(2, symmetries=3), site(2, n)
    together = described(model, x)
    for row in (0, n - 1):
        np.testing.assert_allclose(
            together[row], described(model, x[row : row + 1])[0], rtol=1e-4, atol=1e-5
        )


def test_the_answer_is_the_weighted_mean_of_what_head_and_eyes_say_and_training_is_the_eyes_alone():
    model, x = small(), site(2)
    looked = nnx.jit(lambda model, x: model.trainable_branch(downsample_by_2(x), Mode()))(model, x)
    out = forward(model, x)
    known = jax.nn.log_softmax(model.head(out.features, Mode()))
    expected = (1 - BRANCH_WEIGHT) * known + BRANCH_WEIGHT * jax.nn.log_softmax(looked.logits)
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)
    assert out.attention.shape == (2, 2, 2)  # of 40 pixels, halved four times

    def loss(params, x):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return jnp.square(model(x, Mode(train=True)).logits).sum()

    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    gradients = jax.jit(jax.grad(loss))(params, x)
    moved = {
        name for name in gradients if any(np.any(leaf) for leaf in jax.tree.leaves(gradients[name]))
    }
    assert moved == {"trainable_branch"}


def test_in_bfloat16_it_answers_nearly_as_in_float32():
    model, x = small(2, symmetries=2), site(2, SITES_PER_CHUNK + 1)
    logits = nnx.jit(lambda model, x: model(x, Mode(dtype=jnp.bfloat16)).logits)(model, x)
    np.testing.assert_allclose(logits, forward(model, x).logits, atol=0.02)


def test_eyes_see_the_share_that_is_cell_and_the_mean_of_every_channel():
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


def test_before_it_is_set_a_reduction_keeps_the_first_of_what_comes():
    np.testing.assert_array_equal(
        LinearReduction(5, 3)(jnp.arange(10.0).reshape(2, 5)), [[0, 1, 2], [5, 6, 7]]
    )
