"""The layers every network here is made of.

Images are NHWC; kernels are HWIO. Parameters and statistics are float32 whatever the activations are computed in.
Strided convolutions pad symmetrically, as torch does (JAX's `SAME` does not). BatchNorm's running variance is the
unbiased one, as in torch, and its batch statistics can leave padding out (`Mode.weight`) and span devices
(`Mode.axis_name`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a forward pass is run. The default is evaluation.

    Attributes:
        train: batch statistics and dropout instead of running statistics and none.
        weight: (B,) float, 1 for a site and 0 for padding; None counts all.
        keys: (B,) PRNG keys, one a record, for dropout: the mask then depends on the record, not on its place.
        axis_name: the mapped axis over which batch statistics are averaged, under `pmap`.
        dtype: what activations are computed in.
    """

    train: bool = False
    weight: Float[Array, " b"] | None = None
    keys: Array | None = None
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    def frozen(self) -> Mode:
        """The same pass with running statistics and no dropout: for a backbone that is not being trained."""
        return dataclasses.replace(self, train=False)


class Outputs(NamedTuple):
    """What every network returns."""

    logits: Float[Array, "b classes"]
    features: Float[Array, "b d"]


def conv2d(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i_per_group o"], *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """Convolution (cross-correlation, as in torch), symmetrically padded by `padding` pixels, in the dtype of `x`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def max_pool(x: Float[Array, "b h w c"], window: int = 2, stride: int = 2, padding: int = 0) -> Float[Array, "b h2 w2 c"]:
    """Max-pooling; a remainder at the right and bottom is dropped, as in torch."""
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        [(0, 0), (padding, padding), (padding, padding), (0, 0)],
    )


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
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound)) if use_bias else None
        self.stride, self.groups = stride, groups
        self.padding = size // 2 if padding is None else padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = conv2d(x, self.kernel[...], stride=self.stride, padding=self.padding, groups=self.groups)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Dense(nnx.Module):
    """A fully connected layer with torch's default initialisation."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        bound = inputs**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (inputs, outputs), minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last.

    `momentum` is torch's: the share of the new statistics (torch's 0.1 is Flax's 0.9).
    """

    def __init__(self, features: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x: Float[Array, "b *spatial c"], mode: Mode) -> Float[Array, "b *spatial c"]:
        if mode.train:
            mean, var, count = batch_statistics(x, mode)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            self.mean[...] += self.momentum * (mean - self.mean[...])
            self.var[...] += self.momentum * (unbiased - self.var[...])
        else:
            mean, var = self.mean[...], self.var[...]
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return (x * factor + (self.bias[...] - mean * factor)).astype(x.dtype)


def batch_statistics(
    x: Float[Array, "b *spatial c"], mode: Mode
) -> tuple[Float[Array, " c"], Float[Array, " c"], Float[Array, ""]]:
    """Mean, biased variance and count of values a channel, in float32, without padding and over all devices."""
    weight = jnp.ones(len(x)) if mode.weight is None else mode.weight
    spatial = tuple(range(1, x.ndim - 1))
    shaped = weight.reshape(-1, *[1] * (x.ndim - 1))
    count = weight.sum() * (x[0, ..., 0].size)
    x = x.astype(jnp.float32)
    total = (x * shaped).sum((0, *spatial))
    if mode.axis_name is not None:
        count, total = jax.lax.psum((count, total), mode.axis_name)
    mean = total / count
    squares = (jnp.square(x - mean) * shaped).sum((0, *spatial))
    if mode.axis_name is not None:
        squares = jax.lax.psum(squares, mode.axis_name)
    return mean, squares / count, count


def leaky_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """LeakyReLU with torch's default slope, 0.01."""
    return jnp.where(x > 0, x, 0.01 * x)


def dropout(x: Float[Array, "b d"], rate: float, mode: Mode) -> Float[Array, "b d"]:
    """Dropout whose mask depends on each record's key alone. Without keys, or in evaluation, it does nothing."""
    if not mode.train or mode.keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(mode.keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
