"""Augmentation and normalization on the device: from stored sites to network input, inside jit.

Transform. Flip, rotation and random resized crop are one affine map from output pixels to source
positions: p = about + R M (center + size * step - about), with rotation R, flips M and the pixel
grid `step` in [-0.5, 0.5]. Its matrix is one product for each record (`_source_points`). Each
output pixel is then read once: bilinear in the image, nearest pixel in the mask, so that instance
labels are never mixed. Image and mask use the same positions. The crop box lies inside the site and
rotates about its center; positions outside the site are reflected at its border.

Downsampling. Where a crop is larger than the output, bilinear sampling would skip pixels. The image
is therefore averaged over 2^n x 2^n blocks first (a mipmap level). n is chosen for each record such
that the remaining factor lies between 0.7 and 1.4.

Matrix products. TPUs read single pixels slowly but multiply matrices fast. There, sampling is
written as products of interpolation weights and pixels (`models.kernels.resampling`); CPUs and GPUs
gather pixels by index.

Randomness. The random key of a record is a function of (seed, epoch, record), see `record_keys`.
The result does not depend on batch, device, pipeline or resumption.
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
from perturbjax.data.normalization import normalize
from perturbjax.models.kernels import resampling

#: Uniform random numbers for the geometry of a record, in this order.
_GEOMETRY = ("area", "ratio", "top", "left", "angle", "flip_vertical", "flip_horizontal")


class RawBatch(NamedTuple):
    """A batch of stored sites: a pytree of host or device arrays."""

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
    shift: Float32[Array, "b kc"]
    """Shift and scale of each channel, see `normalization.normalize`."""
    scale: Float32[Array, "b kc"]


def record_keys(
    seed: int | Int[Array, ""], epoch: int | Int[Array, ""], records: Int[Array | np.ndarray, " b"]
) -> Key[Array, " b"]:
    """Return the random key of each record in an epoch; it does not depend on the batch."""
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
    keys: Key[Array, " b"] | None = None,
) -> Float32[Array, "b crop crop channels"]:
    """Convert a batch of stored sites to network input. Pure function, for use inside jit.

    Args:
        raw: B stored sites.
        seed, epoch: of the random keys; can be traced.
        augment: crop size and ranges of random changes. `legacy_augmentation` reproduces the
            original program: flips and rotation (about the center of the site, zeros outside)
            change the image but not its mask, the crop changes both and interpolates mask labels,
            and evaluation is augmented, too.
        input: normalization and mask encoding.
        train: True augments. False resizes the whole site to `augment.crop` without any randomness.
        keys: random key of each row; None uses that of its record.

    Returns:
        (B, crop, crop, 1 + copies * C): the mask as channel 0, then the normalized image.
    """
    _, height, width, _ = raw.image.shape
    channels = raw.shift.shape[1]
    random = train or augment.legacy_augmentation
    keys = record_keys(seed, epoch, raw.record) if keys is None else keys
    # (B, 7 + 2 * kc) numbers in [0, 1): geometry, then contrast and brightness of each channel.
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(_GEOMETRY) + 2 * channels,)))(keys)
    boxes = (
        _random_boxes(draws, height, width, augment)
        if random
        else _whole_sites(draws, height, width)
    )

    # Crop without rotation and flips, for the mask of the original program.
    upright = boxes._replace(angle=jnp.zeros_like(boxes.angle), mirror=jnp.ones_like(boxes.mirror))
    if augment.legacy_augmentation:
        # The original program rotates about the center of the site, not of the crop.
        image_points = _source_points(boxes, jnp.array([[height / 2, width / 2]]), augment.crop)
        mask_points = _source_points(upright, boxes.center, augment.crop)
    else:
        image_points = mask_points = _source_points(boxes, boxes.center, augment.crop)
    # Whole sites that have the size of the output are not sampled. Sampling gives the same values
    # if the size is a power of 2; other sizes have rounded positions and are sampled as before.
    is_exact = augment.crop.bit_count() == 1
    unchanged = not random and is_exact and height == width == augment.crop
    image = raw.image.astype(jnp.float32)
    if not unchanged:
        image = _sample_image(raw.image, image_points, boxes, augment, random)
    image = normalize(image, raw.shift, raw.scale, input.normalize)
    if augment.legacy_augmentation:
        image = jnp.where(_inside(image_points, height, width)[..., None], image, 0)
    if random:
        image = _change_intensity(image, draws[:, len(_GEOMETRY) :], augment)
    if augment.legacy_augmentation:
        mask = _sample_image(raw.mask[..., None], mask_points, boxes, augment, random)[..., 0]
    elif unchanged:
        mask = raw.mask.astype(jnp.float32)
    else:
        mask = _sample_mask(raw.mask, mask_points, augment, random)
    mask = mask * MASK_ENCODINGS[input.mask_encoding].scale
    # Unused inputs become zeros, so that the network has the same number of channels.
    return _join(
        jnp.zeros_like(mask) if input.mask_use == "none" else mask,
        jnp.zeros_like(image) if input.mask_use == "only" else image,
    )


class _Boxes(NamedTuple):
    """Crop of each record, in pixels of the site: y before x, (0, 0) is the corner of the site."""

    center: Float[Array, "b 2"]
    size: Float[Array, "b 2"]
    angle: Float[Array, " b"]
    """Radians, counterclockwise in the displayed crop."""
    mirror: Float[Array, "b 2"]
    """-1 where flipped, else 1."""


class _Points(NamedTuple):
    """Source position of the center of each output pixel, in pixels from the corner of the site."""

    y: Float[Array, "b crop crop"]
    x: Float[Array, "b crop crop"]


def _whole_sites(draws: Float[Array, "b n"], height: int, width: int) -> _Boxes:
    b = draws.shape[0]  # `len` fails for the symbolic batch size of `perturbjax export`
    size = jnp.broadcast_to(jnp.array([height, width], jnp.float32), (b, 2))
    return _Boxes(size / 2, size, jnp.zeros(b), jnp.ones((b, 2)))


def _random_boxes(
    draws: Float[Array, "b n"], height: int, width: int, augment: AugmentConfig
) -> _Boxes:
    """Draw random resized crops: uniform area, log-uniform aspect ratio, uniform position.

    Sizes are clipped to the site (torchvision draws again instead, up to ten times).
    """
    draw = dict(zip(_GEOMETRY, draws.T, strict=False))
    low, high = augment.crop_scale
    # Fraction of the site area, uniform in `crop_scale`.
    area = height * width * (low + (high - low) * draw["area"])
    log_low, log_high = map(math.log, augment.crop_ratio)
    ratio = jnp.exp(log_low + (log_high - log_low) * draw["ratio"])
    site = jnp.array([height, width], jnp.float32)
    # The ratio is width / height, hence height^2 = area / ratio.
    size = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=1)), site)
    corner = (site - size) * jnp.stack([draw["top"], draw["left"]], axis=1)
    angle = jnp.deg2rad(augment.rotate) * (2 * draw["angle"] - 1)
    flips = jnp.stack([draw["flip_vertical"], draw["flip_horizontal"]], axis=1)
    mirror = jnp.where((flips < 0.5) & augment.flip, -1.0, 1.0)
    return _Boxes(corner + size / 2, size, angle, mirror)


def _source_points(boxes: _Boxes, about: Float[Array, "#b 2"], crop: int) -> _Points:
    """Compute p = about + R M (center + size * step - about), with one matrix per record."""
    cos, sin = jnp.cos(boxes.angle), jnp.sin(boxes.angle)
    # R M, (b, 2, 2): the flips scale the columns of the rotation matrix.
    rotation = jnp.stack([cos, sin, -sin, cos], axis=1).reshape(-1, 2, 2) * boxes.mirror[:, None]
    about = jnp.broadcast_to(about, boxes.center.shape)
    to_rotated = jnp.concatenate([rotation, about[..., None]], axis=2)
    # (b, 3, 3) in homogeneous coordinates: step -> center + size * step - about.
    to_site = jnp.concatenate(
        [jax.vmap(jnp.diag)(boxes.size), (boxes.center - about)[..., None]], axis=2
    )
    to_site = jnp.concatenate(
        [to_site, jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0]), (about.shape[0], 1, 3))], axis=1
    )
    # One matrix product: XLA on CPUs would otherwise recompute the matrix for every pixel.
    matrix = jnp.matmul(to_rotated, to_site, precision="highest")
    # Centers of the output pixels, in fractions of the crop.
    step = (jnp.arange(crop) + 0.5) / crop - 0.5

    def separately(matrix: Float[Array, "b 2 3"]) -> list[Float[Array, "b crop"]]:
        return [matrix[:, axis, column, None] * step for axis in (0, 1) for column in (0, 1)]

    def together(matrix: Float[Array, "b 2 3"]) -> list[Float[Array, "b crop"]]:
        steps = matrix[:, :, :2, None] * step
        return [steps[:, axis, column] for axis in (0, 1) for column in (0, 1)]

    # A GPU starts one kernel instead of four; a CPU fuses the products into the sums below.
    y_by_y, y_by_x, x_by_y, x_by_x = jax.lax.platform_dependent(
        matrix, cuda=together, default=separately
    )
    # Broadcast (b, crop, 1) + (b, 1, crop) + (b, 1, 1).
    y = y_by_y[:, :, None] + y_by_x[:, None] + matrix[:, 0, 2, None, None]
    x = x_by_y[:, :, None] + x_by_x[:, None] + matrix[:, 1, 2, None, None]
    return _Points(y, x)


def _inside(points: _Points, height: int, width: int) -> Bool[Array, "b crop crop"]:
    y, x = points
    return (y >= 0) & (y <= height) & (x >= 0) & (x <= width)


def _reflect(position: Float[Array, "*shape"], length: int) -> Float[Array, "*shape"]:
    """Reflect positions outside [0, length] at the borders."""
    # A triangle wave of period 2 * length: reduce to [0, 2 * length), then fold at `length`.
    position = position - 2 * length * jnp.floor(position / (2 * length))
    return length - jnp.abs(length - position)


def _nearest(mask: UInt[Array, "b h w"], points: _Points) -> UInt[Array, "b crop crop"]:
    b, height, width = mask.shape
    # Pixel i covers [i, i + 1), so truncation gives its index.
    row = jnp.clip(_reflect(points.y, height).astype(jnp.int32), 0, height - 1)
    column = jnp.clip(_reflect(points.x, width).astype(jnp.int32), 0, width - 1)
    return _take(mask.reshape(b, -1), row * width + column)


def mip_levels(height: int, width: int, augment: AugmentConfig, random: bool) -> range:
    """Return the averaging levels that crops of a site can use; level n is the mean of 2^n × 2^n
    pixels.
    """
    whole = math.sqrt(height * width) / augment.crop
    low, high = augment.crop_scale if random else (1.0, 1.0)
    first, last = (max(0, round(math.log2(whole * math.sqrt(area)))) for area in (low, high))
    return range(first, last + 1)


def _sample_image(
    image: UInt[Array, "b h w c"],
    points: _Points,
    boxes: _Boxes,
    augment: AugmentConfig,
    random: bool,
) -> Float[Array, "b crop crop c"]:
    """Sample points bilinearly, at the averaging level closest to the resolution of the output."""
    levels = mip_levels(image.shape[1], image.shape[2], augment, random)
    shrink = jnp.sqrt(boxes.size[:, 0] * boxes.size[:, 1]) / augment.crop
    level = jnp.clip(jnp.round(jnp.log2(shrink)), levels[0], levels[-1])

    def by_index(image: Array, points: _Points, level: Array) -> Array:
        # All levels are sampled, because shapes inside jit cannot depend on data.
        pixels = _halvings(image, levels)
        sampled = _bilinear(next(pixels), points, 2 ** levels[0])
        for number, smaller in zip(levels[1:], pixels, strict=True):
            values = _bilinear(smaller, points, 2**number)
            sampled = jnp.where(level[:, None, None, None] == number, values, sampled)
        return sampled

    def by_products(image: Array, points: _Points, level: Array) -> Array:
        step = _longest_step(image.shape[1], image.shape[2], levels, augment, random)
        return resampling.bilinear(
            list(_halvings(image, levels)), _grid(points, level, levels, step)
        )

    return jax.lax.platform_dependent(image, points, level, tpu=by_products, default=by_index)


def _sample_mask(
    mask: UInt[Array, "b h w"], points: _Points, augment: AugmentConfig, random: bool
) -> Float[Array, "b crop crop"]:
    """Read the mask pixel at each point."""

    def by_index(mask: Array, points: _Points) -> Array:
        return _nearest(mask, points).astype(jnp.float32)

    def by_products(mask: Array, points: _Points) -> Array:
        _, height, width = mask.shape
        step = _longest_step(height, width, range(1), augment, random)
        return resampling.nearest(
            mask, _grid(points, jnp.zeros_like(points.y[:, 0, 0]), range(1), step)
        )

    return jax.lax.platform_dependent(mask, points, tpu=by_products, default=by_index)


def _grid(
    points: _Points, level: Float[Array, " b"], levels: range, step: float | None
) -> resampling.Grid:
    """Convert points to pixels of the averaging level of each record."""
    # The grid counts from the center of the first pixel, points from its corner: hence - 0.5.
    block = jnp.exp2(-level)[:, None, None]
    return resampling.Grid(
        points.y * block - 0.5, points.x * block - 0.5, level.astype(jnp.int32) - levels[0], step
    )


def _longest_step(
    height: int, width: int, levels: range, augment: AugmentConfig, random: bool
) -> float | None:
    """Return the maximum distance between adjacent points, in pixels of their averaging level.

    None without rotation.

    All levels but the last serve crops of up to √2 times the output resolution; `crop_ratio` then
    limits their longer edge. Clipped crops have the aspect ratio of the site at most.
    """
    if not (random and augment.rotate):
        return None
    # Largest possible ratio of the longer to the shorter edge of a crop.
    ratio = max(augment.crop_ratio[1], 1 / augment.crop_ratio[0], height / width, width / height)
    longest = math.sqrt(2 * ratio) * augment.crop
    lengths = [min(longest, max(height, width) / 2**level) for level in levels[:-1]]
    return max([*lengths, max(height, width) / 2 ** levels[-1]]) / augment.crop


def _halvings(image: UInt[Array, "b h w c"], levels: range) -> Iterator[Array]:
    """Yield the image at each averaging level."""
    pixels: Array = image
    for level in range(levels[-1] + 1):
        pixels = _halve(pixels) if level else pixels
        if level in levels:
            yield pixels


def _halve(image: Array) -> Float[Array, "b h w c"]:
    """Average 2 × 2 pixels; an odd last row or column is repeated."""
    pad = ((0, 0), (0, image.shape[1] % 2), (0, image.shape[2] % 2), (0, 0))
    image = jnp.pad(image, pad, mode="edge") if any(map(any, pad)) else image
    corners = (image[:, top::2, left::2].astype(jnp.float32) for top in (0, 1) for left in (0, 1))
    return reduce(add, corners) / 4


def _bilinear(image: Array, points: _Points, block: int) -> Float[Array, "b crop crop c"]:
    """Sample points bilinearly in an image whose pixels are block × block pixels of the site."""
    b, rows, columns, c = image.shape
    # Coordinates that count from the center of the first pixel of the averaging level.
    y = jnp.clip(_reflect(points.y / block, rows) - 0.5, 0, rows - 1)
    x = jnp.clip(_reflect(points.x / block, columns) - 0.5, 0, columns - 1)
    # At the last row, top = rows - 2 and down = 1, so that all four neighbors exist.
    top = jnp.minimum(y.astype(jnp.int32), rows - 2)
    left = jnp.minimum(x.astype(jnp.int32), columns - 2)
    down, right = (y - top)[..., None], (x - left)[..., None]
    pixels, corner = image.reshape(b, rows * columns, c), top * columns + left

    def row(index: Int[Array, "b crop crop"]) -> Float[Array, "b crop crop c"]:
        return (
            _take(pixels, index).astype(jnp.float32) * (1 - right)
            + _take(pixels, index + 1).astype(jnp.float32) * right
        )

    return row(corner) * (1 - down) + row(corner + columns) * down


def _take(pixels: Array, index: Int[Array, "b crop crop"]) -> Array:
    """Gather pixels of each record at flat indices, which must be in bounds."""
    return jax.vmap(lambda source, flat: source.at[flat].get(mode="promise_in_bounds"))(
        pixels, index
    )


def _change_intensity(
    image: Float[Array, "b crop crop c"], draws: Float[Array, "b 2*c"], augment: AugmentConfig
) -> Float[Array, "b crop crop c"]:
    """Multiply by a random contrast and add a random brightness for each record and channel."""
    # Two arrays in [-1, 1), each (b, 1, 1, kc).
    contrast, brightness = jnp.split((2 * draws - 1)[:, None, None, :], 2, axis=-1)
    if augment.contrast:
        image = image * (1 + augment.contrast * contrast)
    if augment.brightness:
        image = image + augment.brightness * brightness
    return image


def _join(
    mask: Float[Array, "b crop crop"], image: Float[Array, "b crop crop c"]
) -> Float[Array, "b crop crop 1+c"]:
    """Put the mask in channel 0. Written in place, since concatenation takes three times as long on
    CPUs.
    """
    *shape, c = image.shape
    return jnp.zeros((*shape, 1 + c)).at[..., 0].set(mask).at[..., 1:].set(image)
