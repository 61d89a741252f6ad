"""Max-pooling whose gradient is elementwise, where `reduce_window`'s scatters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def max_pool(
    x: Float[Array, "b h w c"], window: int = 2, stride: int = 2, padding: int = 0
) -> Float[Array, "b h2 w2 c"]:
    """Max-pooling; a remainder at the right and bottom is dropped, as in torch.

    Among equal values the first of the window, row by row, gets the whole gradient, as in torch.
    """
    return (
        _halve(x) if (window, stride, padding) == (2, 2, 0) else windows(x, window, stride, padding)
    )


def quarters(x: Float[Array, "b h w c"]) -> list[Float[Array, "b h2 w2 c"]]:
    """The four places of every 2×2 window, row by row."""
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return [windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]


def largest(places: list[Float[Array, "b h2 w2 c"]]) -> Float[Array, "b h2 w2 c"]:
    """The maximum over the four places."""
    first, second, third, fourth = places
    return jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth))


def winner(places: list[Float[Array, "b h2 w2 c"]]) -> UInt8[Array, "b h2 w2 c"]:
    """Which of the four places holds the maximum: the first of them, 0 to 3."""
    top = largest(places)
    index = jnp.full(top.shape, 3, jnp.uint8)
    for place in (2, 1, 0):
        index = jnp.where(places[place] == top, jnp.uint8(place), index)
    return index


def spread(
    pooled: Float[Array, "b h2 w2 c"], index: UInt8[Array, "b h2 w2 c"], height: int, width: int
) -> Float[Array, "b {height} {width} c"]:
    """Put every pooled value back in its window's place, zero elsewhere."""
    b, h, w, c = pooled.shape
    places = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    full = jnp.where(index[:, :, None, :, None] == places, pooled[:, :, None, :, None], 0)
    rest = ((0, 0), (0, height - 2 * h), (0, width - 2 * w), (0, 0))
    return jnp.pad(full.reshape(b, 2 * h, 2 * w, c), rest)


def scatter(
    x: Float[Array, "b h w c"],
    gradient: Float[Array, "b h2 w2 c"],
    index: UInt8[Array, "b h2 w2 c"],
) -> Float[Array, "b h w c"]:
    """Put the gradient of `x`'s 2×2 maxima where these were, zero elsewhere; `index` is `winner`'s.

    A TPU has an operation for it, which looks for the winners itself: of the six dimensions in `spread` its compiler
    writes every step to memory. A GPU moves two thirds more bytes by that operation.
    """

    def by_operation(x: Array, gradient: Array, index: Array) -> Array:
        turned = jax.vjp(lambda x: windows(x, 2, 2), x)[1](gradient.astype(x.dtype))[0]
        return turned.astype(gradient.dtype)

    def by_index(x: Array, gradient: Array, index: Array) -> Array:
        return spread(gradient, index, *x.shape[1:3])

    return jax.lax.platform_dependent(
        x, gradient, index, cpu=by_index, tpu=by_operation, default=by_comparison
    )


def by_comparison(x: Array, gradient: Array, index: Array) -> Array:
    b, h, w, c = gradient.shape
    windows = x[:, : 2 * h, : 2 * w].reshape(b, h, 2, w, 2, c)
    first_row = jnp.array([True, False]).reshape(1, 1, 2, 1, 1, 1)
    first_column = first_row.reshape(1, 1, 1, 1, 2, 1)

    def beats(first: Array, *axes: int) -> Array:
        other = jnp.flip(windows, axes)
        return (windows > other) | (first & (windows == other))

    wins = beats(first_column, 4) & beats(first_row, 2) & beats(first_row, 2, 4)
    full = jnp.where(wins, gradient[:, :, None, :, None], 0)
    rest = ((0, 0), (0, x.shape[1] - 2 * h), (0, x.shape[2] - 2 * w), (0, 0))
    return jnp.pad(full.reshape(b, 2 * h, 2 * w, c), rest)


def windows(
    x: Float[Array, "b h w c"], window: int, stride: int, padding: int = 0
) -> Float[Array, "b h2 w2 c"]:
    """The maximum of every window, by XLA's own operation."""
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        [(0, 0), (padding, padding), (padding, padding), (0, 0)],
    )


@jax.custom_vjp
def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    # Where no gradient is asked for: by the four places, a whole evaluation took 1.7 times as long on a CPU.
    return windows(x, window=2, stride=2)


def _halve_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    def by_windows(x: Array) -> tuple[Array, Array]:
        top = windows(x, window=2, stride=2)
        return top, jnp.zeros(top.shape, jnp.uint8)

    def by_places(x: Array) -> tuple[Array, Array]:
        places = quarters(x)
        return largest(places), winner(places)

    top, index = jax.lax.platform_dependent(x, tpu=by_windows, default=by_places)
    return top, (x, index)


def _halve_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, index = residuals
    return (scatter(x, gradient, index),)


_halve.defvjp(_halve_forward, _halve_backward)
