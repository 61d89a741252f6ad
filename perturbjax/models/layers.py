"""The layers every network here is made of.

Images are NHWC; kernels are HWIO. Parameters and statistics are float32 whatever the activations are computed in.
Strided convolutions pad symmetrically, as torch does (JAX's `SAME` does not). BatchNorm's running variance is the
unbiased one, as in torch, and its batch statistics can leave padding out (`Mode.weight`) and span devices
(`Mode.axis_name`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

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
    "batch_statistics",
    "conv2d",
    "dropout",
    "leaky_relu",
    "max_pool",
]

#: That of the vision transformers that were published (Segment Anything, DINOv2).
NORM_EPSILON = 1e-6


class Conv(nnx.Module):
    """A convolution with torch's default initialisation (uniform in ±1/sqrt(fan in), kernel and bias)."""

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
        rngs: nnx.Rngs,
    ):
        shape = (size, size, inputs // groups, outputs)
        bound = (size * size * inputs // groups) ** -0.5
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )
        self.bias = (
            nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))
            if use_bias
            else None
        )
        self.stride, self.groups = stride, groups
        self.padding = size // 2 if padding is None else padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = self.unbiased(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def unbiased(
        self, x: Float[Array, "b h w i"], turn: Float[Array, " o"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """The convolution alone: for a normalisation that takes the bias into its own (`BatchNorm`'s `shift`).

        `turn` (`BatchNorm.turn`) multiplies the output's channels, by way of the kernel.
        """
        kernel = self.kernel[...] if turn is None else self.kernel[...] * turn
        return conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)


class Dense(nnx.Module):
    """A fully connected layer with torch's default initialisation."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        bound = inputs**-0.5
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), (inputs, outputs), minval=-bound, maxval=bound)
        )
        self.bias = nnx.Param(
            jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound)
        )

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Each token to mean 0 and deviation 1, then scaled and shifted; computed in float32.

    `x` may have any number of axes before the last, along which values are normalised."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + NORM_EPSILON)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def leaky_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """LeakyReLU with torch's default slope, 0.01."""
    return jnp.where(x > 0, x, 0.01 * x)


def dropout(x: Float[Array, "b d"], rate: float, mode: Mode) -> Float[Array, "b d"]:
    """Dropout whose mask depends on each record's key alone. Without keys, or in evaluation, it does nothing."""
    if not mode.train or mode.keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(mode.keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
