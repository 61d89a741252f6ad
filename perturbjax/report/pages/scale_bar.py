"""Scale bars: choice of the length and drawing."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8

#: Maximum length of a scale bar as a fraction of the width of the picture.
LONGEST = 0.3


def bar_length(width: float) -> float:
    """Return the length of the scale bar of a picture: 1, 2 or 5 times a power of 10.

    Args:
        width: width of the picture in micrometers; 0 if unknown.

    Returns:
        Length in micrometers, at most `LONGEST` of the width; 0 if the width is unknown.
    """
    if width <= 0:
        return 0.0
    longest = LONGEST * width
    power = 10.0 ** math.floor(math.log10(longest))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= longest)


def draw_scale_bar(
    picture: UInt8[np.ndarray, "h w 3"], length: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a white bar with a black frame at the lower right of a picture.

    Args:
        picture: RGB picture.
        length: length in pixels of the picture. Bars of less than 2 pixels, and those that do not
            fit, are left out.
    """
    height, width = picture.shape[:2]
    pixels, thickness, margin = round(length), max(1, height // 48), max(1, height // 32)
    if not 2 <= pixels <= width - 2 * margin - 2:
        return picture
    drawn = picture.copy()
    bottom, right = height - margin, width - margin
    drawn[bottom - thickness - 1 : bottom + 1, right - pixels - 1 : right + 1] = 0
    drawn[bottom - thickness : bottom, right - pixels : right] = 255
    return drawn
