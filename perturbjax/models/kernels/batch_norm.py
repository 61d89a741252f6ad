"""Batch normalisation with its gradient written out: nothing is kept but the input, and it is read as seldom as can be.

With x̂ = (x - mean) / √(var + ε), z = scale x̂ + bias and n the number of values that count, the gradient is
scale / √(var + ε) (dz - weight (Σ dz + x̂ Σ dz x̂) / n) (Ioffe & Szegedy 2015, section 3), where the sums run over
the whole batch and all devices, and `weight` is 0 for padding, which took no part in the statistics.

A CPU computes the variance from the mean, in a second pass over `x`. On accelerators, whose memory bounds the step, one
pass gives both: sums of `x` and of its square less a `centre` near the mean, lest the two cancel; the running mean is.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.kernels.max_pool import largest, max_pool, quarters, scatter, windows, winner
from perturbjax.models.mode import Mode


class Statistics(NamedTuple):
    """Of a batch: mean and biased variance a channel, and how many values a channel counted."""

    mean: Float[Array, " c"]
    var: Float[Array, " c"]
    count: Float[Array, ""]  # type: ignore[assignment]


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

    def __call__(
        self,
        x: Float[Array, "b *spatial c"],
        mode: Mode,
        *,
        shift: Float[Array, " c"] | None = None,
    ) -> Float[Array, "b *spatial c"]:
        """Normalise `x`, or `x + shift`: the bias of the convolution before, which a batch's mean takes away again."""
        if not mode.train:
            return self._by_running_statistics(x, shift)
        z, statistics = _normalise(
            x,
            self.scale[...],
            self.bias[...],
            _weight(x, mode),
            self._centre(),
            self.epsilon,
            mode.axis_name,
        )
        self._update(statistics, shift)
        return z

    def turn(self) -> Float[Array, " c"]:
        """-1 for channels that a TPU wants reversed before `pooled`, else 1.

        Normalising reverses the order of a channel whose scale is negative. A TPU's pool cannot do so on its way: it
        would write all of `x` once more. The convolution before can, by its kernel, at no cost.
        """
        return jax.lax.stop_gradient(
            jax.lax.platform_dependent(
                self.scale[...],
                tpu=lambda scale: jnp.where(scale < 0, -1.0, 1.0),
                default=jnp.ones_like,
            )
        )

    def pooled(
        self,
        x: Float[Array, "b h w c"],
        mode: Mode,
        *,
        shift: Float[Array, " c"] | None = None,
        turned: Float[Array, " c"] | None = None,
    ) -> Float[Array, "b h2 w2 c"]:
        """2×2 max-pooling of the normalised `x`, without ever holding the normalised `x`.

        Normalising keeps or reverses a channel's order, by the sign of its scale: so the winner is found before it.

        Args:
            x: what is normalised, times `turned`.
            mode: how the network runs.
            shift: as when called.
            turned: `turn()` where `x` was multiplied by it already; None where not.
        """
        if turned is None:
            turned = self.turn()
            x = x * turned.astype(x.dtype)
        if not mode.train:
            return max_pool(self._by_running_statistics(x * turned.astype(x.dtype), shift))
        z, (mean, var, count) = _normalise_and_pool(
            x,
            self.scale[...] * turned,
            self.bias[...],
            _weight(x, mode),
            self._centre() * turned,
            self.epsilon,
            mode.axis_name,
        )
        self._update(Statistics(mean * turned, var, count), shift)
        return z

    def _centre(self) -> Array:
        """Near the mean of what is normalised: less `shift` it would be nearer, at the cost of a GPU's kernel a layer.

        A bias before a normalisation has no gradient, so that it stays what it was drawn as, or decays.
        """
        return jax.lax.stop_gradient(self.mean[...])

    def _by_running_statistics(self, x: Array, shift: Array | None) -> Array:
        mean = self.mean[...] if shift is None else self.mean[...] - shift
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return (x * factor + (self.bias[...] - mean * factor)).astype(x.dtype)

    def _update(self, statistics: Statistics, shift: Array | None) -> None:
        mean, var, count = jax.lax.stop_gradient(statistics)
        mean = mean if shift is None else mean + jax.lax.stop_gradient(shift)
        unbiased = var * count / jnp.maximum(count - 1, 1)
        self.mean[...] += self.momentum * (mean - self.mean[...])
        self.var[...] += self.momentum * (unbiased - self.var[...])


def batch_statistics(x: Float[Array, "b *spatial c"], mode: Mode) -> Statistics:
    """Mean, biased variance and count of values a channel, in float32, without padding and over all devices."""
    return _statistics(x, _weight(x, mode), jnp.zeros(x.shape[-1]), mode.axis_name)


def _weight(x: Array, mode: Mode) -> Float[Array, " b"]:
    return jnp.ones(x.shape[0]) if mode.weight is None else mode.weight


def _total(x: Float[Array, "b *spatial c"]) -> Float[Array, "b c"]:
    """Sums over a record's positions, in float32. A row a record lets XLA's CPU loops share the work."""
    return x.astype(jnp.float32).sum(tuple(range(1, x.ndim - 1)))


def _weighted(sums: Float[Array, "b c"], weight: Float[Array, " b"]) -> Float[Array, " c"]:
    return (sums * weight[:, None]).sum(0)


def _reduce(values: Array, axis_name: str | None) -> Array:
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def _statistics(
    x: Float[Array, "b *spatial c"],
    weight: Float[Array, " b"],
    centre: Float[Array, " c"],
    axis_name: str | None,
) -> Statistics:
    two, one = (partial(passes, axis_name=axis_name) for passes in (_two_passes, _one_pass))
    return jax.lax.platform_dependent(x, weight, centre, cpu=two, default=one)


def _count(x: Array, weight: Array, axis_name: str | None) -> Float[Array, ""]:
    return _reduce(weight.sum() * (x[0, ..., 0].size), axis_name)


def _two_passes(
    x: Array, weight: Array, centre: Float[Array, " c"], *, axis_name: str | None
) -> Statistics:
    count = _count(x, weight, axis_name)
    mean = _reduce(_weighted(_total(x), weight), axis_name) / count
    squares = _total(jnp.square(x.astype(jnp.float32) - mean))
    return Statistics(mean, _reduce(_weighted(squares, weight), axis_name) / count, count)


def _one_pass(x: Array, weight: Array, centre: Array, *, axis_name: str | None) -> Statistics:
    return _from_sums(
        *_centred_sums([x], weight, centre), _count(x, weight, axis_name), centre, axis_name
    )


def _centred_sums(
    parts: list[Float[Array, "b *spatial c"]],
    weight: Float[Array, " b"],
    centre: Float[Array, " c"],
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Sums over equal parts of a batch of its values less `centre`, and of their squares."""
    centred = [part.astype(jnp.float32) - centre for part in parts]
    return _weighted(_total(reduce(add, centred)), weight), _weighted(
        _total(reduce(add, map(jnp.square, centred))), weight
    )


def _from_sums(
    first: Array, second: Array, count: Array, centre: Array, axis_name: str | None
) -> Statistics:
    first, second = (_reduce(sums, axis_name) / count for sums in (first, second))
    return Statistics(centre + first, jnp.maximum(second - jnp.square(first), 0), count)


def _affine(x: Array, scale: Array, bias: Array, statistics: Statistics, epsilon: float) -> Array:
    factor = scale * jax.lax.rsqrt(statistics.var + epsilon)
    return (x * factor + (bias - statistics.mean * factor)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalise(
    x: Float[Array, "b *spatial c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    weight: Float[Array, " b"],
    centre: Float[Array, " c"],
    epsilon: float,
    axis_name: str | None,
) -> tuple[Float[Array, "b *spatial c"], Statistics]:
    """`x` normalised by its batch, and that batch's statistics, through which no gradient flows."""
    statistics = _statistics(x, weight, centre, axis_name)
    return _affine(x, scale, bias, statistics, epsilon), statistics


def _normalise_forward(x, scale, bias, weight, centre, epsilon, axis_name):
    z, statistics = _normalise(x, scale, bias, weight, centre, epsilon, axis_name)
    return (z, statistics), (x, scale, weight, statistics)


def _normalise_backward(epsilon, axis_name, residuals, gradients):
    x, scale, weight, statistics = residuals
    dz = gradients[0].astype(jnp.float32)
    standard = (x.astype(jnp.float32) - statistics.mean) * jax.lax.rsqrt(statistics.var + epsilon)
    sums = _total(dz).sum(0), _total(dz * standard).sum(0)
    return _input_gradient(x, dz, sums, scale, weight, statistics, epsilon, axis_name)


_normalise.defvjp(_normalise_forward, _normalise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalise_and_pool(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    weight: Float[Array, " b"],
    centre: Float[Array, " c"],
    epsilon: float,
    axis_name: str | None,
) -> tuple[Float[Array, "b h2 w2 c"], Statistics]:
    """As `_normalise`, then 2×2 max-pooling."""
    return _normalise_and_pool_forward(x, scale, bias, weight, centre, epsilon, axis_name)[0]


def _normalise_and_pool_forward(x, scale, bias, weight, centre, epsilon, axis_name):
    cpu, tpu, gpu = (
        partial(way, axis_name=axis_name)
        for way in (_pool_by_passes, _pool_by_windows, _pool_at_once)
    )
    statistics, top, index = jax.lax.platform_dependent(
        x, scale, weight, centre, cpu=cpu, tpu=tpu, default=gpu
    )
    z = _affine(top, scale, bias, statistics, epsilon)
    return (z, statistics), (x, top, index, scale, weight, statistics)


def _sign(x: Array, scale: Array) -> Array:
    """By which the greatest value of a channel is the one whose normalised value is the greatest."""
    return jnp.where(scale < 0, -1, 1).astype(x.dtype)


def _upright(x: Array, scale: Array) -> Array:
    return jax.lax.platform_dependent(
        x, scale, tpu=lambda x, scale: x, default=lambda x, scale: x * _sign(x, scale)
    )


def _pool_by_passes(x, scale, weight, centre, *, axis_name):
    statistics = _two_passes(x, weight, centre, axis_name=axis_name)
    sign = _sign(x, scale)
    places = quarters(x * sign)
    return statistics, largest(places) * sign, winner(places)


def _pool_by_windows(x, scale, weight, centre, *, axis_name):
    """Of channels that `BatchNorm.turn` has made upright. The backward pass finds the winners again (`scatter`)."""
    top = windows(x, 2, 2)
    return _one_pass(x, weight, centre, axis_name=axis_name), top, jnp.zeros(top.shape, jnp.uint8)


def _pool_at_once(x, scale, weight, centre, *, axis_name):
    """Statistics and maxima from one reading of `x`; the backward pass, which reads `x` again, finds the winners."""
    sign = _sign(x, scale)
    rows, columns = (side // 2 * 2 for side in x.shape[1:3])
    places = [x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)]
    top = largest([place * sign for place in places]) * sign
    odd = (rows, columns) != x.shape[1:3]  # what the pool leaves out counts in the statistics
    sums = _centred_sums([x] if odd else places, weight, centre)
    # One kernel computes both, but only where they are wanted at the same time; and without the barrier the backward
    # pass would find the maxima in `x` again rather than read a quarter as much.
    sums, top = jax.lax.optimization_barrier((sums, top))
    return (
        _from_sums(*sums, _count(x, weight, axis_name), centre, axis_name),
        top,
        jnp.zeros(top.shape, jnp.uint8),
    )


def _normalise_and_pool_backward(epsilon, axis_name, residuals, gradients):
    x, top, index, scale, weight, statistics = residuals
    dz = gradients[0].astype(jnp.float32)
    # Only winners have a gradient, so the sums run over them alone.
    standard = (top.astype(jnp.float32) - statistics.mean) * jax.lax.rsqrt(statistics.var + epsilon)
    sums = _total(dz).sum(0), _total(dz * standard).sum(0)
    dz = scatter(_upright(x, scale), dz, index)
    return _input_gradient(x, dz, sums, scale, weight, statistics, epsilon, axis_name)


_normalise_and_pool.defvjp(_normalise_and_pool_forward, _normalise_and_pool_backward)


def _input_gradient(x, dz, sums, scale, weight, statistics, epsilon, axis_name):
    """Gradients of (x, scale, bias, weight, centre) from those of z and from this device's (Σ dz, Σ dz x̂)."""
    inverse = jax.lax.rsqrt(statistics.var + epsilon)
    total, correlated = (_reduce(s, axis_name) / statistics.count for s in sums)
    slope = correlated * inverse
    offset = total - slope * statistics.mean
    counted = weight.reshape(-1, *[1] * (x.ndim - 1))
    dx = scale * inverse * (dz - counted * (offset + slope * x.astype(jnp.float32)))
    return dx.astype(x.dtype), sums[1], sums[0], jnp.zeros_like(weight), jnp.zeros_like(scale)
