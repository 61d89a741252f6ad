"""The forms of kernels for accelerators equal those for CPUs, also at ties and negative scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax.models.attention import ConvBlock
from perturbjax.models.kernels.batch_norm import _one_pass, _two_passes
from perturbjax.models.layers import BatchNorm, Mode, max_pool

pytestmark = pytest.mark.full

PLATFORMS = ("cuda", "tpu")


@pytest.fixture
def run_on(monkeypatch):
    """Let `platform_dependent` choose the form of a given platform."""

    def choose(platform):
        def select(*args, default=None, **forms):
            return forms.get(platform, default)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", select)

    return choose


def tied(*shape, dtype=jnp.float32):
    """Return few distinct values, so that most windows have several maxima."""
    return jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), dtype)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_gradient_goes_to_first_maximum_on_all_platforms(run_on, platform, size):
    x, weight = tied(2, size, size + 2, 3), jnp.arange(3.0) + 1

    def gradient(x):
        return jax.grad(lambda x: (max_pool(x) * weight).sum())(x)

    run_on("cpu")
    expected = gradient(x)
    run_on(platform)
    assert np.array_equal(gradient(x), expected)
    assert np.array_equal(
        max_pool(x),
        x[:, : size // 2 * 2, : (size + 2) // 2 * 2].reshape(2, size // 2, 2, -1, 2, 3).max((2, 4)),
    )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("use_signs", [True, False])
@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_conv_block_gradients_match_cpu(run_on, platform, use_signs, size, dtype):
    block = ConvBlock(2, 4, rngs=nnx.Rngs(0))
    block.norm.scale[...] = jnp.array([1.0, -0.5, 2.0, -1.5])
    block.norm.mean[...] = jnp.array([0.3, -0.2, 0.0, 0.5])
    # One and two passes differ in the last digits, which must not decide ties: x is exact.
    graphdef, state = nnx.split(block)
    x = tied(3, size, size, 2, dtype=dtype)
    weight = jnp.array([1.0, 1.0, 0.0])

    def loss(state, x):
        block = nnx.merge(graphdef, state, copy=True)
        mode = Mode(train=True, weight=weight, dtype=dtype)
        if use_signs:
            z = block(x, mode)
        else:
            z = block.norm.normalize_and_pool(
                block.conv.without_bias(x), mode, shift=block.conv.bias[...]
            )
        z = z.astype(jnp.float32)
        return (
            z * weight[:, None, None, None] * jnp.cos(jnp.arange(z.size).reshape(z.shape))
        ).sum(), nnx.state(block)

    def compute_all():
        params = nnx.filter_state(state, nnx.Param), nnx.filter_state(state, nnx.BatchStat)

        def value(p, x):
            return loss(nnx.merge_state(p, params[1]), x)

        (total, after), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(params[0], x)
        evaluated = nnx.merge(graphdef, state, copy=True)(x, Mode(dtype=dtype))
        return total, nnx.filter_state(after, nnx.BatchStat), gradients, evaluated

    run_on("cpu")
    expected = compute_all()
    run_on(platform)
    tolerance = 3e-5 if dtype == jnp.float32 else 2e-2
    for actual, expected_leaf in zip(
        jax.tree.leaves(compute_all()), jax.tree.leaves(expected), strict=True
    ):
        actual, expected_leaf = (np.asarray(a, np.float32) for a in (actual, expected_leaf))
        np.testing.assert_allclose(
            actual, expected_leaf, atol=tolerance * max(np.abs(expected_leaf).max(), 1e-3)
        )


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_one_pass_statistics_match_two_passes(offset):
    """A center ten standard deviations away costs two digits of the variance."""
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (6, 33, 20, 5)), jnp.float32)
    weight = jnp.array([1.0, 1, 0, 1, 1, 1])
    two = _two_passes(x, weight, jnp.zeros(5), axis_name=None)
    one = _one_pass(x, weight, jnp.full(5, 3.0 + offset), axis_name=None)
    np.testing.assert_allclose(one.mean, two.mean, rtol=1e-6)
    np.testing.assert_allclose(one.var, two.var, rtol=3e-7 if not offset else 3e-5)
    assert float(one.count) == float(two.count)


def test_one_pass_variance_of_constant_channel_is_not_negative():
    x = jnp.full((2, 4, 4, 3), 0.1, jnp.float32)
    assert (_one_pass(x, jnp.ones(2), jnp.full(3, 0.7), axis_name=None).var >= 0).all()


def test_channel_signs_negate_on_tpu_only(run_on):
    norm = BatchNorm(2)
    norm.scale[...] = jnp.array([1.0, -1.0])
    for platform, signs in (("cpu", [1, 1]), ("cuda", [1, 1]), ("tpu", [1, -1])):
        run_on(platform)
        assert norm.channel_signs().tolist() == signs
