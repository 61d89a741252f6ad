"""Cut random crops of images and training targets on the device.

Rotation, mirroring and zoom are one affine transformation with bilinear sampling. The flow is a
vector field: it is rotated and mirrored with the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key

from perturbjax.core.options import python_only, require, require_sound
from perturbjax.segmentation.diameters import measure_diameters
from perturbjax.segmentation.flow_targets import masks_to_flows
from perturbjax.segmentation.image_folders import LabeledImage


@dataclass(frozen=True)
class CropConfig:
    """Random crops

    Values are drawn uniformly from each range, factors on a logarithmic scale.
    """

    crop: int = python_only(128)
    """Height and width of a crop in pixels; a multiple of 16."""
    diameter: float = 22.0
    """Diameter in pixels that the typical object of an image is rescaled to."""
    zoom: float = python_only(1.7)
    """Maximum factor of random enlargement and reduction."""
    gamma: float = python_only(1.6)
    """Maximum gamma; the minimum is 1 / gamma."""
    contrast: float = python_only(1.4)
    """Maximum contrast factor; the minimum is 1 / contrast."""
    brightness: float = python_only(0.08)
    """Maximum additive change of the intensity."""
    noise: float = python_only(0.06)
    """Maximum standard deviation of added noise."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("crop", self.crop, self.crop >= 16 and self.crop % 16 == 0, "a multiple of 16")
        require("diameter", self.diameter, self.diameter > 0, "greater than 0")
        require("zoom", self.zoom, self.zoom >= 1, "1 or more")
        require("gamma", self.gamma, self.gamma >= 1, "1 or more")
        require("contrast", self.contrast, self.contrast >= 1, "1 or more")
        require("brightness", self.brightness, self.brightness >= 0, "0 or more")
        require("noise", self.noise, self.noise >= 0, "0 or more")


class Pool(NamedTuple):
    """Pixels of all training images in one array, and the position of each image in it."""

    pixels: Float16[Array, "pixels 4"]
    """Intensity, 1 inside an object, flow down, flow right."""
    start: Int[Array, " n"]
    size: Int[Array, "n 2"]
    scale: Float[Array, " n"]
    """Factor that brings the objects of an image to the diameter of training."""
    probability: Float[Array, " n"]
    """Of drawing an image: proportional to the square root of its number of objects, so that
    neither crowded nor sparse images dominate."""


class Crops(NamedTuple):
    """One batch."""

    image: Float[Array, "b crop crop 1"]
    inside: Float[Array, "b crop crop"]
    """1 inside an object, 0 outside, in between at outlines."""
    flow: Float[Array, "b crop crop 2"]
    weight: Float[Array, "b crop crop"]
    """0 outside the image, else 1."""


def make_pool(images: list[LabeledImage], config: CropConfig) -> Pool:
    """Compute the targets of all images and move them to the device."""
    parts, sizes, scales, weights = [], [], [], []
    for image in images:
        flow = masks_to_flows(image.labels)
        inside = (image.labels > 0).astype(np.float32)
        # (pixels, 4): images of different sizes are stored one after the other in one list of
        # pixels.
        parts.append(np.stack([image.image, inside, *flow], -1).reshape(-1, 4).astype(np.float16))
        sizes.append(image.labels.shape)
        diameters = measure_diameters(image.labels)
        # A factor above 4 would enlarge pixels instead of objects.
        scales.append(
            np.clip(config.diameter / np.median(diameters), 1 / 8, 4) if len(diameters) else 1.0
        )
        weights.append(math.sqrt(len(diameters) + 1))
    # Index of the first pixel of each image in this list.
    start = np.cumsum([0] + [len(part) for part in parts[:-1]])
    probability = np.asarray(weights) / sum(weights)
    return Pool(
        jnp.asarray(np.concatenate(parts)),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(probability, jnp.float32),
    )


def draw(pool: Pool, keys: Key[Array, " b"], config: CropConfig) -> Crops:
    """Draw one crop per key with random rotation, mirroring, zoom and intensity."""
    return jax.vmap(lambda key: _crop(pool, key, config))(keys)


def _crop(pool: Pool, key: Array, config: CropConfig) -> Crops:
    image_key, geometry_key, intensity_key, noise_key = jax.random.split(key, 4)
    number = jax.random.choice(image_key, len(pool.probability), p=pool.probability)
    y, x, angle, mirror, zoom = jax.random.uniform(geometry_key, (5,))
    size = pool.size[number].astype(jnp.float32)
    # Uniform on a logarithmic scale, from 1 / zoom to zoom.
    scale = pool.scale[number] * config.zoom ** (2 * zoom - 1)
    angle = 2 * math.pi * angle
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # From directions in the crop to directions in the image: mirroring, then rotation.
    turn = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])]) * jnp.stack(
        [1.0, jnp.where(mirror < 0.5, -1, 1)]
    )
    # From here on in pixels of the image, not of the crop.
    half = config.crop / 2 / scale
    # A crop larger than the image is centered on it; otherwise its center keeps away from the
    # edges.
    margin = jnp.minimum(0.8 * half, size / 2)
    center = margin + (size - 2 * margin) * jnp.stack([y, x])
    step = (jnp.arange(config.crop) + 0.5 - config.crop / 2) / scale
    # (2, crop, crop): row and column in the image of each pixel of the crop.
    position = (
        (turn[:, 0, None, None] * step[:, None] + turn[:, 1, None, None] * step)
        + center[:, None, None]
        - 0.5
    )
    values, weight = _sample_bilinear(pool, number, position)
    # The inverse of a rotation is its transpose.
    flow = jnp.einsum("hwi,ij->hwj", values[..., 2:], turn)
    image = _change_intensity(values[..., 0], intensity_key, noise_key, config) * weight
    return Crops(image[..., None], values[..., 1], flow, weight)


def _sample_bilinear(
    pool: Pool, number: Int[Array, ""], position: Float[Array, "2 h w"]
) -> tuple[Float[Array, "h w 4"], Float[Array, "h w"]]:
    """Return interpolated pixels, and 1 for positions inside the image."""
    height, width = pool.size[number]
    last = jnp.stack([height, width])[:, None, None] - 1
    inside = ((position > -0.5) & (position < last + 0.5)).all(0)
    position = jnp.clip(position, 0, last)
    # The upper left of the four neighbors. It ends one pixel before the last, so that all four
    # exist.
    first = jnp.minimum(position.astype(jnp.int32), last - 1)
    y, x = (position - first)[..., None]
    corner = pool.start[number] + first[0] * width + first[1]

    def read(shift: Array | int) -> Array:
        return pool.pixels.at[corner + shift].get(mode="promise_in_bounds").astype(jnp.float32)

    top = read(0) * (1 - x) + read(1) * x
    bottom = read(width) * (1 - x) + read(width + 1) * x
    weight = inside.astype(jnp.float32)
    return (top * (1 - y) + bottom * y) * weight[..., None], weight


def _change_intensity(
    image: Float[Array, "h w"], key: Array, noise_key: Array, config: CropConfig
) -> Float[Array, "h w"]:
    power, factor, offset, noise = jax.random.uniform(key, (4,), minval=-1)
    # Normalized intensities may be negative, so gamma acts on the absolute value.
    image = jnp.sign(image) * (jnp.abs(image) + 1e-6) ** (config.gamma**power)
    image = image * config.contrast**factor + config.brightness * offset
    # Half of the crops get no noise.
    return image + config.noise * jnp.maximum(noise, 0) * jax.random.normal(noise_key, image.shape)
