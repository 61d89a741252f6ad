"""Max-pooling with an elementwise gradient.

The gradient of XLA's `reduce_window` is a scatter. Here the gradient of a 2×2 pool is written by
a comparison per input value: the first maximum of each window, row by row, gets the gradient, as
in PyTorch. Two forms are used:

    CPU and GPU  the backward pass compares each value with the other three of its window. On a
         CPU this is 7 to 26 times as fast as `reduce_window`'s gradient (2-core Xeon). On an
         H100 that gradient moves two thirds more bytes (compiled).
    TPU  `reduce_window`'s gradient, select-and-scatter, a native operation. Comparison costs
         1.5 M more cycles of about 10.3 M per step (v5e, compiled, without augmentation).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def max_pool(
    x: Float[Array, "b h w c"], window: int = 2, stride: int = 2, padding: int = 0
) -> Float[Array, "b h2 w2 c"]:
    """Pool by maxima. Incomplete windows at the right and bottom are dropped, as in PyTorch.

    Of equal values the first of the window, row by row, gets the whole gradient, as in PyTorch.

    Args:
        x: images.
        window, stride, padding: in pixels, equal in both directions.
    """
    if (window, stride, padding) == (2, 2, 0):
        return _max_pool_2x2(x)
    # Other pools use XLA's gradient.
    return window_max(x, window, stride, padding)


def split_2x2(x: Float[Array, "b h w c"]) -> list[Float[Array, "b h2 w2 c"]]:
    """Return the upper left, upper right, lower left and lower right values of 2×2 windows."""
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return [windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]


def max_2x2(values: list[Float[Array, "b h2 w2 c"]]) -> Float[Array, "b h2 w2 c"]:
    """Compute the maximum of the four values of `split_2x2`."""
    first, second, third, fourth = values
    return jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth))


def scatter_gradient(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h2 w2 c"]
) -> Float[Array, "b h w c"]:
    """Write the gradient of 2×2 maxima to their positions in `x`, and zero elsewhere.

    Args:
        x: input of the pool.
        gradient: gradient of its output.
    """
    return jax.lax.platform_dependent(x, gradient, tpu=_by_operation, default=_by_comparison)


def _by_operation(x: Array, gradient: Array) -> Array:
    # The gradient may be float32 while `x` is bfloat16; the pool's derivative needs equal types.
    dx = jax.vjp(lambda x: window_max(x, 2, 2), x)[1](gradient.astype(x.dtype))[0]
    return dx.astype(gradient.dtype)


def _by_comparison(x: Array, gradient: Array) -> Array:
    b, h, w, c = gradient.shape
    # (b, h, row in the window, w, column in the window, c).
    windows = x[:, : 2 * h, : 2 * w].reshape(b, h, 2, w, 2, c)
    # True in the first row (column) of each window, which wins a tie.
    first_row = jnp.array([True, False]).reshape(1, 1, 2, 1, 1, 1)
    first_column = first_row.reshape(1, 1, 1, 1, 2, 1)

    def beats(first: Array, *axes: int) -> Array:
        """Compare with the value mirrored along `axes`; where `first`, a tie is a win."""
        other = jnp.flip(windows, axes)
        return (windows > other) | (first & (windows == other))

    # Compare with the horizontal, the vertical and the diagonal neighbor in the window.
    wins = beats(first_column, 4) & beats(first_row, 2) & beats(first_row, 2, 4)
    dx = jnp.where(wins, gradient[:, :, None, :, None], 0).reshape(b, 2 * h, 2 * w, c)
    # Zeros in the rows and columns that the pool drops.
    rest = ((0, 0), (0, x.shape[1] - 2 * h), (0, x.shape[2] - 2 * w), (0, 0))
    return jnp.pad(dx, rest)


def window_max(
    x: Float[Array, "b h w c"], window: int, stride: int, padding: int = 0
) -> Float[Array, "b h2 w2 c"]:
    """Compute the maximum of every window by XLA's `reduce_window`."""
    return jax.lax.reduce_window(
        x,
        # Padded positions are -inf, so they are never the maximum.
        -jnp.inf,
        jax.lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        [(0, 0), (padding, padding), (padding, padding), (0, 0)],
    )


@jax.custom_vjp
def _max_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    # Without a gradient `reduce_window` is faster: evaluation on a CPU took 1.7 times as long
    # with `split_2x2`.
    return window_max(x, window=2, stride=2)


def _max_pool_2x2_forward(x: Array) -> tuple[Array, Array]:
    top = jax.lax.platform_dependent(
        x, tpu=lambda x: window_max(x, 2, 2), default=lambda x: max_2x2(split_2x2(x))
    )
    return top, x


def _max_pool_2x2_backward(x: Array, gradient: Array) -> tuple[Array]:
    # The positions of the maxima are recomputed from `x` instead of stored.
    return (scatter_gradient(x, gradient),)


_max_pool_2x2.defvjp(_max_pool_2x2_forward, _max_pool_2x2_backward)
