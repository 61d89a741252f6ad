"""Channels as colours that are told apart with any colour vision, and pictures as addresses that hold them."""

from __future__ import annotations

import base64

import numpy as np
from jaxtyping import Float, UInt, UInt8

#: Of channels in their order, told apart in the common colour blindnesses (after Okabe & Ito, and IBM's palette);
#: one channel alone is white. More than there are colours begin again.
COLORS = ("#4da6ff", "#ffb000", "#dc267f", "#2bb38a", "#ffffff")
_QUALITY = 78


def downsample_pixels(image: UInt[np.ndarray, "h w c"], step: int) -> Float[np.ndarray, "h2 w2 c"]:
    """Means of step × step pixels; what is left over at the end is repeated."""
    high, wide, channels = image.shape
    padded = np.pad(image, ((0, -high % step), (0, -wide % step), (0, 0)), mode="edge").astype(
        float
    )
    return padded.reshape(-(-high // step), step, -(-wide // step), step, channels).mean(
        axis=(1, 3)
    )


def composite(
    image: Float[np.ndarray, "h w c"], low: Float[np.ndarray, " c"], high: Float[np.ndarray, " c"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Channels as lights of their colours on one screen: where two are bright it is brighter than either, never cut."""
    share = np.clip((image - low) / (high - low), 0, 1)
    channels = image.shape[-1]
    colours = np.ones((1, 3)) if channels == 1 else np.array([_rgb(c) for c in COLORS]) / 255
    dark = np.ones((*image.shape[:2], 3))
    for at in range(channels):
        dark *= 1 - share[..., at, None] * colours[at % len(colours)]
    return np.rint(255 * (1 - dark)).astype(np.uint8)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def address(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture (WebP) as an address that holds it."""
    import imagecodecs

    return (
        "data:image/webp;base64,"
        + base64.b64encode(
            imagecodecs.webp_encode(picture, level=_QUALITY, lossless=False)
        ).decode()
    )
