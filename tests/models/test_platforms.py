"""What accelerators compute in place of what a CPU does is the same, at ties and negative scales too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax.models.attention import ConvBlock
from perturbjax.models.kernels.batch_norm import _one_pass, _two_passes
from perturbjax.models.layers import BatchNorm, Mode, max_pool

PLATFORMS = ("cuda", "tpu")


@pytest.fixture
def on(monkeypatch):
    """Have `platform_dependent` choose what a platform would run."""

    def choose(platform):
        def chosen(*args, default=None, **ways):
            return ways.get(platform, default)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)

    return choose


def tied(*shape, dtype=jnp.float32):
    """Few different values, so that most windows have several greatest."""
    return jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), dtype)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("side", [6, 7])
def test_a_pools_gradient_goes_to_the_first_of_equals_bit_for_bit(on, platform, side):
    x, weight = tied(2, side, side + 2, 3), jnp.arange(3.0) + 1

    def gradient(x):
        return jax.grad(lambda x: (max_pool(x) * weight).sum())(x)

    on("cpu")
    expected = gradient(x)
    on(platform)
    assert np.array_equal(gradient(x), expected)
    assert np.array_equal(
        max_pool(x),
        x[:, : side // 2 * 2, : (side + 2) // 2 * 2].reshape(2, side // 2, 2, -1, 2, 3).max((2, 4)),
    )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("turn_kernel", [True, False])
@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_a_block_and_its_gradients_are_the_cpus(on, platform, turn_kernel, side, dtype):
    block = ConvBlock(2, 4, rngs=nnx.Rngs(0))
    block.norm.scale[...] = jnp.array([1.0, -0.5, 2.0, -1.5])
    block.norm.mean[...] = jnp.array([0.3, -0.2, 0.0, 0.5])
    # Two passes and one part in the last digits, which must not decide a tie: x is exact in both dtypes.
    graphdef, state = nnx.split(block)
    x = tied(3, side, side, 2, dtype=dtype)
    weight = jnp.array([1.0, 1.0, 0.0])

    def loss(state, x):
        block = nnx.merge(graphdef, state, copy=True)
        mode = Mode(train=True, weight=weight, dtype=dtype)
        if turn_kernel:
            z = block(x, mode)
        else:
            z = block.norm.normalize_and_pool(
                block.conv.without_bias(x), mode, shift=block.conv.bias[...]
            )
        z = z.astype(jnp.float32)
        return (
            z * weight[:, None, None, None] * jnp.cos(jnp.arange(z.size).reshape(z.shape))
        ).sum(), nnx.state(block)

    def everything():
        params = nnx.filter_state(state, nnx.Param), nnx.filter_state(state, nnx.BatchStat)

        def value(p, x):
            return loss(nnx.merge_state(p, params[1]), x)

        (total, after), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(params[0], x)
        evaluated = nnx.merge(graphdef, state, copy=True)(x, Mode(dtype=dtype))
        return total, nnx.filter_state(after, nnx.BatchStat), gradients, evaluated

    on("cpu")
    expected = everything()
    on(platform)
    share = 3e-5 if dtype == jnp.float32 else 2e-2
    for got, wanted in zip(jax.tree.leaves(everything()), jax.tree.leaves(expected), strict=True):
        got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
        np.testing.assert_allclose(got, wanted, atol=share * max(np.abs(wanted).max(), 1e-3))


@pytest.mark.parametrize("far", [0.0, 10.0])
def test_one_pass_gives_the_statistics_of_two(far):
    """Ten deviations from the centre cost two digits of the variance."""
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (6, 33, 20, 5)), jnp.float32)
    weight = jnp.array([1.0, 1, 0, 1, 1, 1])
    two = _two_passes(x, weight, jnp.zeros(5), axis_name=None)
    one = _one_pass(x, weight, jnp.full(5, 3.0 + far), axis_name=None)
    np.testing.assert_allclose(one.mean, two.mean, rtol=1e-6)
    np.testing.assert_allclose(one.var, two.var, rtol=3e-7 if not far else 3e-5)
    assert float(one.count) == float(two.count)


def test_a_constant_channel_has_no_negative_variance():
    x = jnp.full((2, 4, 4, 3), 0.1, jnp.float32)
    assert (_one_pass(x, jnp.ones(2), jnp.full(3, 0.7), axis_name=None).var >= 0).all()


def test_only_a_tpu_asks_for_turned_channels(on):
    norm = BatchNorm(2)
    norm.scale[...] = jnp.array([1.0, -1.0])
    for platform, turn in (("cpu", [1, 1]), ("cuda", [1, 1]), ("tpu", [1, -1])):
        on(platform)
        assert norm.channel_signs().tolist() == turn
