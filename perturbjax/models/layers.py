"""Layers of all networks.

Images are NHWC, kernels HWIO. Parameters and statistics are float32, whatever the dtype of
activations. Strided convolutions pad symmetrically, as in PyTorch (JAX's `SAME` does not).
BatchNorm keeps the unbiased running variance, as in PyTorch. Its batch statistics can exclude
padding (`Mode.weight`) and span devices (`Mode.axis_name`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from perturbjax.models.kernels.batch_norm import BatchNorm, batch_statistics
from perturbjax.models.kernels.convolution import conv2d
from perturbjax.models.kernels.max_pool import max_pool
from perturbjax.models.mode import Mode, Outputs

__all__ = [
    "BatchNorm",
    "Conv",
    "Dense",
    "LayerNorm",
    "Mode",
    "Outputs",
    "ShapeRngs",
    "batch_statistics",
    "classify",
    "conv2d",
    "dropout",
    "leaky_relu",
    "max_pool",
]

#: Epsilon of LayerNorm in the published vision transformers (Segment Anything, DINOv2).
NORM_EPSILON = 1e-6


class ShapeRngs(nnx.Rngs):
    """Random numbers for networks without values (`nnx.eval_shape`).

    Tracing the random initialization of each layer would take a second.
    """

    def __init__(self) -> None:
        super().__init__(0)


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> nnx.Param:
    if isinstance(rngs, ShapeRngs):
        return nnx.Param(jnp.zeros(shape))
    return nnx.Param(draw_uniform(rngs.params(), shape, bound))


def draw_uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> Float[Array, "*shape"]:
    """Draw the numbers of `jax.random.uniform` in ±bound, with few compilations.

    JAX compiles a program for each shape, which takes a second for the kernel of a convolution.
    A number depends only on the key and its position in row-major order. Therefore a longer
    vector starts with the same numbers, and a few lengths serve all shapes.
    """
    size, length = math.prod(shape), 4096
    while length < size:
        length *= 4
    numbers = jax.random.uniform(key, (length,), minval=-bound, maxval=bound)
    return _first_numbers(numbers, shape)


@partial(jax.jit, static_argnums=1)
def _first_numbers(numbers: Float[Array, " n"], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    return numbers[: math.prod(shape)].reshape(shape)


class Conv(nnx.Module):
    """Convolution with PyTorch's default initialization.

    Kernel and bias are uniform in ±1/sqrt(fan in). The default padding keeps height and width
    at stride 1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        use_bias: bool = True,
        use_onednn: bool = False,
        rngs: nnx.Rngs,
    ):
        # PyTorch's Kaiming initialization with a = √5 is this uniform distribution.
        bound = (size * size * inputs // groups) ** -0.5
        self.kernel = _uniform(rngs, (size, size, inputs // groups, outputs), bound)
        self.bias = _uniform(rngs, (outputs,), bound) if use_bias else None
        self.stride, self.groups, self.use_onednn = stride, groups, use_onednn
        self.padding = size // 2 if padding is None else padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = self.without_bias(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def without_bias(
        self, x: Float[Array, "b h w i"], signs: Float[Array, " o"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Convolve without adding the bias.

        A following BatchNorm takes the bias as its `shift`, and its `channel_signs` as `signs`:
        factors of the output channels, which are applied to the kernel.
        """
        # The last axis of the kernel is that of the output channels.
        kernel = self.kernel[...] if signs is None else self.kernel[...] * signs
        return conv2d(
            x,
            kernel,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            use_onednn=self.use_onednn,
        )


class Dense(nnx.Module):
    """Fully connected layer with PyTorch's default initialization, as in `Conv`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = _uniform(rngs, (inputs, outputs), inputs**-0.5)
        self.bias = _uniform(rngs, (outputs,), inputs**-0.5)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, computed in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        # The mean is subtracted first: more accurate than the difference of E[x²] and E[x]².
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + NORM_EPSILON)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def leaky_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """LeakyReLU with PyTorch's default slope, 0.01."""
    return jnp.where(x > 0, x, 0.01 * x)


def dropout(x: Float[Array, "b d"], rate: float, mode: Mode) -> Float[Array, "b d"]:
    """Apply dropout whose mask depends on each record's key only.

    Returns `x` unchanged in evaluation, without keys, or at rate 0.
    """
    if not mode.train or mode.keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(mode.keys)
    # Division by 1 - rate leaves the expected value unchanged.
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def classify(
    head: Callable[[Array], Array], features: Float[Array, "b d"], rate: float, mode: Mode
) -> Outputs:
    """Apply dropout and the last layer to features. Logits are float32."""
    logits = head(dropout(features, rate, mode).astype(mode.dtype))
    return Outputs(logits.astype(jnp.float32), features)
