"""From a batch of stored sites to the model's input: image and mask moved together, on the device.

Flips, rotation and the random resized crop are one affine resampling: each output pixel is looked up once in the
source, bilinearly in the image and by nearest pixel in the mask, so that labels never mix. The crop box lies inside
the site and turns about its own centre; what its corners reach beyond the site is the site mirrored at its border,
image and mask alike. Small sites are mostly such border, and mirrored cells teach more than a black frame would.

Where the resampling shrinks, the image is first averaged over 2^n × 2^n blocks, n chosen for each record so that
what is left to bridge is a factor between 0.7 and 1.4.

A record's changes follow from (seed, epoch, record) alone: neither the batch, the device nor the feed has a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt

from perturbjax.core.choices import MASK_ENCODINGS
from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data import normalization
from perturbjax.models.kernels import resampling as lookup

#: Uniform draws a record needs for its geometry, in this order.
_GEOMETRY = ("area", "ratio", "top", "left", "angle", "flip_vertical", "flip_horizontal")


class RawBatch(NamedTuple):
    """A batch of sites as a feed gives it; a pytree of host or device arrays."""

    image: UInt[Array, "b h w c"]
    """Stored integers."""
    mask: UInt[Array, "b h w"]
    """Encoded by `mask_encodings.encode`."""
    label: Int32[Array, " b"]
    """Index of the class."""
    record: Int32[Array, " b"]
    """Position in the dataset."""
    weight: Float32[Array, " b"]
    """1 for a site, 0 for padding."""
    shift: Float32[Array, "b seen"]
    """Of `normalization.normalize`, as is `scale`: all channels in each of k ways."""
    scale: Float32[Array, "b seen"]


def record_keys(
    seed: int | Int[Array, ""], epoch: int | Int[Array, ""], records: Int[Array | np.ndarray, " b"]
) -> Key[Array, " b"]:
    """The random key of each record in this epoch, whatever batch or device it is on."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, records)


def prepare(
    raw: RawBatch,
    *,
    seed: int | Int[Array, ""],
    epoch: int | Int[Array, ""],
    augment: AugmentConfig,
    input: InputConfig,
    train: bool,
) -> Float32[Array, "b crop crop planes"]:
    """Model input: channel 0 the mask, then the normalised image, k times where it is normalised in k ways.

    With `train` the records are augmented; without, the whole site is resized to `augment.crop` and nothing is
    random. `legacy_augmentation` restores the original instead: flips and rotation (about the site's centre, zeros
    beyond its border) move the image and not its mask, the crop moves both and interpolates the mask as it does the
    image, and evaluation is augmented too.

    Pure: `seed` and `epoch` may be traced; shapes follow from `raw` and `augment.crop`.
    """
    _, height, width, _ = raw.image.shape
    seen = raw.shift.shape[1]
    random = train or augment.legacy_augmentation
    keys = record_keys(seed, epoch, raw.record)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(_GEOMETRY) + 2 * seen,)))(keys)
    boxes = (
        _random_boxes(draws, height, width, augment)
        if random
        else _whole_sites(draws, height, width)
    )

    upright = boxes._replace(angle=jnp.zeros_like(boxes.angle), mirror=jnp.ones_like(boxes.mirror))
    if augment.legacy_augmentation:
        image_points = _points(boxes, jnp.array([[height / 2, width / 2]]), augment.crop)
        mask_points = _points(upright, boxes.center, augment.crop)
    else:
        image_points = mask_points = _points(boxes, boxes.center, augment.crop)
    image = _sample_image(raw.image, image_points, boxes, augment, random)
    image = normalization.normalize(image, raw.shift, raw.scale, input.normalize)
    if augment.legacy_augmentation:
        image = jnp.where(_inside(image_points, height, width)[..., None], image, 0)
    if random:
        image = _change_intensity(image, draws[:, len(_GEOMETRY) :], augment)
    if augment.legacy_augmentation:
        mask = _sample_image(raw.mask[..., None], mask_points, boxes, augment, random)[..., 0]
    else:
        mask = _sample_mask(raw.mask, mask_points, augment, random)
    mask = mask * MASK_ENCODINGS[input.mask_encoding].scale
    return _join(
        jnp.zeros_like(mask) if input.mask_use == "none" else mask,
        jnp.zeros_like(image) if input.mask_use == "only" else image,
    )


class _Boxes(NamedTuple):
    """Where each record's crop lies in its site; lengths in pixels, y before x, (0, 0) the site's corner."""

    center: Float[Array, "b 2"]
    size: Float[Array, "b 2"]
    angle: Float[Array, " b"]
    """Radians, counter-clockwise as the crop is seen."""
    mirror: Float[Array, "b 2"]
    """-1 where mirrored, else 1."""


class _Points(NamedTuple):
    """Where each output pixel's centre lies in the site, in pixels from the site's corner."""

    y: Float[Array, "b crop crop"]
    x: Float[Array, "b crop crop"]


def _whole_sites(draws: Float[Array, "b n"], height: int, width: int) -> _Boxes:
    b = draws.shape[0]  # not its length: `perturbjax export` asks for a batch of any size
    size = jnp.broadcast_to(jnp.array([height, width], jnp.float32), (b, 2))
    return _Boxes(size / 2, size, jnp.zeros(b), jnp.ones((b, 2)))


def _random_boxes(
    draws: Float[Array, "b n"], height: int, width: int, augment: AugmentConfig
) -> _Boxes:
    """Random resized crops: share of the area uniform, aspect ratio log-uniform, place uniform.

    A side longer than the site's is cut to it (torchvision draws again, up to ten times).
    """
    draw = dict(zip(_GEOMETRY, draws.T, strict=False))
    low, high = augment.crop_scale
    area = height * width * (low + (high - low) * draw["area"])
    log_low, log_high = map(math.log, augment.crop_ratio)
    ratio = jnp.exp(log_low + (log_high - log_low) * draw["ratio"])
    site = jnp.array([height, width], jnp.float32)
    size = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=1)), site)
    corner = (site - size) * jnp.stack([draw["top"], draw["left"]], axis=1)
    angle = jnp.deg2rad(augment.rotate) * (2 * draw["angle"] - 1)
    flips = jnp.stack([draw["flip_vertical"], draw["flip_horizontal"]], axis=1)
    mirror = jnp.where((flips < 0.5) & augment.flip, -1.0, 1.0)
    return _Boxes(corner + size / 2, size, angle, mirror)


def _points(boxes: _Boxes, about: Float[Array, "#b 2"], crop: int) -> _Points:
    """The boxes' pixels, mirrored and rotated about a point: p = about + R M (center + size · step - about)."""
    cos, sin = jnp.cos(boxes.angle), jnp.sin(boxes.angle)
    turn = jnp.stack([cos, sin, -sin, cos], axis=1).reshape(-1, 2, 2) * boxes.mirror[:, None]
    about = jnp.broadcast_to(about, boxes.center.shape)
    to_turn = jnp.concatenate([turn, about[..., None]], axis=2)
    to_site = jnp.concatenate(
        [jax.vmap(jnp.diag)(boxes.size), (boxes.center - about)[..., None]], axis=2
    )
    to_site = jnp.concatenate(
        [to_site, jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0]), (about.shape[0], 1, 3))], axis=1
    )
    # One product, since XLA's CPU would otherwise compute the matrix again for every pixel.
    matrix = jnp.matmul(to_turn, to_site, precision="highest")
    step = (jnp.arange(crop) + 0.5) / crop - 0.5

    def one_by_one(matrix: Float[Array, "b 2 3"]) -> list[Float[Array, "b crop"]]:
        return [matrix[:, axis, column, None] * step for axis in (0, 1) for column in (0, 1)]

    def at_once(matrix: Float[Array, "b 2 3"]) -> list[Float[Array, "b crop"]]:
        along = matrix[:, :, :2, None] * step
        return [along[:, axis, column] for axis in (0, 1) for column in (0, 1)]

    # A GPU starts one kernel in place of four; a CPU computes them where they are added.
    y_by_y, y_by_x, x_by_y, x_by_x = jax.lax.platform_dependent(
        matrix, cuda=at_once, default=one_by_one
    )
    y = y_by_y[:, :, None] + y_by_x[:, None] + matrix[:, 0, 2, None, None]
    x = x_by_y[:, :, None] + x_by_x[:, None] + matrix[:, 1, 2, None, None]
    return _Points(y, x)


def _inside(points: _Points, height: int, width: int) -> Bool[Array, "b crop crop"]:
    y, x = points
    return (y >= 0) & (y <= height) & (x >= 0) & (x <= width)


def _reflect(position: Float[Array, "*shape"], length: int) -> Float[Array, "*shape"]:
    """Fold positions outside [0, length] back in, as if the site were mirrored at its borders."""
    position = position - 2 * length * jnp.floor(position / (2 * length))
    return length - jnp.abs(length - position)


def _nearest(mask: UInt[Array, "b h w"], points: _Points) -> UInt[Array, "b crop crop"]:
    b, height, width = mask.shape
    row = jnp.clip(_reflect(points.y, height).astype(jnp.int32), 0, height - 1)
    column = jnp.clip(_reflect(points.x, width).astype(jnp.int32), 0, width - 1)
    return _take(mask.reshape(b, -1), row * width + column)


def mip_levels(height: int, width: int, augment: AugmentConfig, random: bool) -> range:
    """The averaging levels that crops of such a site can need; level n is the mean of 2^n × 2^n pixels."""
    whole = math.sqrt(height * width) / augment.crop
    low, high = augment.crop_scale if random else (1.0, 1.0)
    first, last = (max(0, round(math.log2(whole * math.sqrt(share)))) for share in (low, high))
    return range(first, last + 1)


def _sample_image(
    image: UInt[Array, "b h w c"],
    points: _Points,
    boxes: _Boxes,
    augment: AugmentConfig,
    random: bool,
) -> Float[Array, "b crop crop c"]:
    """Look points up in the level that leaves each box nearest to its output's resolution."""
    levels = mip_levels(image.shape[1], image.shape[2], augment, random)
    shrink = jnp.sqrt(boxes.size[:, 0] * boxes.size[:, 1]) / augment.crop
    wanted = jnp.clip(jnp.round(jnp.log2(shrink)), levels[0], levels[-1])

    def by_place(image: Array, points: _Points, wanted: Array) -> Array:
        pixels = _halvings(image, levels)
        sampled = _bilinear(next(pixels), points, 2 ** levels[0])
        for level, smaller in zip(levels[1:], pixels, strict=True):
            looked_up = _bilinear(smaller, points, 2**level)
            sampled = jnp.where(wanted[:, None, None, None] == level, looked_up, sampled)
        return sampled

    def by_products(image: Array, points: _Points, wanted: Array) -> Array:
        step = (
            _longest_step(image.shape[1], image.shape[2], levels, augment)
            if random and augment.rotate
            else None
        )
        return lookup.bilinear(list(_halvings(image, levels)), _grid(points, wanted, levels, step))

    return jax.lax.platform_dependent(image, points, wanted, tpu=by_products, default=by_place)


def _sample_mask(
    mask: UInt[Array, "b h w"], points: _Points, augment: AugmentConfig, random: bool
) -> Float[Array, "b crop crop"]:
    """Look points up in the pixel that they lie in."""

    def by_place(mask: Array, points: _Points) -> Array:
        return _nearest(mask, points).astype(jnp.float32)

    def by_products(mask: Array, points: _Points) -> Array:
        _, height, width = mask.shape
        step = (
            _longest_step(height, width, range(1), augment) if random and augment.rotate else None
        )
        return lookup.nearest(
            mask, _grid(points, jnp.zeros_like(points.y[:, 0, 0]), range(1), step)
        )

    return jax.lax.platform_dependent(mask, points, tpu=by_products, default=by_place)


def _grid(
    points: _Points, level: Float[Array, " b"], levels: range, step: float | None
) -> lookup.Grid:
    """The points in pixels of each record's averaging level."""
    block = jnp.exp2(-level)[:, None, None]
    return lookup.Grid(
        points.y * block - 0.5, points.x * block - 0.5, level.astype(jnp.int32) - levels[0], step
    )


def _longest_step(height: int, width: int, levels: range, augment: AugmentConfig) -> float:
    """The most that points of neighbouring output pixels lie apart, in pixels of their averaging level.

    A level but the last takes crops of up to √2 their output's resolution, as long as `crop_ratio` lets one side be;
    or as the site is, where a side was cut to the site's.
    """
    ratio = max(augment.crop_ratio[1], 1 / augment.crop_ratio[0], height / width, width / height)
    longest = math.sqrt(2 * ratio) * augment.crop
    sides = [min(longest, max(height, width) / 2**level) for level in levels[:-1]]
    return max([*sides, max(height, width) / 2 ** levels[-1]]) / augment.crop


def _halvings(image: UInt[Array, "b h w c"], levels: range) -> Iterator[Array]:
    """The image at each averaging level."""
    pixels: Array = image
    for level in range(levels[-1] + 1):
        pixels = _halve(pixels) if level else pixels
        if level in levels:
            yield pixels


def _halve(image: Array) -> Float[Array, "b h w c"]:
    """Mean of 2 × 2 pixels; the last row or column is repeated where their number is odd."""
    pad = ((0, 0), (0, image.shape[1] % 2), (0, image.shape[2] % 2), (0, 0))
    image = jnp.pad(image, pad, mode="edge") if any(map(any, pad)) else image
    corners = (image[:, top::2, left::2].astype(jnp.float32) for top in (0, 1) for left in (0, 1))
    return reduce(add, corners) / 4


def _bilinear(image: Array, points: _Points, block: int) -> Float[Array, "b crop crop c"]:
    """Look every point up between its four neighbours, in an image whose pixels are block × block of the site's."""
    b, rows, columns, c = image.shape
    y = jnp.clip(_reflect(points.y / block, rows) - 0.5, 0, rows - 1)
    x = jnp.clip(_reflect(points.x / block, columns) - 0.5, 0, columns - 1)
    top = jnp.minimum(y.astype(jnp.int32), rows - 2)
    left = jnp.minimum(x.astype(jnp.int32), columns - 2)
    down, right = (y - top)[..., None], (x - left)[..., None]
    pixels, corner = image.reshape(b, rows * columns, c), top * columns + left

    def row(at: Int[Array, "b crop crop"]) -> Float[Array, "b crop crop c"]:
        return (
            _take(pixels, at).astype(jnp.float32) * (1 - right)
            + _take(pixels, at + 1).astype(jnp.float32) * right
        )

    return row(corner) * (1 - down) + row(corner + columns) * down


def _take(pixels: Array, at: Int[Array, "b crop crop"]) -> Array:
    """Each record's pixels at flat positions that are known to be inside."""
    return jax.vmap(lambda source, index: source.at[index].get(mode="promise_in_bounds"))(
        pixels, at
    )


def _change_intensity(
    image: Float[Array, "b crop crop c"], draws: Float[Array, "b 2*c"], augment: AugmentConfig
) -> Float[Array, "b crop crop c"]:
    """Contrast (a factor) and brightness (a sum), drawn for each record and channel."""
    contrast, brightness = jnp.split((2 * draws - 1)[:, None, None, :], 2, axis=-1)
    if augment.contrast:
        image = image * (1 + augment.contrast * contrast)
    if augment.brightness:
        image = image + augment.brightness * brightness
    return image


def _join(
    mask: Float[Array, "b crop crop"], image: Float[Array, "b crop crop c"]
) -> Float[Array, "b crop crop 1+c"]:
    """The mask as channel 0. Written in place: a concatenation takes XLA's CPU three times as long."""
    *shape, c = image.shape
    return jnp.zeros((*shape, 1 + c)).at[..., 0].set(mask).at[..., 1:].set(image)
