"""Image resampling by matrix products, for TPUs.

A TPU gathers single pixels very slowly: the augmentation needed nine gathers of 2.1 million
scalars per step. Matrix products replace them; the compiled augmentation takes 8.5 of the step's
18.8 M cycles (v5e, docs/performance.md). The time of the gathers has no compiler estimate and has
not been measured, so the gain is not known. CPUs and GPUs use gathers (`data.augmentation`).

A value between pixels is (row of weights) · pixels · (column of weights). On an upright grid all
output pixels of a row share one row of weights, and all of a column share one column: two
products for the whole image. On a rotated grid every output pixel has its own pair of weights.
Products with the whole image would be far too many, so the grid is divided into tiles. For each
tile the window of the image that contains its points is cut out first, by products with matrices
of zeros and ones.

Precision. A TPU multiplies floats as two numbers of 8 bits. Zeros and ones are exact in this
form, so masks and images of 16 bits are cut out exactly. Interpolated values are within 1e-5 of
the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

#: Maximum height and width of a window: the size of a TPU's matrix unit.
WINDOW = 128

#: Weight of a pixel as a function of its distance along one axis, in pixels.
Kernel = Callable[[Array], Array]


class Grid(NamedTuple):
    """Positions of the output pixels, in pixels from the center of the image's first pixel.

    Attributes:
        y: row positions.
        x: column positions.
        level: index of the image, among several resolutions, that each record is read from.
        step: maximum distance of neighboring positions in pixels of their level. None for
            upright grids, in which `y` depends on the row only and `x` on the column only.
    """

    y: Float[Array, "b rows columns"]
    x: Float[Array, "b rows columns"]
    level: Int[Array, " b"]
    step: float | None


def bilinear(
    images: Sequence[Shaped[Array, "b _h _w c"]], grid: Grid
) -> Float[Array, "b rows columns c"]:
    """Interpolate between the four neighbors of each position.

    Beyond its border an image is mirrored.

    Args:
        images: resolutions of the same images, finest first; `grid.level` selects one per record.
        grid: positions.
    """
    # Triangle kernel: the weight decreases linearly from 1 to 0 over one pixel.
    return _resample(images, grid, lambda distance: jnp.maximum(1 - jnp.abs(distance), 0))


def nearest(image: Shaped[Array, "b h w"], grid: Grid) -> Float[Array, "b rows columns"]:
    """Read the pixel that contains each position."""
    # After rounding, exactly one pixel is at distance 0 along each axis.
    rounded = grid._replace(y=jnp.floor(grid.y + 0.5), x=jnp.floor(grid.x + 0.5))
    return _resample(
        [image[..., None]], rounded, lambda distance: (distance == 0).astype(jnp.float32)
    )[..., 0]


def _resample(
    images: Sequence[Array], grid: Grid, kernel: Kernel
) -> Float[Array, "b rows columns c"]:
    pixels = _select_levels(images, grid.level)
    if grid.step is None:
        return _resample_upright(pixels, grid, kernel)
    return _resample_tiles(pixels, grid, grid.step, kernel)


class _Pixels(NamedTuple):
    """Image of each record, padded with zeros to the size of the largest.

    `height` and `width` are the sizes without padding. `precision` is that of products with
    zeros and ones.
    """

    image: Float[Array, "b h w c"]
    height: Int[Array, " b"]
    width: Int[Array, " b"]
    precision: str


def _select_levels(
    images: Sequence[Shaped[Array, "b _h _w c"]], level: Int[Array, " b"]
) -> _Pixels:
    image = images[0].astype(jnp.float32)
    # Levels have different sizes, so each is padded to the size of the finest one.
    for number, other in enumerate(images[1:], start=1):
        rest = [(0, whole - length) for whole, length in zip(image.shape, other.shape, strict=True)]
        padded = jnp.pad(other.astype(jnp.float32), rest)
        image = jnp.where((level == number)[:, None, None, None], padded, image)
    # (b, levels) one-hot mask: a sum replaces the lookup of the selected size.
    selected = level[:, None] == jnp.arange(len(images))
    height, width = (
        jnp.where(selected, jnp.array([each.shape[axis] for each in images]), 0).sum(1)
        for axis in (1, 2)
    )
    # Products of precision "default" use 8 significant bits, enough for uint8. "high" uses more.
    exact_in_8_bits = all(each.dtype == jnp.uint8 for each in images)
    return _Pixels(image, height, width, "default" if exact_in_8_bits else "high")


def _selection(
    index: Int[Array, " b *n"], length: Int[Array, " b"], width: int
) -> Float[Array, "b *n {width}"]:
    """Matrix with a 1 at each index, mirrored at 0 and `length`; 0 elsewhere."""
    length = length.reshape(-1, *[1] * (index.ndim - 1))
    # A mirrored axis has period 2 length: 0 ... length - 1, then length - 1 ... 0.
    index = index % (2 * length)
    index = jnp.minimum(index, 2 * length - 1 - index)
    return (index[..., None] == jnp.arange(width)).astype(jnp.float32)


def _resample_upright(
    pixels: _Pixels, grid: Grid, kernel: Kernel
) -> Float[Array, "b rows columns c"]:
    def weights(position: Float[Array, "b n"], length: Int[Array, " b"], size: int) -> Array:
        # A kernel of width 2 has at most two nonzero weights: the pixels before and after the
        # position.
        first = jnp.floor(position)
        return reduce(
            add,
            (
                kernel(position - pixel)[..., None]
                * _selection(pixel.astype(jnp.int32), length, size)
                for pixel in (first, first + 1)
            ),
        )

    _, height, width, _ = pixels.image.shape
    # On an upright grid the first column has all row positions, and the first row all columns.
    down = weights(grid.y[:, :, 0], pixels.height, height)
    across = weights(grid.x[:, 0], pixels.width, width)
    rows = jnp.einsum("bni,bijc->bnjc", down, pixels.image, precision="highest")
    return jnp.einsum("bmj,bnjc->bnmc", across, rows, precision="highest")


def _resample_tiles(
    pixels: _Pixels, grid: Grid, step: float, kernel: Kernel
) -> Float[Array, "b rows columns c"]:
    rows, columns = grid.y.shape[1:]
    tall, wide, size = _tile_shape(rows, columns, step)
    # (b, tiles, positions), and below the first row and column of each window: (b, tiles, 1).
    y, x = (_split_tiles(positions, tall, wide) for positions in (grid.y, grid.x))
    top, left = (jnp.floor(positions.min(-1, keepdims=True)) for positions in (y, x))
    windows = _cut_windows(
        pixels, *(start.astype(jnp.int32) + jnp.arange(size) for start in (top, left))
    )
    pixel = jnp.arange(size)[:, None]
    # (b, tiles, size, positions): weight of each window row (column) for each position.
    down, across = (kernel(offset[:, :, None] - pixel) for offset in (y - top, x - left))
    # Rows by a matrix product: (b, tiles, columns, positions, c). Every position then has its
    # separate weights of columns, so these are a product and a sum per position.
    between = jnp.einsum("bgnmc,bgnp->bgmpc", windows, down, precision="high")
    return _join_tiles((between * across[..., None]).sum(2), rows, columns, tall, wide)


def _tile_shape(rows: int, columns: int, step: float) -> tuple[int, int, int]:
    """Halve tiles until their windows fit; return tile height, tile width and window size."""
    tall, wide = rows, columns
    while True:
        # The diagonal bounds the extent of a rotated tile. The additional pixels cover the rounding
        # of the window's corner and the neighbor after the last position.
        size = math.ceil(step * math.hypot(tall - 1, wide - 1)) + 3
        if size <= WINDOW or max(tall, wide) <= 1:
            return tall, wide, size
        tall, wide = -(-tall // 2), -(-wide // 2)


def _split_tiles(
    values: Float[Array, "b rows columns"], tall: int, wide: int
) -> Float[Array, "b tiles positions"]:
    b, rows, columns = values.shape
    # Repeated positions fill incomplete tiles; `_join_tiles` removes them.
    values = jnp.pad(values, ((0, 0), (0, -rows % tall), (0, -columns % wide)), mode="edge")
    tiles = values.reshape(b, values.shape[1] // tall, tall, values.shape[2] // wide, wide)
    return tiles.swapaxes(2, 3).reshape(b, -1, tall * wide)


def _join_tiles(
    tiles: Float[Array, "b tiles positions c"], rows: int, columns: int, tall: int, wide: int
) -> Float[Array, "b {rows} {columns} c"]:
    b, _, _, c = tiles.shape
    down, across = -(-rows // tall), -(-columns // wide)
    tiles = tiles.reshape(b, down, across, tall, wide, c).swapaxes(2, 3)
    return tiles.reshape(b, down * tall, across * wide, c)[:, :rows, :columns]


def _cut_windows(
    pixels: _Pixels, rows: Int[Array, "b tiles n"], columns: Int[Array, "b tiles n"]
) -> Float[Array, "b tiles n n c"]:
    _, height, width, _ = pixels.image.shape
    down = _selection(rows, pixels.height, height)
    across = _selection(columns, pixels.width, width)
    cut = jnp.einsum("bgni,bijc->bgnjc", down, pixels.image, precision=pixels.precision)
    return jnp.einsum("bgmj,bgnjc->bgnmc", across, cut, precision=pixels.precision)
