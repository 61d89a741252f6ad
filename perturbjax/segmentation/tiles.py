"""Cut images into overlapping tiles for the network, and join its maps again.

Cutting includes normalization, rescaling and padding; joining averages overlapping tiles with
tapered weights. Both are the same operation: along each axis, every output row is a weighted sum of
a few input rows,

    out[i] = sum over k of weight[i, k] * in[index[i, k]]

Rescaling, padding, overlap and taper are contained in these indices and weights (`Taps`). They are
arguments of the compiled programs, which depend on array shapes only: images of one size and scale
compile once. Grid, padding and taper are those of the cellpose package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num

#: Default height and width of a tile in pixels, and the fraction of it that overlaps with
#: neighbors.
TILE, OVERLAP = 224, 0.1
#: Heights and widths are padded to multiples of this, with at least half of it at each edge.
PADDING = 16
#: Width of the tapered edge of a tile, in pixels.
TAPER = 7.5
#: Images are padded to multiples of this on the host: few shapes, and at most 6 % more pixels at
#: 1000.
BUCKET = 64


class Taps(NamedTuple):
    """Output row i is the sum over k of weight[i, k] times input row index[i, k]."""

    index: Integer[np.ndarray, "rows k"]  # type: ignore[assignment]
    weight: Float[np.ndarray, "rows k"]


class Tiling(NamedTuple):
    """Tile sizes of a network."""

    side: int = TILE
    """Height and width of a tile in pixels."""
    whole: int = TILE
    """Height or width in pixels up to which an image is a single tile. The maps of a narrow network
    fit into memory for a whole site, and overlapping tiles would double the work."""
    fixed: bool = False
    """Whether smaller images are padded to a full tile."""


TILED = Tiling()


@dataclass(frozen=True)
class Axis:
    """One axis of an image that is cut into tiles."""

    size: int
    """Size of the image in pixels."""
    scaled: int
    """Size after rescaling."""
    tiling: Tiling = TILED

    @cached_property
    def before(self) -> int:
        """Padding before the image."""
        # The pixels beyond the minimum padding are divided between both ends.
        return PADDING // 2 + (self._canvas - self.scaled - PADDING) // 2

    @cached_property
    def _canvas(self) -> int:
        """Size after padding."""
        least = self.tiling.side if self.tiling.fixed else 0
        return max(PADDING * math.ceil(self.scaled / PADDING) + PADDING, least)

    @property
    def side(self) -> int:
        """Size of a tile."""
        return self._canvas if self._canvas <= self._one_tile else self.tiling.side

    @property
    def tiles(self) -> int:
        if self._canvas <= self._one_tile:
            return 1
        # 1 + 2 OVERLAP times as many tiles as would cover the canvas without overlap.
        return math.ceil((1 + 2 * OVERLAP) * self._canvas / self.tiling.side)

    @property
    def _one_tile(self) -> int:
        return self.tiling.side if self.tiling.fixed else self.tiling.whole

    @cached_property
    def starts(self) -> Integer[np.ndarray, " tiles"]:
        # Evenly spaced; the last tile ends at the end of the canvas.
        return np.linspace(0, self._canvas - self.side, self.tiles).astype(int)

    @cached_property
    def cut(self) -> Taps:
        """From the image to (tiles x side) rows, 0 in the padding."""
        # Row of the rescaled image for each row of each tile; out of range in the padding.
        row = (self.starts[:, None] + np.arange(self.side)).ravel() - self.before
        inside = (row >= 0) & (row < self.scaled)
        # OpenCV computes positions in single precision for one and two channels, and in double for
        # three (the maps). The difference changes the network's output by 1e-4 at 1000 pixels from
        # the edge.
        taps = _linear(np.clip(row, 0, self.scaled - 1), self.scaled, self.size, np.float32)
        return _padded(Taps(taps.index, taps.weight * inside[:, None]), len(row))

    def join(self, rows: int) -> Taps:
        """From (tiles x side) rows to those of the image, and zeros up to `rows`."""
        taper = _taper(self.side) if self.tiles > 1 else np.ones(self.side)
        position = self.starts[:, None] + np.arange(self.side)
        # Sum of the tapers at each row of the canvas; dividing by it makes the weights sum to 1.
        total = np.bincount(position.ravel(), np.tile(taper, self.tiles), self._canvas)
        back = _linear(np.arange(self.size), self.size, self.scaled)
        # A row of the image is interpolated from one or two rows of the canvas. Each of these is
        # the weighted mean of the tiles that cover it.
        index, weight = [], []
        for tap in range(back.index.shape[1]):
            row = back.index[:, tap] + self.before
            for tile, start in enumerate(self.starts):
                local = row - start
                covered = (local >= 0) & (local < self.side)
                local = np.where(covered, local, 0)
                index.append(tile * self.side + local)
                weight.append(np.where(covered, back.weight[:, tap] * taper[local] / total[row], 0))
        return _padded(_compact(np.stack(index, 1), np.stack(weight, 1)), rows)


@dataclass(frozen=True)
class Plan:
    """Tiling of images of one shape at one scale. Equal plans share compiled programs."""

    height: int
    width: int
    rescale: float
    """Pixels of the network's input for each pixel of the image."""
    tiling: Tiling = TILED

    @cached_property
    def y(self) -> Axis:
        return Axis(self.height, max(int(self.height * self.rescale), 1), self.tiling)

    @cached_property
    def x(self) -> Axis:
        return Axis(self.width, max(int(self.width * self.rescale), 1), self.tiling)

    @property
    def count(self) -> int:
        """Number of tiles of one image."""
        return self.y.tiles * self.x.tiles

    @property
    def tile(self) -> tuple[int, int]:
        return self.y.side, self.x.side

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the padded arrays on the device."""
        return bucket(self.height), bucket(self.width)


def bucket(size: int) -> int:
    """Round up to a multiple of `BUCKET`."""
    return -(-size // BUCKET) * BUCKET


@jax.jit
def cut(
    images: Num[Array, "b h w c"],
    ranges: Float[Array, "b c 2"],
    rows: Taps,
    columns: Taps,
) -> Float[Array, "b rows columns c"]:
    """Normalize, rescale and pad images; rows and columns of overlapping tiles are repeated: (tiles
    x side) each."""
    # NaN becomes 0. A channel without contrast has an infinite range, and becomes 0 as well.
    images = jnp.nan_to_num(
        (images.astype(jnp.float32) - ranges[:, None, None, :, 0]) / ranges[:, None, None, :, 1]
    )
    return jax.vmap(lambda image: _resample(image, rows, columns))(images)


@partial(jax.jit, static_argnames=("tiles", "count"))
def chunk(
    images: Float[Array, "b rows columns c"], tiles: tuple[int, int], start: Array, count: int
) -> Array:
    """Return tiles `start` to `start + count` of a batch as (count, side, side, c), zeros after the
    last."""
    b, rows, columns, c = images.shape
    down, across = tiles
    # (b, down, across, side, side, c), then one axis for the tiles of all images.
    split = images.reshape(b, down, rows // down, across, columns // across, c).swapaxes(2, 3)
    split = split.reshape(b * down * across, rows // down, columns // across, c)
    numbers = start + jnp.arange(count)
    return split.at[numbers].get(mode="fill", fill_value=0)


@partial(jax.jit, static_argnames=("tiles", "images"))
def join(
    chunks: tuple[Float[Array | np.ndarray, "_ side_y side_x c"], ...],
    rows: Taps,
    columns: Taps,
    tiles: tuple[int, int],
    images: int,
) -> Float[Array, "b h w c"]:
    """Join the maps of tiles to maps of whole images at their own scale, averaged where tiles
    overlap."""
    down, across = tiles
    # The last chunk may end with tiles of padding.
    maps = jnp.concatenate(chunks)[: images * down * across]
    _, height, width, c = maps.shape
    # The reverse of `chunk`: tiles become (tiles x side) rows and columns of each image.
    grid = maps.reshape(images, down, across, height, width, c).swapaxes(2, 3)
    grid = grid.reshape(images, down * height, across * width, c)
    return jax.vmap(lambda image: _resample(image, rows, columns))(grid)


def _resample(image: Float[Array, "h w c"], rows: Taps, columns: Taps) -> Float[Array, "h2 w2 c"]:
    # Rows, then columns: separate axes need k + k instead of k x k taps per pixel.
    down = reduce(
        add,
        (
            image[rows.index[:, k]] * rows.weight[:, k, None, None]
            for k in range(rows.index.shape[1])
        ),
    )
    return reduce(
        add,
        (
            down[:, columns.index[:, k]] * columns.weight[:, k, None]
            for k in range(columns.index.shape[1])
        ),
    )


def _linear(
    rows: Integer[np.ndarray, " n"], stretched: int, size: int, precision: type = np.float64
) -> Taps:
    """Interpolate linearly at `rows` of an axis of `size` pixels that is stretched to `stretched`;
    edges repeat."""
    if stretched == size:
        return Taps(rows[:, None], np.ones((len(rows), 1)))
    # Pixel i covers [i, i + 1], so its center is at i + 0.5.
    source: np.ndarray = ((rows + 0.5) * (size / stretched) - 0.5).astype(precision)
    first = np.floor(source).astype(int)
    fraction = np.where((first < 0) | (first >= size - 1), 0, source - first)
    first = np.clip(first, 0, size - 1)
    return Taps(
        np.stack([first, np.minimum(first + 1, size - 1)], 1), np.stack([1 - fraction, fraction], 1)
    )


def _taper(side: int) -> Float[np.ndarray, " side"]:
    """Return the central part of Cellpose's taper, which is defined for tiles of 224 pixels or
    more."""
    full = max(side, TILE)
    distance = np.abs(np.arange(full) - (full - 1) / 2)
    # A sigmoid that is 1/2 at 20 pixels from the edge.
    curve = 1 / (1 + np.exp((distance - (full / 2 - 20)) / TAPER))
    return curve[full // 2 - side // 2 : full // 2 + side // 2 + side % 2]


def _compact(index: np.ndarray, weight: np.ndarray) -> Taps:
    """Remove taps of weight 0 that no row needs."""
    order = np.argsort(weight == 0, axis=1, kind="stable")
    # Number of taps of the row that needs most.
    most = max(int((weight != 0).sum(1).max()), 1)
    return Taps(*(np.take_along_axis(values, order, 1)[:, :most] for values in (index, weight)))


def _padded(taps: Taps, rows: int) -> Taps:
    padding = ((0, rows - len(taps.index)), (0, 0))
    return Taps(
        np.pad(taps.index, padding).astype(np.int32),
        np.pad(taps.weight, padding).astype(np.float32),
    )
