"""From images to the network's tiles and back: normalised, rescaled, cut with overlap, averaged with tapered edges.

Cutting and putting together are one operation: along each axis, every row out is a weighted sum of a few rows in.
Rescaling, padding, overlap and taper are all in those weights (`Taps`), so the arrays' shapes are the only thing that a
compiled program depends on, and a plate of one image size compiles once. Grid, padding and taper are the cellpose
package's.
"""

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

#: Side of a tile in pixels where the network does not say another, and the share of it that neighbours see too.
TILE, OVERLAP = 224, 0.1
#: Padded images have sides that are multiples of this, and at least half of it on each edge.
PADDING = 16
#: Width of a tile's fading edge, in pixels.
TAPER = 7.5
#: What 0 and 1 become, in percent of a channel's pixels.
PERCENTILES = (1.0, 99.0)
#: Pixels of an image beyond which percentiles come from a sample of about 224 by 224 of them.
SAMPLED_FROM, SAMPLE_SIDE = 224**3, 224
#: Images are padded to multiples of this before they reach the device: few shapes, at most 6 % more at 1000 pixels.
BUCKET = 64


class Taps(NamedTuple):
    """Row `i` out is the sum over k of weight[i, k] times row index[i, k] in."""

    index: Integer[np.ndarray, "rows k"]  # type: ignore[assignment]
    weight: Float[np.ndarray, "rows k"]


class Tiling(NamedTuple):
    """How a network likes to be shown images."""

    side: int = TILE
    """Pixels of a tile's side."""
    whole: int = TILE
    """Side up to which an image is one tile, larger than others. A narrow network's maps of a whole site fit a
    processor's memory, and tiles that overlap are twice the work."""
    fixed: bool = False
    """Whether no tile may be smaller: smaller images are padded to one."""


TILED = Tiling()


@dataclass(frozen=True)
class Axis:
    """One axis of an image cut into tiles."""

    size: int
    """Pixels of the image."""
    scaled: int
    """Pixels after rescaling."""
    tiling: Tiling = TILED

    @cached_property
    def before(self) -> int:
        return PADDING // 2 + (self._canvas - self.scaled - PADDING) // 2

    @cached_property
    def _canvas(self) -> int:
        """Pixels after padding."""
        least = self.tiling.side if self.tiling.fixed else 0
        return max(PADDING * math.ceil(self.scaled / PADDING) + PADDING, least)

    @property
    def side(self) -> int:
        """Of a tile."""
        return self._canvas if self._canvas <= self._one_tile else self.tiling.side

    @property
    def tiles(self) -> int:
        if self._canvas <= self._one_tile:
            return 1
        return math.ceil((1 + 2 * OVERLAP) * self._canvas / self.tiling.side)

    @property
    def _one_tile(self) -> int:
        return self.tiling.side if self.tiling.fixed else self.tiling.whole

    @cached_property
    def starts(self) -> Integer[np.ndarray, " tiles"]:
        return np.linspace(0, self._canvas - self.side, self.tiles).astype(int)

    @cached_property
    def cut(self) -> Taps:
        """From the image to (tiles × side) rows; zero where there is padding."""
        row = (self.starts[:, None] + np.arange(self.side)).ravel() - self.before
        inside = (row >= 0) & (row < self.scaled)
        # OpenCV places the pixels of one and two channels in single precision, and those of three, the maps, in double:
        # at 1000 pixels from the edge the difference is 1e-4 of what the network then says.
        taps = _linear(np.clip(row, 0, self.scaled - 1), self.scaled, self.size, np.float32)
        return _padded(Taps(taps.index, taps.weight * inside[:, None]), len(row))

    def join(self, rows: int) -> Taps:
        """From (tiles × side) rows to the image's, and zeros up to `rows`."""
        taper = _taper(self.side) if self.tiles > 1 else np.ones(self.side)
        place = self.starts[:, None] + np.arange(self.side)
        total = np.bincount(place.ravel(), np.tile(taper, self.tiles), self._canvas)
        back = _linear(np.arange(self.size), self.size, self.scaled)
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
    """How images of one shape are cut, at one scale. Equal plans share compiled programs."""

    height: int
    width: int
    rescale: float
    """Pixels of the network's image for each of the original."""
    tiling: Tiling = TILED

    @cached_property
    def y(self) -> Axis:
        return Axis(self.height, max(int(self.height * self.rescale), 1), self.tiling)

    @cached_property
    def x(self) -> Axis:
        return Axis(self.width, max(int(self.width * self.rescale), 1), self.tiling)

    @property
    def count(self) -> int:
        """Tiles of one image."""
        return self.y.tiles * self.x.tiles

    @property
    def tile(self) -> tuple[int, int]:
        return self.y.side, self.x.side

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the arrays on the device."""
        return bucket(self.height), bucket(self.width)


def bucket(size: int) -> int:
    return -(-size // BUCKET) * BUCKET


def percentiles(image: Num[np.ndarray, "h w c"]) -> Float[np.ndarray, "c 2"]:
    """Of each channel what becomes 0, and the difference to what becomes 1: infinite for a channel without contrast,
    which so becomes 0 everywhere. NaN counts as nothing.

    Done on the host, where images arrive as integers: a count of values takes 3 ms for 1080² pixels of 16 bits where
    sorting them takes 25.
    """
    if image.shape[0] * image.shape[1] > SAMPLED_FROM:
        image = image[:: image.shape[0] // SAMPLE_SIDE, :: image.shape[1] // SAMPLE_SIDE]
    ends = np.stack([_ends(image[..., channel]) for channel in range(image.shape[-1])])
    low, span = ends[:, 0], ends[:, 1] - ends[:, 0]
    flat = ~(span > 1e-3)
    return np.stack([np.where(flat, 0, low), np.where(flat, np.inf, span)], 1).astype(np.float32)


def _ends(plane: Num[np.ndarray, "h w"]) -> Float[np.ndarray, "2"]:
    if plane.dtype.kind != "u" or plane.dtype.itemsize > 2:
        finite = np.asarray(plane, np.float32)
        finite = finite[np.isfinite(finite)]
        return (
            np.array([np.percentile(finite, each) for each in PERCENTILES])
            if finite.size
            else np.zeros(2)
        )
    below = np.cumsum(np.bincount(plane.ravel()))
    # In single precision, as NumPy has it of single-precision pixels, which the package makes of all.
    place = (
        np.array(PERCENTILES, np.float32) / np.float32(100) * np.float32(plane.size - 1)
    ).astype(np.float64)
    first, second = (
        np.searchsorted(below, np.floor(place) + shift, side="right") for shift in (0, 1)
    )
    second = np.minimum(second, len(below) - 1)
    return first + (second - first) * (place - np.floor(place))


@jax.jit
def cut(
    images: Num[Array, "b h w c"],
    ends: Float[Array, "b c 2"],
    rows: Taps,
    columns: Taps,
) -> Float[Array, "b rows columns c"]:
    """Normalised, rescaled and padded images with the tiles' overlap in them: `(tiles × side)` rows and columns."""
    images = jnp.nan_to_num(
        (images.astype(jnp.float32) - ends[:, None, None, :, 0]) / ends[:, None, None, :, 1]
    )
    return jax.vmap(lambda image: _resample(image, rows, columns))(images)


@partial(jax.jit, static_argnames=("tiles", "count"))
def chunk(
    joined: Float[Array, "b rows columns c"], tiles: tuple[int, int], start: Array, count: int
) -> Array:
    """Tiles `start` to `start + count` of a batch of images as (count, side, side, c), zeros beyond the last."""
    b, rows, columns, c = joined.shape
    down, across = tiles
    split = joined.reshape(b, down, rows // down, across, columns // across, c).swapaxes(2, 3)
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
    """The network's maps of whole images, at the image's own scale, averaged where tiles overlap."""
    down, across = tiles
    every = jnp.concatenate(chunks)[: images * down * across]
    _, high, wide, c = every.shape
    laid = every.reshape(images, down, across, high, wide, c).swapaxes(2, 3)
    laid = laid.reshape(images, down * high, across * wide, c)
    return jax.vmap(lambda image: _resample(image, rows, columns))(laid)


def _resample(image: Float[Array, "h w c"], rows: Taps, columns: Taps) -> Float[Array, "h2 w2 c"]:
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
    rows: Integer[np.ndarray, " n"], of: int, size: int, precision: type = np.float64
) -> Taps:
    """Bilinear interpolation of `size` pixels at `rows` of the `of` that they are stretched to; edges repeat."""
    if of == size:
        return Taps(rows[:, None], np.ones((len(rows), 1)))
    source: np.ndarray = ((rows + 0.5) * (size / of) - 0.5).astype(precision)
    first = np.floor(source).astype(int)
    fraction = np.where((first < 0) | (first >= size - 1), 0, source - first)
    first = np.clip(first, 0, size - 1)
    return Taps(
        np.stack([first, np.minimum(first + 1, size - 1)], 1), np.stack([1 - fraction, fraction], 1)
    )


def _taper(side: int) -> Float[np.ndarray, " side"]:
    """The middle of the package's curve, which is made for tiles of 224 pixels or more."""
    full = max(side, TILE)
    distance = np.abs(np.arange(full) - (full - 1) / 2)
    curve = 1 / (1 + np.exp((distance - (full / 2 - 20)) / TAPER))
    return curve[full // 2 - side // 2 : full // 2 + side // 2 + side % 2]


def _compact(index: np.ndarray, weight: np.ndarray) -> Taps:
    """The same sums with no more taps than any row needs."""
    order = np.argsort(weight == 0, axis=1, kind="stable")
    most = max(int((weight != 0).sum(1).max()), 1)
    return Taps(*(np.take_along_axis(values, order, 1)[:, :most] for values in (index, weight)))


def _padded(taps: Taps, rows: int) -> Taps:
    more = ((0, rows - len(taps.index)), (0, 0))
    return Taps(
        np.pad(taps.index, more).astype(np.int32), np.pad(taps.weight, more).astype(np.float32)
    )
