"""Convolutions by oneDNN match XLA's, in training and in frozen networks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax import models
from perturbjax.models.kernels import convolution as conv
from perturbjax.models.kernels import onednn
from perturbjax.models.layers import BatchNorm

installed = pytest.mark.skipif(onednn.library() is None, reason="needs the extra onednn")


@installed
@pytest.mark.parametrize("shape", [(2, 7, 10, 24, 5, 3, 1), (3, 8, 9, 1, 32, 3, 0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_conv2d_and_gradients_match_xla(shape, dtype, tolerance):
    batch, height, width, inputs, outputs, size, padding = shape
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, height, width, inputs)), dtype)
    kernel = jnp.asarray(random.normal(size=(size, size, inputs, outputs)), dtype)

    def loss(convolve):
        squares = jax.value_and_grad(
            lambda *args: (convolve(*args).astype(jnp.float32) ** 2).sum(), (0, 1)
        )
        return jax.tree.leaves(jax.jit(squares)(x, kernel))

    ours = loss(lambda x, kernel: conv.conv2d(x, kernel, padding=padding))
    theirs = loss(lambda x, kernel: conv._plain(x, kernel, padding))
    for one, other in zip(ours, theirs, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def calls(function) -> int:
    program = jax.jit(function).lower(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4)))
    return program.as_text().count("stablehlo.custom_call @perturbjax_onednn")


def convolve(x, kernel):
    return conv.conv2d(x, kernel, padding=1).sum()


@installed
def test_only_training_calls_onednn():
    assert calls(convolve) == 0
    assert calls(jax.value_and_grad(convolve, (0, 1))) == 3


def test_training_without_onednn_uses_xla(monkeypatch):
    monkeypatch.setattr(onednn, "library", lambda: None)
    assert calls(jax.grad(convolve)) == 0


@installed
def test_parallel_branches_give_the_same_gradients_in_every_step():
    # Without a lock around oneDNN half of these steps differed.
    network = models.create("attention", classes=4, channels=1, dropout=0.0, seed=0)
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    x = jnp.asarray(np.random.default_rng(0).random((16, 32, 32, 2)), jnp.float32)

    def loss(params):
        logits = nnx.merge(graphdef, params, stats, copy=True)(x, models.Mode(train=True)).logits
        return jax.nn.logsumexp(logits, axis=-1).sum()

    step = jax.jit(jax.grad(loss))
    first = step(params)
    for _ in range(30):
        chex.assert_trees_all_equal(step(params), first)


@installed
@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_lite0"])
@pytest.mark.parametrize("padding", ["symmetric", "same", "static"])
def test_frozen_efficientnet_matches_xla(name, padding):
    network = models.BACKBONES[name].network(classes=2, inputs=3, padding=padding, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 65, 48, 3)), jnp.float32)
    batch_statistics(network, x)
    fast = compile_maps(network, models.Mode(use_onednn=True), x)
    plain = compile_maps(network, models.Mode(), x)
    assert "perturbjax_onednn_activated" in fast.as_text()
    assert "perturbjax_onednn" not in plain.as_text()
    for one, other in zip(fast(x), plain(x), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def batch_statistics(network, x):
    """Give every BatchNorm the statistics of a batch, and random scales and biases."""
    nnx.jit(lambda network: network(x, models.Mode(train=True)))(network)
    random = np.random.default_rng(0)
    for _, layer in nnx.iter_graph(network):
        if isinstance(layer, BatchNorm):
            for values in (layer.scale, layer.bias):
                values[...] = jnp.asarray(random.uniform(-1, 1, values.shape), jnp.float32)


def compile_maps(network, mode, x):
    graphdef, state = nnx.split(network)
    maps = jax.jit(lambda x: nnx.merge(graphdef, state, copy=True).stage_maps(x, mode))
    return maps.lower(x).compile()


@installed
@pytest.mark.parametrize("options", [{"train": True}, {"dtype": jnp.bfloat16, "train": True}])
def test_training_does_not_use_the_form_without_gradients(options):
    network = models.BACKBONES["efficientnet_lite0"].network(classes=2, inputs=3, rngs=nnx.Rngs(0))
    mode = models.Mode(use_onednn=True, **options)
    x = jnp.zeros((2, 32, 32, 3))
    assert "onednn_activated" not in compile_maps(network, mode, x).as_text()


@installed
def test_failure_in_onednn_raises():
    images = jnp.ones((1, 8, 8, 4), jnp.float16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="perturbjax_onednn_forward: KeyError"):
        jax.block_until_ready(
            onednn.convolve(images, jnp.ones((3, 3, 4, 4), jnp.float16), padding=1)
        )
