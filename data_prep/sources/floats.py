"""Mapping of float images to uint16, the largest type of the stored image.

A plate and channel has one mapping, so that its sites remain comparable:

    stored = round(value / step) + zero        value = (stored - zero) * step

`step` is a power of two, so both directions are exact apart from the rounding, and plates of
similar ranges have the same step. `zero` is the stored value of 0.0; it is above 0 only if there
are negative values. NaN and infinite pixels become 0.0. If all pixels are whole numbers from 0 to
65,535, as in integer images that were saved as float, `step` is 1 and nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt16

#: Largest stored value.
LARGEST = 65_535


@dataclass(frozen=True)
class FloatScale:
    """Mapping of float values to uint16: `value = (stored - zero) * step`."""

    step: float
    zero: int

    def stored(self, image: Float[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
        """Return the stored values of float pixels."""
        # float64, because the range of float16 is smaller than that of uint16.
        values = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        return np.clip(np.rint(values / self.step) + self.zero, 0, LARGEST).astype(np.uint16)


class FloatRange(NamedTuple):
    """Range of the pixels of one or more float images."""

    low: float
    """Smallest finite value; infinity if there is none."""
    high: float
    replaced: int
    """Number of pixels that are NaN or infinite."""
    is_whole: bool
    """Whether all finite values are whole numbers."""


def measure_range(image: Float[np.ndarray, "h w"]) -> FloatRange:
    """Measure the range of the pixels of an image."""
    finite = image[np.isfinite(image)]
    replaced = image.size - finite.size
    if not finite.size:
        return FloatRange(math.inf, -math.inf, replaced, True)
    return FloatRange(
        float(finite.min()), float(finite.max()), replaced, bool((finite == np.rint(finite)).all())
    )


def join_ranges(ranges: Iterable[FloatRange]) -> FloatRange:
    """Return the range of all pixels of several images."""
    lows, highs, replaced, are_whole = zip(*ranges, strict=True)
    return FloatRange(min(lows), max(highs), sum(replaced), all(are_whole))


def choose_scale(pixels: FloatRange) -> FloatScale:
    """Return the mapping with the smallest step that stores all finite values of a range."""
    low, high = min(pixels.low, 0.0), max(pixels.high, 0.0)
    if pixels.is_whole and low == 0 and high <= LARGEST:
        return FloatScale(1.0, 0)
    # frexp: the smallest power of two above the quotient; one more step if rounding exceeds it.
    step = math.ldexp(1.0, math.frexp(high / LARGEST - low / LARGEST)[1] - 1)
    while math.ceil(-low / step) + round(high / step) > LARGEST:
        step *= 2
    return FloatScale(step, math.ceil(-low / step))
