"""Random crops of images and their targets, on the device: one affine resampling, and flows turned with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key

from perturbjax.core.options import python_only, require, require_sound
from perturbjax.segmentation.diameters import diameters
from perturbjax.segmentation.flow_targets import masks_to_flows
from perturbjax.segmentation.image_folders import Picture


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
    """All pictures' pixels, one after the other, and where each picture lies among them."""

    pixels: Float16[Array, "pixels 4"]
    """Intensity, 1 inside an object, flow down, flow right."""
    start: Int[Array, " n"]
    size: Int[Array, "n 2"]
    scale: Float[Array, " n"]
    """Factor that brings the picture's objects to the wanted diameter."""
    chance: Float[Array, " n"]
    """Of being drawn: as the root of the number of objects, so that neither crowded nor sparse pictures rule."""


class Crops(NamedTuple):
    image: Float[Array, "b crop crop 1"]
    inside: Float[Array, "b crop crop"]
    """1 in an object and 0 outside, between at outlines."""
    flow: Float[Array, "b crop crop 2"]
    weight: Float[Array, "b crop crop"]
    """0 beyond the picture."""


def pool(pictures: list[Picture], config: CropConfig) -> Pool:
    """The pictures with their targets, on the device."""
    parts, sizes, scales, chances = [], [], [], []
    for picture in pictures:
        flow = masks_to_flows(picture.labels)
        inside = (picture.labels > 0).astype(np.float32)
        parts.append(np.stack([picture.image, inside, *flow], -1).reshape(-1, 4).astype(np.float16))
        sizes.append(picture.labels.shape)
        widths = diameters(picture.labels)
        # Beyond a factor of 4 pixels would be magnified, not objects.
        scales.append(
            np.clip(config.diameter / np.median(widths), 1 / 8, 4) if len(widths) else 1.0
        )
        chances.append(math.sqrt(len(widths) + 1))
    start = np.cumsum([0] + [len(part) for part in parts[:-1]])
    chance = np.asarray(chances) / sum(chances)
    return Pool(
        jnp.asarray(np.concatenate(parts)),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(chance, jnp.float32),
    )


def draw(pool: Pool, keys: Key[Array, " b"], config: CropConfig) -> Crops:
    """A crop for each key, turned by any angle, mirrored, zoomed, and changed in intensity."""
    return jax.vmap(lambda key: _crop(pool, key, config))(keys)


def _crop(pool: Pool, key: Array, config: CropConfig) -> Crops:
    which, geometry, light, grain = jax.random.split(key, 4)
    number = jax.random.choice(which, len(pool.chance), p=pool.chance)
    y, x, angle, mirror, zoom = jax.random.uniform(geometry, (5,))
    size = pool.size[number].astype(jnp.float32)
    scale = pool.scale[number] * config.zoom ** (2 * zoom - 1)
    angle = 2 * math.pi * angle
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # From the crop's directions to the picture's: a rotation after a mirroring, of length 1.
    turn = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])]) * jnp.stack(
        [1.0, jnp.where(mirror < 0.5, -1, 1)]
    )
    half = config.crop / 2 / scale
    # A picture smaller than the crop is wholly in it; else the crop's middle keeps away from its edges.
    margin = jnp.minimum(0.8 * half, size / 2)
    middle = margin + (size - 2 * margin) * jnp.stack([y, x])
    step = (jnp.arange(config.crop) + 0.5 - config.crop / 2) / scale
    place = (
        (turn[:, 0, None, None] * step[:, None] + turn[:, 1, None, None] * step)
        + middle[:, None, None]
        - 0.5
    )
    values, weight = _bilinear(pool, number, place)
    flow = jnp.einsum(
        "hwi,ij->hwj", values[..., 2:], turn
    )  # the inverse of a rotation is its transpose
    image = _changed(values[..., 0], light, grain, config) * weight
    return Crops(image[..., None], values[..., 1], flow, weight)


def _bilinear(
    pool: Pool, number: Int[Array, ""], place: Float[Array, "2 h w"]
) -> tuple[Float[Array, "h w 4"], Float[Array, "h w"]]:
    high, wide = pool.size[number]
    last = jnp.stack([high, wide])[:, None, None] - 1
    inside = ((place > -0.5) & (place < last + 0.5)).all(0)
    place = jnp.clip(place, 0, last)
    first = jnp.minimum(place.astype(jnp.int32), last - 1)
    y, x = (place - first)[..., None]
    corner = pool.start[number] + first[0] * wide + first[1]

    def at(shift: Array | int) -> Array:
        return pool.pixels.at[corner + shift].get(mode="promise_in_bounds").astype(jnp.float32)

    top = at(0) * (1 - x) + at(1) * x
    bottom = at(wide) * (1 - x) + at(wide + 1) * x
    weight = inside.astype(jnp.float32)
    return (top * (1 - y) + bottom * y) * weight[..., None], weight


def _changed(
    image: Float[Array, "h w"], light: Array, grain: Array, config: CropConfig
) -> Float[Array, "h w"]:
    power, factor, added, noise = jax.random.uniform(light, (4,), minval=-1)
    image = jnp.sign(image) * (jnp.abs(image) + 1e-6) ** (config.gamma**power)
    image = image * config.contrast**factor + config.brightness * added
    # Half of the crops get none.
    return image + config.noise * jnp.maximum(noise, 0) * jax.random.normal(grain, image.shape)
