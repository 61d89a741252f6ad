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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt

from perturbjax import masks
from perturbjax.config import AugmentConfig, InputConfig

#: Keeps the draws made here apart from others (dropout's) made with the same record's key.
_AUGMENTATION = 0x61756700
#: Uniform draws a record needs for its geometry, in this order.
_GEOMETRY = ("area", "ratio", "top", "left", "angle", "flip_vertical", "flip_horizontal")


class RawBatch(NamedTuple):
    """A batch of sites as a feed gives it; a pytree of host or device arrays."""

    image: UInt[Array, "b h w c"]
    """Stored integers."""
    mask: UInt[Array, "b h w"]
    """Encoded by `masks.encode`."""
    label: Int32[Array, " b"]
    """Index of the class."""
    record: Int32[Array, " b"]
    """Position in the dataset."""
    weight: Float32[Array, " b"]
    """1 for a site, 0 for padding."""
    shift: Float32[Array, "b c"]
    """The model sees (image - shift) * scale."""
    scale: Float32[Array, "b c"]


class _Boxes(NamedTuple):
    """Where each record's crop lies in its site; lengths in pixels, y before x, (0, 0) the site's corner."""

    center: Float[Array, "b 2"]
    size: Float[Array, "b 2"]
    angle: Float[Array, " b"]
    """Radians."""
    mirror: Float[Array, "b 2"]
    """-1 where mirrored, else 1."""


def record_keys(seed: int | Int[Array, ""], epoch: int | Int[Array, ""], records: Int[Array, " b"]) -> Key[Array, " b"]:
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
) -> Float32[Array, "b crop crop 1+c"]:
    """Model input: channel 0 the mask, then the normalised image.

    With `train` the records are augmented; without, the whole site is resized to `augment.crop` and nothing is
    random. `legacy_augmentation` restores the original instead: flips and rotation (about the site's centre, zeros
    beyond its border) move the image and not its mask, the crop moves both, and evaluation is augmented too.

    Pure: `seed` and `epoch` may be traced; shapes follow from `raw` and `augment.crop`.
    """
    _, height, width, channels = raw.image.shape
    random = train or augment.legacy_augmentation
    keys = jax.vmap(jax.random.fold_in, (0, None))(record_keys(seed, epoch, raw.record), _AUGMENTATION)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(_GEOMETRY) + 2 * channels,)))(keys)
    boxes = _random_boxes(draws, height, width, augment) if random else _whole_sites(len(draws), height, width)

    upright = _box_grid(boxes, augment.crop)
    if augment.legacy_augmentation:
        moved = _turn(*upright, boxes, about=jnp.array([[height / 2, width / 2]]))
        mask = _nearest(raw.mask, *upright)
    else:
        moved = _turn(*upright, boxes, about=boxes.center)
        mask = _nearest(raw.mask, *moved)
    levels = _mip_levels(height, width, augment, random)
    image = _bilinear(raw.image, *moved, _level(boxes, augment.crop, levels), levels)
    image = (image - raw.shift[:, None, None]) * raw.scale[:, None, None]
    if augment.legacy_augmentation:
        image = jnp.where(_inside(*moved, height, width)[..., None], image, 0)
    if random:
        image = _change_intensity(image, draws[:, len(_GEOMETRY) :], augment)

    mask = mask.astype(jnp.float32)[..., None] * masks.SCALES[input.mask_encoding]
    mask = jnp.zeros_like(mask) if input.mask_use == "none" else mask
    image = jnp.zeros_like(image) if input.mask_use == "only" else image
    return jnp.concatenate([mask, image], axis=-1)


def _whole_sites(b: int, height: int, width: int) -> _Boxes:
    size = jnp.broadcast_to(jnp.array([height, width], jnp.float32), (b, 2))
    return _Boxes(size / 2, size, jnp.zeros(b), jnp.ones((b, 2)))


def _random_boxes(draws: Float[Array, "b n"], height: int, width: int, augment: AugmentConfig) -> _Boxes:
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


def _box_grid(boxes: _Boxes, crop: int) -> tuple[Float[Array, "b crop crop"], Float[Array, "b crop crop"]]:
    """(y, x) in the site, in pixels, of every output pixel's centre, before turning and mirroring."""
    steps = (jnp.arange(crop) + 0.5) / crop - 0.5
    y, x = (boxes.center[:, axis, None] + boxes.size[:, axis, None] * steps for axis in (0, 1))
    shape = (len(y), crop, crop)
    return jnp.broadcast_to(y[:, :, None], shape), jnp.broadcast_to(x[:, None, :], shape)


def _turn(
    y: Float[Array, "b crop crop"], x: Float[Array, "b crop crop"], boxes: _Boxes, *, about: Float[Array, "#b 2"]
) -> tuple[Float[Array, "b crop crop"], Float[Array, "b crop crop"]]:
    """Mirror and rotate points about a point."""
    about_y, about_x = about[:, 0, None, None], about[:, 1, None, None]
    dy = (y - about_y) * boxes.mirror[:, 0, None, None]
    dx = (x - about_x) * boxes.mirror[:, 1, None, None]
    cos, sin = jnp.cos(boxes.angle)[:, None, None], jnp.sin(boxes.angle)[:, None, None]
    return about_y + cos * dy + sin * dx, about_x - sin * dy + cos * dx


def _inside(y: Float[Array, "b crop crop"], x: Float[Array, "b crop crop"], height: int, width: int) -> Array:
    return (y >= 0) & (y <= height) & (x >= 0) & (x <= width)


def _reflect(position: Float[Array, "..."], length: int) -> Float[Array, "..."]:
    """Fold positions outside [0, length] back in, as if the site were mirrored at its borders."""
    return length - jnp.abs(jnp.mod(position, 2 * length) - length)


def _nearest(
    mask: UInt[Array, "b h w"], y: Float[Array, "b crop crop"], x: Float[Array, "b crop crop"]
) -> UInt[Array, "b crop crop"]:
    b, height, width = mask.shape
    row = jnp.clip(_reflect(y, height).astype(jnp.int32), 0, height - 1)
    column = jnp.clip(_reflect(x, width).astype(jnp.int32), 0, width - 1)
    return _take(mask.reshape(b, -1), row * width + column)


def _mip_levels(height: int, width: int, augment: AugmentConfig, random: bool) -> range:
    """The block-averaging levels that boxes of this configuration can need (level n averages 2^n × 2^n pixels)."""
    whole = math.sqrt(height * width) / augment.crop
    low, high = augment.crop_scale if random else (1.0, 1.0)
    first, last = (max(0, round(math.log2(whole * math.sqrt(share)))) for share in (low, high))
    return range(first, last + 1)


def _level(boxes: _Boxes, crop: int, levels: range) -> Int[Array, " b"]:
    """The level, counted from the first of `levels`, that leaves each box nearest to its output's resolution."""
    shrink = jnp.sqrt(boxes.size[:, 0] * boxes.size[:, 1]) / crop
    return jnp.clip(jnp.round(jnp.log2(shrink)).astype(jnp.int32), levels[0], levels[-1]) - levels[0]


def _bilinear(
    image: UInt[Array, "b h w c"],
    y: Float[Array, "b crop crop"],
    x: Float[Array, "b crop crop"],
    level: Int[Array, " b"],
    levels: range,
) -> Float[Array, "b crop crop c"]:
    """Look every point up between its four neighbours, in the record's own level of its pyramid."""
    b, height, width, c = image.shape
    pyramid = [_block_mean(image, 2**n) for n in levels]
    pixels = jnp.concatenate([stage.reshape(b, -1, c) for stage in pyramid], axis=1)
    starts = [0]
    for stage in pyramid[:-1]:
        starts.append(starts[-1] + stage.shape[1] * stage.shape[2])
    stages = [(at, *stage.shape[1:3], 2**n) for at, stage, n in zip(starts, pyramid, levels, strict=True)]
    start, rows, columns, block = (column[:, None, None] for column in jnp.array(stages)[level].T)

    y = jnp.clip(_reflect(y, height) / block - 0.5, 0, rows - 1)
    x = jnp.clip(_reflect(x, width) / block - 0.5, 0, columns - 1)
    top = jnp.minimum(jnp.floor(y), rows - 2)
    left = jnp.minimum(jnp.floor(x), columns - 2)
    down, right = (y - top)[..., None], (x - left)[..., None]
    corner = start + top.astype(jnp.int32) * columns + left.astype(jnp.int32)

    def row(at: Int[Array, "b crop crop"]) -> Float[Array, "b crop crop c"]:
        return _take(pixels, at).astype(jnp.float32) * (1 - right) + _take(pixels, at + 1).astype(jnp.float32) * right

    return row(corner) * (1 - down) + row(corner + columns) * down


def _block_mean(image: UInt[Array, "b h w c"], block: int) -> Array:
    """Mean over block × block pixels, float32; the border is repeated where the size is no multiple."""
    if block == 1:
        return image
    b, height, width, c = image.shape
    rows, columns = -(-height // block), -(-width // block)
    pad = ((0, 0), (0, rows * block - height), (0, columns * block - width), (0, 0))
    tiles = jnp.pad(image, pad, mode="edge").reshape(b, rows, block, columns, block, c)
    return tiles.astype(jnp.float32).mean((2, 4))


def _take(pixels: Array, at: Int[Array, "b crop crop"]) -> Array:
    """Each record's pixels at flat positions that are known to be inside."""
    return jax.vmap(lambda source, index: source.at[index].get(mode="promise_in_bounds"))(pixels, at)


def _change_intensity(
    image: Float[Array, "b crop crop c"], draws: Float[Array, "b 2c"], augment: AugmentConfig
) -> Float[Array, "b crop crop c"]:
    """Contrast (a factor) and brightness (a sum), drawn for each record and channel."""
    contrast, brightness = jnp.split((2 * draws - 1)[:, None, None, :], 2, axis=-1)
    if augment.contrast:
        image = image * (1 + augment.contrast * contrast)
    if augment.brightness:
        image = image + augment.brightness * brightness
    return image
