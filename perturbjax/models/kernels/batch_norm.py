"""Batch normalization with an explicit gradient, also fused with 2×2 max-pooling.

With x̂ = (x - mean) / √(var + ε), z = scale x̂ + bias and n the number of counted values, the
gradient (Ioffe & Szegedy 2015, arXiv:1502.03167, section 3) is

    dx = scale / √(var + ε) (dz - weight (Σ dz + x̂ Σ dz x̂) / n)

The sums run over the whole batch and all devices. `weight` is 0 for padding, which is excluded
from the statistics. Only the input is stored for the backward pass, and x̂ is recomputed.

Statistics. A CPU computes mean and variance in two passes over `x`. On accelerators memory
bandwidth limits the step, so one pass computes Σ (x - c) and Σ (x - c)². The center c is the
running mean; without it the two terms of the variance nearly cancel.

Pooling. Normalization keeps or reverses the order of a channel's values, by the sign of its
scale. The pool can therefore run before the normalization, on `x`, and the normalized full-size
array is never written. Each platform has its own form:

    CPU  two passes, then maxima. Training steps are 2 to 2.6 times as fast
         as with plain JAX layers (all kernels of this package together).
    GPU  statistics and maxima from one read of `x`.
         With the max-pool gradient: 5.51 → 4.00 GB per step (H100, compiled, bf16).
    TPU  channels of negative scale are negated by the previous convolution's kernel
         (`channel_signs`), so that convolution and both sums are one fusion: 15.7 → 11.0 M
         cycles per step (v5e, compiled, bf16).

The tables are in docs/performance.md.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.kernels.max_pool import (
    max_2x2,
    max_pool,
    scatter_gradient,
    split_2x2,
    window_max,
)
from perturbjax.models.mode import Mode


class Statistics(NamedTuple):
    """Mean and biased variance per channel, and the number of values per channel."""

    mean: Float[Array, " c"]
    var: Float[Array, " c"]
    count: Float[Array, ""]  # type: ignore[assignment]


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last.

    `momentum` is PyTorch's: the weight of the new statistics (0.1 there is 0.9 in Flax).
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
        """Normalize `x + shift`.

        `shift` is the bias of the previous convolution. Batch statistics cancel it, so it is
        never added to `x`; only the running mean includes it.
        """
        if not mode.train:
            return self._by_running_statistics(x, shift)
        scale, bias, weight = self.scale[...], self.bias[...], _weight(x, mode)
        z, statistics = _normalize(
            x, scale, bias, weight, self._center(), self.epsilon, mode.axis_name
        )
        self._update(statistics, shift)
        return z

    def channel_signs(self) -> Float[Array, " c"]:
        """Return the factors that the previous convolution applies before `normalize_and_pool`.

        -1 on a TPU for channels of negative scale, else 1. Normalization reverses the order of
        such a channel's values. The TPU's pool cannot negate while it reads, and would write all
        of `x` once more; the convolution negates through its kernel at no cost.
        """
        return jax.lax.stop_gradient(
            jax.lax.platform_dependent(
                self.scale[...],
                tpu=lambda scale: jnp.where(scale < 0, -1.0, 1.0),
                default=jnp.ones_like,
            )
        )

    def normalize_and_pool(
        self,
        x: Float[Array, "b h w c"],
        mode: Mode,
        *,
        shift: Float[Array, " c"] | None = None,
        signs: Float[Array, " c"] | None = None,
    ) -> Float[Array, "b h2 w2 c"]:
        """Normalize, then pool by 2×2 maxima, without storing the normalized array.

        Args:
            x: input, already multiplied by `signs` if these are not None.
            mode: options of the forward pass.
            shift: bias of the previous convolution, as in `__call__`.
            signs: value of `channel_signs`, or None if `x` was not multiplied by it.
        """
        if signs is None:
            signs = self.channel_signs()
            x = x * signs.astype(x.dtype)
        if not mode.train:
            # The second multiplication by the signs restores the values of `x`.
            return max_pool(self._by_running_statistics(x * signs.astype(x.dtype), shift))
        # Where `x` and the scale are both negated, the normalized values do not change.
        z, (mean, var, count) = _normalize_and_pool(
            x,
            self.scale[...] * signs,
            self.bias[...],
            _weight(x, mode),
            self._center() * signs,
            self.epsilon,
            mode.axis_name,
        )
        self._update(Statistics(mean * signs, var, count), shift)
        return z

    def _center(self) -> Array:
        """Value near the mean of `x`, for one-pass statistics.

        Subtracting `shift` would bring it nearer, but costs one more GPU kernel per layer. The
        bias before a normalization has no gradient, so it keeps its initial value or decays.
        """
        return jax.lax.stop_gradient(self.mean[...])

    def _by_running_statistics(self, x: Array, shift: Array | None) -> Array:
        # The running mean includes the shift, but `x` does not.
        mean = self.mean[...] if shift is None else self.mean[...] - shift
        return _affine(x, self.scale[...], self.bias[...], mean, self.var[...], self.epsilon)

    def running_scale_and_shift(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Return a and b of a x + b, the normalization by running statistics."""
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return scale, self.bias[...] - scale * self.mean[...]

    def _update(self, statistics: Statistics, shift: Array | None) -> None:
        mean, var, count = jax.lax.stop_gradient(statistics)
        mean = mean if shift is None else mean + jax.lax.stop_gradient(shift)
        # The running variance is unbiased (n - 1) as in PyTorch; the batch is normalized with the
        # biased one.
        unbiased = var * count / jnp.maximum(count - 1, 1)
        self.mean[...] += self.momentum * (mean - self.mean[...])
        self.var[...] += self.momentum * (unbiased - self.var[...])


def batch_statistics(x: Float[Array, "b *spatial c"], mode: Mode) -> Statistics:
    """Compute mean, biased variance and count per channel in float32.

    Padding is excluded, and all devices of `mode.axis_name` are included.
    """
    return _statistics(x, _weight(x, mode), jnp.zeros(x.shape[-1]), mode.axis_name)


def _weight(x: Array, mode: Mode) -> Float[Array, " b"]:
    return jnp.ones(x.shape[0]) if mode.weight is None else mode.weight


def _total(x: Float[Array, "b *spatial c"]) -> Float[Array, "b c"]:
    """Sum over positions in float32. One row per record lets XLA's CPU loops run in parallel."""
    return x.astype(jnp.float32).sum(tuple(range(1, x.ndim - 1)))


def _weighted_total(x: Float[Array, "b *spatial c"], weight: Array) -> Float[Array, " c"]:
    return (_total(x) * weight[:, None]).sum(0)


def _sum_devices(values: Array, axis_name: str | None) -> Array:
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def _statistics(x: Array, weight: Array, center: Array, axis_name: str | None) -> Statistics:
    two, one = (partial(form, axis_name=axis_name) for form in (_two_passes, _one_pass))
    return jax.lax.platform_dependent(x, weight, center, cpu=two, default=one)


def _count(x: Array, weight: Array, axis_name: str | None) -> Float[Array, ""]:
    # Positions per record times the number of records that are not padding.
    return _sum_devices(weight.sum() * (x[0, ..., 0].size), axis_name)


def _two_passes(x: Array, weight: Array, center: Array, *, axis_name: str | None) -> Statistics:
    count = _count(x, weight, axis_name)
    mean = _sum_devices(_weighted_total(x, weight), axis_name) / count
    # The mean is that of all devices, so their sums of squares can be added.
    squares = _weighted_total(jnp.square(x.astype(jnp.float32) - mean), weight)
    return Statistics(mean, _sum_devices(squares, axis_name) / count, count)


def _one_pass(x: Array, weight: Array, center: Array, *, axis_name: str | None) -> Statistics:
    sums = _centered_sums([x], weight, center)
    return _from_sums(*sums, _count(x, weight, axis_name), center, axis_name)


def _centered_sums(
    parts: list[Float[Array, "b *spatial c"]], weight: Array, center: Array
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Sum x - center and its square over equally shaped parts of a batch."""
    centered = [part.astype(jnp.float32) - center for part in parts]
    squares = map(jnp.square, centered)
    return _weighted_total(reduce(add, centered), weight), _weighted_total(
        reduce(add, squares), weight
    )


def _from_sums(
    first: Array, second: Array, count: Array, center: Array, axis_name: str | None
) -> Statistics:
    first, second = (_sum_devices(sums, axis_name) / count for sums in (first, second))
    # Var = E[(x - c)²] - E[x - c]²; rounding can make the difference slightly negative.
    return Statistics(center + first, jnp.maximum(second - jnp.square(first), 0), count)


def _affine(x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float) -> Array:
    # scale (x - mean) / √(var + ε) + bias as one multiplication and one addition per value.
    factor = scale * jax.lax.rsqrt(var + epsilon)
    return (x * factor + (bias - mean * factor)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalize(
    x: Float[Array, "b *spatial c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    weight: Float[Array, " b"],
    center: Float[Array, " c"],
    epsilon: float,
    axis_name: str | None,
) -> tuple[Float[Array, "b *spatial c"], Statistics]:
    """Normalize `x` by its batch statistics; no gradient flows through the returned ones."""
    statistics = _statistics(x, weight, center, axis_name)
    return _affine(x, scale, bias, *statistics[:2], epsilon), statistics


def _normalize_forward(x, scale, bias, weight, center, epsilon, axis_name):
    z, statistics = _normalize(x, scale, bias, weight, center, epsilon, axis_name)
    return (z, statistics), (x, scale, weight, statistics)


def _normalize_backward(epsilon, axis_name, residuals, gradients):
    x, scale, weight, statistics = residuals
    dz = gradients[0].astype(jnp.float32)
    sums = _gradient_sums(x, dz, statistics, epsilon)
    return _input_gradient(x, dz, sums, scale, weight, statistics, epsilon, axis_name)


_normalize.defvjp(_normalize_forward, _normalize_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalize_and_pool(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    weight: Float[Array, " b"],
    center: Float[Array, " c"],
    epsilon: float,
    axis_name: str | None,
) -> tuple[Float[Array, "b h2 w2 c"], Statistics]:
    """Normalize as `_normalize`, then pool by 2×2 maxima."""
    return _normalize_and_pool_forward(x, scale, bias, weight, center, epsilon, axis_name)[0]


def _normalize_and_pool_forward(x, scale, bias, weight, center, epsilon, axis_name):
    cpu, tpu, gpu = (
        partial(form, axis_name=axis_name) for form in (_pool_on_cpu, _pool_on_tpu, _pool_on_gpu)
    )
    statistics, top = jax.lax.platform_dependent(
        x, scale, weight, center, cpu=cpu, tpu=tpu, default=gpu
    )
    z = _affine(top, scale, bias, *statistics[:2], epsilon)
    return (z, statistics), (x, top, scale, weight, statistics)


def _sign(x: Array, scale: Array) -> Array:
    """Sign per channel: x times this has its maximum where the normalized x has it."""
    return jnp.where(scale < 0, -1, 1).astype(x.dtype)


def _pool_on_cpu(x, scale, weight, center, *, axis_name):
    statistics = _two_passes(x, weight, center, axis_name=axis_name)
    sign = _sign(x, scale)
    # The minimum for channels of negative scale: the sign is applied before and after the maximum.
    return statistics, max_2x2(split_2x2(x * sign)) * sign


def _pool_on_tpu(x, scale, weight, center, *, axis_name):
    """Pool channels whose scale `BatchNorm.channel_signs` made positive."""
    return _one_pass(x, weight, center, axis_name=axis_name), window_max(x, 2, 2)


def _pool_on_gpu(x, scale, weight, center, *, axis_name):
    """Compute statistics and maxima from one read of `x`."""
    sign = _sign(x, scale)
    rows, columns = (length // 2 * 2 for length in x.shape[1:3])
    # The four values of each 2×2 window, in the order of `split_2x2`.
    values = [x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)]
    top = max_2x2([value * sign for value in values]) * sign
    odd = (rows, columns) != x.shape[1:3]  # the pool drops the rest, the statistics include it
    sums = _centered_sums([x] if odd else values, weight, center)
    # XLA fuses both into one kernel only if both are needed at the same time. Without the barrier
    # the backward pass would also recompute the maxima from `x`, which is four times as large.
    sums, top = jax.lax.optimization_barrier((sums, top))
    return _from_sums(*sums, _count(x, weight, axis_name), center, axis_name), top


def _normalize_and_pool_backward(epsilon, axis_name, residuals, gradients):
    x, top, scale, weight, statistics = residuals
    dz = gradients[0].astype(jnp.float32)
    # Only maxima have a gradient, so the sums run over them.
    sums = _gradient_sums(top, dz, statistics, epsilon)
    # The gradient belongs to the positions at which the forward pass found the maxima.
    signed = jax.lax.platform_dependent(
        x, scale, tpu=lambda x, scale: x, default=lambda x, scale: x * _sign(x, scale)
    )
    dz = scatter_gradient(signed, dz)
    return _input_gradient(x, dz, sums, scale, weight, statistics, epsilon, axis_name)


_normalize_and_pool.defvjp(_normalize_and_pool_forward, _normalize_and_pool_backward)


def _gradient_sums(x, dz, statistics, epsilon):
    """Compute this device's (Σ dz, Σ dz x̂)."""
    # x̂, recomputed from the stored input.
    standard = (x.astype(jnp.float32) - statistics.mean) * jax.lax.rsqrt(statistics.var + epsilon)
    return _total(dz).sum(0), _total(dz * standard).sum(0)


def _input_gradient(x, dz, sums, scale, weight, statistics, epsilon, axis_name):
    """Compute the gradients of (x, scale, bias, weight, center) from dz and `_gradient_sums`."""
    inverse = jax.lax.rsqrt(statistics.var + epsilon)
    total, correlated = (_sum_devices(s, axis_name) / statistics.count for s in sums)
    # Σ dz + x̂ Σ dz x̂ divided by n, written as offset + slope x, so that x̂ is not computed.
    slope = correlated * inverse
    offset = total - slope * statistics.mean
    # (b, 1, ...): padding did not enter the statistics, so its gradient is the first term only.
    counted = weight.reshape(-1, *[1] * (x.ndim - 1))
    dx = scale * inverse * (dz - counted * (offset + slope * x.astype(jnp.float32)))
    # The gradients of scale and bias are sums of this device; the training step adds all devices.
    return dx.astype(x.dtype), sums[1], sums[0], jnp.zeros_like(weight), jnp.zeros_like(scale)
