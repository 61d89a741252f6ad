"""Convolutions computed by matrix products match XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models.kernels import convolution as conv
from perturbjax.models.kernels import matrix_products as products


@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1), (3, 0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_convolve_matches_xla_convolution(size, padding, dtype, tolerance):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 7, 10, 24)), dtype)
    kernel = jnp.asarray(random.normal(size=(size, size, 24, 5)), dtype)
    ours = products.convolve(x, kernel, padding=padding)
    theirs = conv._plain(x.astype(jnp.float32), kernel.astype(jnp.float32), padding)
    assert ours.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), theirs, atol=tolerance * float(jnp.abs(theirs).max())
    )


def test_pointwise_conv2d_gradients_match_xla_convolution():
    random = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(random.normal(size=s), jnp.float32) for s in ((2, 6, 5, 32), (1, 1, 32, 8))
    )
    assert products.is_faster(x.dtype, kernel.shape)
    ours = jax.jit(jax.value_and_grad(lambda x, k: (conv.conv2d(x, k) ** 2).sum(), (0, 1)))(
        x, kernel
    )
    theirs = jax.jit(jax.value_and_grad(lambda x, k: (conv._plain(x, k, 0) ** 2).sum(), (0, 1)))(
        x, kernel
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_conv2d_gradient_stores_views_of_one_layer_at_a_time():
    side, channels = 32, 32

    def temporary_bytes(layers: int) -> int:
        def loss(kernels, x):
            for kernel in kernels:
                x = jax.nn.relu(conv.conv2d(x, kernel, padding=1))
            return (x**2).sum()

        kernels = [jnp.ones((3, 3, channels, channels))] * layers
        step = jax.jit(jax.grad(loss)).lower(kernels, jnp.ones((8, side, side, channels)))
        return step.compile().memory_analysis().temp_size_in_bytes

    activations = 4 * 8 * side * side * channels
    # The output of each layer is stored. Its shifted views would take nine times as much.
    assert (temporary_bytes(9) - temporary_bytes(3)) / 6 < 3 * activations
