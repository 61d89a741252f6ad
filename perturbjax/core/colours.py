"""Colors of channels for color-blind readers, and images as data URLs."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt, UInt8

from perturbjax.core.plates import EMPTY

#: Colors of channels in their order; a single channel is white, a sixth channel gets the first
#: color again. Source: Okabe and Ito's and IBM's color-blind safe palettes.
COLORS = ("#4da6ff", "#ffb000", "#dc267f", "#2bb38a", "#ffffff")
#: Colors of classes. Source: Okabe and Ito's and Paul Tol's color-blind safe palettes.
CLASS_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288",
    "#117733", "#AA4499", "#999933", "#661100", "#44AA99", "#6699CC", "#DDCC77", "#AA4466",
)  # fmt: skip
#: Maximum number of channels that are mixed in full color.
FULL_COLORS = 3
#: WebP quality, 0 to 100.
_QUALITY = 78


def class_colors(names: Iterable[str]) -> dict[str, str]:
    """Return the color of each class by its place in the order of names, empty wells last.

    The script of the pages uses the same rule, so that a class has one color on all pages. With
    more classes than `CLASS_COLORS` the result is empty: colors then go to selected classes.
    """
    ordered = sorted(set(names), key=lambda name: (name == EMPTY, name))
    if len(ordered) > len(CLASS_COLORS):
        return {}
    return dict(zip(ordered, CLASS_COLORS, strict=False))


def downsample_pixels(image: UInt[np.ndarray, "h w c"], step: int) -> Float[np.ndarray, "h2 w2 c"]:
    """Average blocks of step x step pixels; incomplete blocks are filled with edge pixels."""
    height, width, channels = image.shape
    # -n % step is the number of pixels that complete the last block.
    margins = ((0, -height % step), (0, -width % step), (0, 0))
    padded = np.pad(image, margins, mode="edge").astype(float)
    # (blocks down, step, blocks across, step, channels)
    blocks = padded.reshape(-(-height // step), step, -(-width // step), step, channels)
    return blocks.mean(axis=(1, 3))


def composite(
    image: Float[np.ndarray, "h w c"], low: Float[np.ndarray, " c"], high: Float[np.ndarray, " c"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Combine channels into one RGB image.

    Colors are mixed by the "screen" rule, 1 - (1 - a)(1 - b): two bright channels give a brighter
    pixel than each of them, and values are never cut off.

    Args:
        image: (h, w, c) intensities.
        low: (c,) intensity of each channel that is black.
        high: (c,) intensity of each channel that has its full color.
    """
    fraction = np.clip((image - low) / (high - low), 0, 1)
    channels = image.shape[-1]
    # Four bright channels or more would mix to white, so each gets less than its full color.
    fraction *= min(1, FULL_COLORS / channels)
    colors = np.ones((1, 3)) if channels == 1 else np.array([_rgb(c) for c in COLORS]) / 255
    darkness = np.ones((*image.shape[:2], 3))
    for channel in range(channels):
        darkness *= 1 - fraction[..., channel, None] * colors[channel % len(colors)]
    return np.rint(255 * (1 - darkness)).astype(np.uint8)


def _rgb(color: str) -> tuple[int, ...]:
    # #rrggbb: two hexadecimal digits for each color component.
    return tuple(int(color[start : start + 2], 16) for start in (1, 3, 5))


def address(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """Encode an RGB image as the data URL of a WebP file."""
    import imagecodecs

    encoded = imagecodecs.webp_encode(picture, level=_QUALITY, lossless=False)
    return "data:image/webp;base64," + base64.b64encode(encoded).decode()
