"""Pixels at given places by matrix products: for TPUs, which look single values up very slowly.

A value between pixels is a row of weights, times the pixels, times a column of weights. Where the grid of places stands
upright in the image, its rows share the one and its columns the other: two products for all. A turned grid needs a pair
for every place, which with a whole image between them would be far too many products; so its places are dealt into
tiles, and of each tile the window that holds its places is cut out before, by products with ones and zeros.

A TPU multiplies floats as two numbers of 8 bits, which ones and zeros leave as they are: masks and images of 16 bits
come out exact, and what is interpolated between them to 1e-5 of the greatest of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

#: Rows and columns of a window, at most: what a TPU multiplies at a time.
WINDOW = 128


class Grid(NamedTuple):
    """Where the output pixels lie, in pixels from the centre of an image's first.

    Attributes:
        y: rows.
        x: columns.
        level: in which of several images each record is looked up.
        step: how far neighbours lie apart, at most, in pixels of their level; None where the grids are upright: one
            `y` a row and one `x` a column.
    """

    y: Float[Array, "b rows columns"]
    x: Float[Array, "b rows columns"]
    level: Int[Array, " b"]
    step: float | None


def bilinear(
    images: Sequence[Shaped[Array, "b _h _w c"]], grid: Grid
) -> Float[Array, "b rows columns c"]:
    """Look every place up between its four neighbours, in the image of its record's level; the finest comes first.

    Beyond its border an image is mirrored.
    """
    return _look_up(images, grid, lambda away: jnp.maximum(1 - jnp.abs(away), 0))


def nearest(image: Shaped[Array, "b h w"], grid: Grid) -> Float[Array, "b rows columns"]:
    """Look every place up in the pixel that it lies in."""
    whole = grid._replace(y=jnp.floor(grid.y + 0.5), x=jnp.floor(grid.x + 0.5))
    return _look_up([image[..., None]], whole, lambda away: (away == 0).astype(jnp.float32))[..., 0]


def _look_up(
    images: Sequence[Array], grid: Grid, weigh: Callable[[Array], Array]
) -> Float[Array, "b rows columns c"]:
    """`weigh` says by its distance along one axis what a pixel counts for."""
    pixels = _choose(images, grid.level)
    return (
        _by_axes(pixels, grid, weigh)
        if grid.step is None
        else _by_tiles(pixels, grid, grid.step, weigh)
    )


class _Pixels(NamedTuple):
    """Each record's image, filled up with zeros to the greatest; how much of it there is; and how it is multiplied by
    ones and zeros."""

    image: Float[Array, "b h w c"]
    height: Int[Array, " b"]
    width: Int[Array, " b"]
    precision: str


def _choose(images: Sequence[Shaped[Array, "b _h _w c"]], level: Int[Array, " b"]) -> _Pixels:
    image = images[0].astype(jnp.float32)
    for number, other in enumerate(images[1:], start=1):
        rest = [(0, whole - length) for whole, length in zip(image.shape, other.shape, strict=True)]
        image = jnp.where(
            (level == number)[:, None, None, None], jnp.pad(other.astype(jnp.float32), rest), image
        )
    mine = level[:, None] == jnp.arange(len(images))
    height, width = (
        jnp.where(mine, jnp.array([of.shape[axis] for of in images]), 0).sum(1) for axis in (1, 2)
    )
    return _Pixels(
        image, height, width, "default" if all(of.dtype == jnp.uint8 for of in images) else "high"
    )


def _ones(
    at: Int[Array, "b *some"], length: Int[Array, " b"], width: int
) -> Float[Array, "b *some {width}"]:
    """1 at each index, or where it is mirrored to from beyond `length`; 0 elsewhere."""
    length = length.reshape(-1, *[1] * (at.ndim - 1))
    at = at % (2 * length)
    at = jnp.minimum(at, 2 * length - 1 - at)
    return (at[..., None] == jnp.arange(width)).astype(jnp.float32)


def _by_axes(
    pixels: _Pixels, grid: Grid, weigh: Callable[[Array], Array]
) -> Float[Array, "b rows columns c"]:
    _, height, width, _ = pixels.image.shape

    def weights(
        at: Float[Array, "b n"], length: Int[Array, " b"], side: int
    ) -> Float[Array, "b n {side}"]:
        first = jnp.floor(at)
        shares = (
            weigh(at - pixel)[..., None] * _ones(pixel.astype(jnp.int32), length, side)
            for pixel in (first, first + 1)
        )
        return reduce(add, shares)

    down = weights(grid.y[:, :, 0], pixels.height, height)
    across = weights(grid.x[:, 0], pixels.width, width)
    rows = jnp.einsum("bni,bijc->bnjc", down, pixels.image, precision="highest")
    return jnp.einsum("bmj,bnjc->bnmc", across, rows, precision="highest")


def _by_tiles(
    pixels: _Pixels, grid: Grid, step: float, weigh: Callable[[Array], Array]
) -> Float[Array, "b rows columns c"]:
    rows, columns = grid.y.shape[1:]
    tall, wide, side = _tiling(rows, columns, step)
    y, x = (_tiles(of, tall, wide) for of in (grid.y, grid.x))
    top, left = (jnp.floor(of.min(-1, keepdims=True)) for of in (y, x))
    windows = _windows(
        pixels, *(start.astype(jnp.int32) + jnp.arange(side) for start in (top, left))
    )
    pixel = jnp.arange(side)[:, None]
    down, across = (weigh(of[:, :, None] - pixel) for of in (y - top, x - left))
    between = jnp.einsum("bgnmc,bgnp->bgmpc", windows, down, precision="high")
    return _joined((between * across[..., None]).sum(2), rows, columns, tall, wide)


def _tiling(rows: int, columns: int, step: float) -> tuple[int, int, int]:
    """Rows and columns of tiles whose windows are small enough, and the side of these windows."""
    tall, wide = rows, columns
    while (side := math.ceil(step * math.hypot(tall - 1, wide - 1)) + 3) > WINDOW and max(
        tall, wide
    ) > 1:
        tall, wide = -(-tall // 2), -(-wide // 2)
    return tall, wide, side


def _tiles(
    of: Float[Array, "b rows columns"], tall: int, wide: int
) -> Float[Array, "b tiles places"]:
    b, rows, columns = of.shape
    of = jnp.pad(of, ((0, 0), (0, -rows % tall), (0, -columns % wide)), mode="edge")
    down, across = of.shape[1] // tall, of.shape[2] // wide
    return (
        of.reshape(b, down, tall, across, wide)
        .swapaxes(2, 3)
        .reshape(b, down * across, tall * wide)
    )


def _joined(
    tiles: Float[Array, "b tiles places c"], rows: int, columns: int, tall: int, wide: int
) -> Float[Array, "b {rows} {columns} c"]:
    b, _, _, c = tiles.shape
    down, across = -(-rows // tall), -(-columns // wide)
    whole = (
        tiles.reshape(b, down, across, tall, wide, c)
        .swapaxes(2, 3)
        .reshape(b, down * tall, across * wide, c)
    )
    return whole[:, :rows, :columns]


def _windows(
    pixels: _Pixels, rows: Int[Array, "b tiles n"], columns: Int[Array, "b tiles n"]
) -> Float[Array, "b tiles n n c"]:
    _, height, width, _ = pixels.image.shape
    down, across = _ones(rows, pixels.height, height), _ones(columns, pixels.width, width)
    cut = jnp.einsum("bgni,bijc->bgnjc", down, pixels.image, precision=pixels.precision)
    return jnp.einsum("bgmj,bgnjc->bgnmc", across, cut, precision=pixels.precision)
