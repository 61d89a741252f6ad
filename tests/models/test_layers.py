"""Layers equal their plain definitions in the forward and the backward pass."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from perturbjax.models.attention import ConvBlock
from perturbjax.models.layers import (
    BatchNorm,
    Mode,
    conv2d,
    draw_uniform,
    leaky_relu,
    max_pool,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5,), (3, 3, 2, 64), (64, 128)])
def test_draw_uniform_draws_the_numbers_of_jax(shape):
    """64 · 128 numbers are more than the shortest vector, 4,096."""
    key = jax.random.key(3)
    expected = jax.random.uniform(key, shape, minval=-0.3, maxval=0.3)
    np.testing.assert_array_equal(draw_uniform(key, shape, 0.3), expected)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def assert_near(ours, theirs, relative: float) -> None:
    """Check that values differ by at most a fraction of the maximum."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


#: (batch, height, width, inputs, outputs, kernel, stride, padding, groups)
CONVOLUTIONS = {
    "3x3": (6, 8, 8, 16, 24, 3, 1, 1, 1),
    "odd sides": (5, 9, 7, 16, 8, 3, 1, 1, 1),
    "5x5 without padding": (2, 9, 6, 17, 4, 5, 1, 0, 1),
    "wide padding": (3, 5, 4, 16, 4, 3, 1, 2, 1),
    "larger than the image": (3, 2, 2, 16, 4, 3, 1, 1, 1),
    "many positions": (3, 33, 32, 16, 4, 3, 1, 1, 1),
    "many positions, two channels": (3, 33, 32, 2, 4, 3, 1, 1, 1),
    "1x1": (3, 5, 4, 32, 4, 1, 1, 0, 1),
    "1x1, many positions": (3, 48, 48, 32, 16, 1, 1, 0, 1),
    "one channel": (3, 8, 8, 1, 4, 3, 1, 1, 1),
    "stride": (3, 9, 8, 16, 4, 3, 2, 1, 1),
    "7x7 with stride": (2, 16, 15, 3, 4, 7, 2, 3, 1),
    "groups": (3, 6, 6, 32, 16, 3, 1, 1, 4),
    "depthwise with stride": (3, 7, 7, 16, 16, 5, 2, 2, 16),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)], ids=["float32", "bf16"]
)
def test_conv2d_and_gradients_match_torch(case, dtype, tolerance):
    b, h, w, i, o, size, stride, padding, groups = CONVOLUTIONS[case]
    x, kernel = normal(b, h, w, i), normal(size, size, i // groups, o)
    their_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    their_kernel = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    theirs = torch.nn.functional.conv2d(
        their_x, their_kernel, stride=stride, padding=padding, groups=groups
    )
    gradient = RNG.normal(size=theirs.shape).astype(np.float32)
    theirs.backward(torch.tensor(gradient))

    @jax.jit
    def forward_and_backward(x, kernel, gradient):
        y, back = jax.vjp(
            lambda x, k: conv2d(x, k, stride=stride, padding=padding, groups=groups), x, kernel
        )
        return y, *back(gradient.astype(y.dtype))

    y, dx, dkernel = forward_and_backward(
        jnp.asarray(x, dtype), kernel, gradient.transpose(0, 2, 3, 1)
    )
    assert y.dtype == dtype and dkernel.dtype == jnp.float32
    assert_near(y, theirs.detach().numpy().transpose(0, 2, 3, 1), tolerance)
    assert_near(dx, their_x.grad.numpy().transpose(0, 2, 3, 1), tolerance)
    assert_near(dkernel, their_kernel.grad.numpy().transpose(2, 3, 1, 0), tolerance)


def plain_norm(x, scale, bias, weight, shift):
    """Batch normalization by its definition, differentiated by JAX."""
    x = x + shift
    weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    axes = tuple(range(x.ndim - 1))
    count = (weight * jnp.ones_like(x[..., :1])).sum()
    mean = (weight * x).sum(axes) / count
    var = (weight * (x - mean) ** 2).sum(axes) / count
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def make_norm(features: int) -> BatchNorm:
    """Create a BatchNorm with positive and negative scales."""
    norm = BatchNorm(features)
    norm.scale[...] = jnp.linspace(-1.5, 1.0, features)
    norm.bias[...] = jnp.linspace(-0.5, 0.5, features)
    return norm


@pytest.mark.parametrize("pooled", [False, True], ids=["norm", "norm and pool"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "with padding"])
@pytest.mark.parametrize("size", [6, 7])
def test_batch_norm_gradients_match_definition(pooled, padded, size):
    norm, x = make_norm(5), jnp.asarray(normal(4, size, size, 5))
    shift = jnp.asarray(normal(5))
    weight = jnp.array([1.0, 1.0, 0.0, 1.0]) if padded else jnp.ones(4)
    mode = Mode(train=True, weight=weight if padded else None)
    graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    @jax.jit
    def ours(x, scale, bias):
        layer = nnx.merge(graphdef, params, stats, copy=True)
        layer.scale[...], layer.bias[...] = scale, bias
        return (
            layer.normalize_and_pool(x, mode, shift=shift)
            if pooled
            else layer(x, mode, shift=shift)
        )

    @jax.jit
    def theirs(x, scale, bias):
        z = plain_norm(x, scale, bias, weight, shift)
        return max_pool(z) if pooled else z

    y, back = jax.vjp(ours, x, norm.scale[...], norm.bias[...])
    expected, expected_back = jax.vjp(theirs, x, norm.scale[...], norm.bias[...])
    assert_near(y, expected, 1e-5)
    gradient = jnp.asarray(normal(*y.shape))
    for actual, expected_leaf in zip(back(gradient), expected_back(gradient), strict=True):
        assert_near(actual, expected_leaf, 2e-5)


def test_normalize_and_pool_matches_pooling_after_norm_in_evaluation():
    norm, x = make_norm(3), jnp.asarray(normal(2, 7, 6, 3))
    assert_near(norm.normalize_and_pool(x, Mode()), max_pool(norm(x, Mode())), 1e-6)


def test_running_statistics_include_convolution_bias_and_exclude_padding():
    x, shift = normal(3, 4, 4, 2) + 3, np.array([5.0, -2.0], np.float32)
    norm, pooling, expected = BatchNorm(2), BatchNorm(2), torch.nn.BatchNorm2d(2)
    mode = Mode(train=True, weight=jnp.array([1.0, 1.0, 0.0]))
    norm(jnp.asarray(x), mode, shift=jnp.asarray(shift))
    pooling.normalize_and_pool(jnp.asarray(x), mode, shift=jnp.asarray(shift))
    expected(torch.tensor((x + shift)[:2].transpose(0, 3, 1, 2)))
    for layer in (norm, pooling):
        assert_near(layer.mean[...], expected.running_mean.numpy(), 1e-6)
        assert_near(layer.var[...], expected.running_var.numpy(), 1e-6)


def test_normalize_and_pool_gradient_goes_to_first_maximum():
    """All values of a window are equal, as in a mask's background."""
    graphdef, state = nnx.split(BatchNorm(1))
    x = jnp.zeros((1, 4, 4, 1)).at[0, 2:, 2:].set(1.0)

    def first_window(x):
        return nnx.merge(graphdef, state, copy=True).normalize_and_pool(x, Mode(train=True))[
            0, 0, 0, 0
        ]

    gradient = jax.grad(first_window)(x)[0, :2, :2, 0]
    assert gradient[0, 0] > 0 and gradient[0, 0] > 10 * jnp.abs(gradient.ravel()[1:]).max()
    np.testing.assert_allclose(gradient.ravel()[1:], gradient[0, 1])


def test_conv_block_in_bfloat16_matches_float32():
    block, x = ConvBlock(16, 8, rngs=nnx.Rngs(0)), jnp.asarray(normal(4, 8, 8, 16))
    graphdef, params, stats = nnx.split(block, nnx.Param, nnx.BatchStat)
    direction = normal(4, 4, 4, 8)

    def gradients(dtype):
        def loss(params):
            block = nnx.merge(graphdef, params, stats, copy=True)
            y = block(jnp.asarray(x, dtype), Mode(train=True, dtype=dtype))
            assert y.dtype == dtype
            return (y.astype(jnp.float32) * direction).sum()

        return jax.jit(jax.grad(loss))(params)

    half, full = gradients(jnp.bfloat16), gradients(jnp.float32)
    assert_near(half["conv"]["kernel"][...], full["conv"]["kernel"][...], 0.1)
    assert_near(half["norm"]["scale"][...], full["norm"]["scale"][...], 0.1)
    assert_near(full["conv"]["bias"][...], np.zeros(8), 0)


def test_conv_block_activation_after_pooling_is_equivalent():
    block, x = ConvBlock(2, 4, rngs=nnx.Rngs(0)), jnp.asarray(normal(2, 6, 6, 2))
    block.norm.scale[...] = jnp.array([1.0, -1.0, 0.5, -2.0])
    in_order = max_pool(leaky_relu(block.norm(block.conv(x), Mode())))
    assert_near(block(x, Mode()), in_order, 1e-5)


TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from perturbjax.models.attention import ConvBlock
from perturbjax.models.layers import Mode

block = ConvBlock(16, 4, rngs=nnx.Rngs(0))
graphdef, params, stats = nnx.split(block, nnx.Param, nnx.BatchStat)
rng = np.random.default_rng(0)
x, direction = (rng.normal(size=s).astype(np.float32) for s in ((4, 6, 6, 16), (4, 3, 3, 4)))
weight = np.array([1, 1, 1, 0], np.float32)

def gradients(x, direction, weight, axis_name=None):
    def loss(params, x):
        block = nnx.merge(graphdef, params, stats, copy=True)
        y = block(x, Mode(train=True, weight=weight, axis_name=axis_name))
        return (y * direction * weight[:, None, None, None]).sum(), nnx.state(block, nnx.BatchStat)
    (dparams, dx), new = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return (jax.lax.psum(dparams, axis_name) if axis_name else dparams), dx, new

parts = [a.reshape(2, 2, *a.shape[1:]) for a in (x, direction, weight)]
dparams, dx, new = jax.pmap(lambda *a: gradients(*a, axis_name="b"), "b")(*parts)
one = jax.jit(gradients)(x, direction, weight)
np.testing.assert_allclose(np.asarray(dx).reshape(x.shape), one[1], atol=1e-5)
for ours, theirs in zip(jax.tree.leaves((dparams, new)), jax.tree.leaves((one[0], one[2])),
strict=True):
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours[0], ours[1])
assert np.abs(one[1]).max() > 0.01 and np.abs(one[1][3]).max() == 0
print("agree")
"""


def test_conv_block_gradients_under_pmap_match_one_device():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "agree" in done.stdout, done.stderr[-3000:]
