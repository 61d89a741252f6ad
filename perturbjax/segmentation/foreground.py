"""Decide whether an image contains objects, and how bright they are compared with the noise.

Percentile normalization of an empty field stretches camera noise to the full range, and a network
or a threshold then finds thousands of "cells" in it. Every engine therefore asks three questions
that percentiles cannot answer:

1. How large is the noise? The second difference p(y,x) - p(y,x+2) - p(y+2,x) + p(y+2,x+2) cancels
   background, illumination gradients and most of the objects. Its mean absolute value over blocks
   of 16 x 16 pixels, taken from the quietest quarter of the blocks, estimates the standard
   deviation of the noise (Immerkaer 1996, with blocks against texture).
2. Is there an object? The image is averaged over 3 x 3 pixels, and a background of block medians is
   subtracted. An object has a core of 5 x 5 pixels, all of which exceed the background by `SIGNAL`
   times the noise. Hot pixels do not.
3. Which intensity range does the network see? The 1st to 99th percentile, but never less than
   `MIN_RANGE` times the noise. In sparse fields, where the 99th percentile is background, the upper
   end is the brightness of the objects.

`remove_implausible_objects` checks each object afterwards: contrast to its surroundings and area.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float, Float32, Integer, Num

#: Height and width of the blocks of noise and of background, in pixels.
NOISE_BLOCK, BACKGROUND_BLOCK = 16, 64
#: Distance of the pixels that are subtracted to measure noise: noise of interpolated images is
#: correlated over one.
NOISE_LAG = 2
#: Fraction of blocks that count as quiet. On single-cell crops only the corners are background.
QUIET_FRACTION = 0.25
#: Noise of a noise-free image with integer intensities: rounding alone gives 0.3.
INTEGER_NOISE = 0.5
#: Contrast in noise units of the core of an object. Highest in 9 simulated fields of noise: 1.2;
#: lowest of 140 images of DSB2018: 40.
SIGNAL = 5.0
#: Height and width of the core of an object, in pixels.
CORE = 5
#: Smallest intensity range in noise units. Lowest of DSB2018 without this bound: 28; pure noise has
#: 4.7.
MIN_RANGE = 20.0
#: Fraction of pixels brighter than the background below which a field is sparse: the 99th
#: percentile is then background.
SPARSE = 0.02
#: Percentiles that become 0 and 1 in the network's input.
PERCENTILES = (1.0, 99.0)
#: Pixels of an image beyond which percentiles come from a sample of about 224 x 224 of them, as in
#: Cellpose.
SAMPLED_FROM, SAMPLE_SIDE = 224**3, 224
#: Contrast in noise units below which an object is dropped.
MIN_CONTRAST = 3.0
#: Area relative to the typical area outside which an object is dropped.
AREA_RATIO = 20.0


class Foreground(NamedTuple):
    """Intensity statistics of one image."""

    noise: Float[np.ndarray, " c"]
    """Standard deviation of the noise of each channel, in units of intensity."""
    ranges: Float32[np.ndarray, "c 2"]
    """Of each channel the intensity that becomes 0, and the difference to the one that becomes 1;
    infinite for a channel without contrast, which becomes 0 everywhere."""
    present: bool
    """Whether any channel contains an object."""


def analyze_foreground(image: Num[np.ndarray, "h w c"]) -> Foreground:
    """Measure noise, intensity range and presence of objects.

    Args:
        image: intensities of any numeric type; NaN counts as 0.
    """
    channels = [_analyze_channel(image[..., channel]) for channel in range(image.shape[2])]
    noise, ranges, present = zip(*channels, strict=True)
    return Foreground(np.array(noise), np.array(ranges, np.float32), any(present))


def _analyze_channel(
    plane: Num[np.ndarray, "h w"],
) -> tuple[float, tuple[float, float], bool]:
    low, high = percentiles(plane)
    contrast, noise = measure_background_contrast(plane)
    # The minimum over a square is high only if all its pixels are bright: hot pixels have no
    # effect.
    core = float(ndi.minimum_filter(contrast, CORE).max())
    present = core > max(SIGNAL * noise, 1e-3)
    if present and is_sparse(contrast, noise):
        # Pixels of objects: more than half the contrast of the best core.
        bright = plane[contrast > max(core / 2, SIGNAL * noise)]
        high = max(high, float(np.median(bright)))
    span = max(high - low, MIN_RANGE * noise)
    # Without a difference between the percentiles the channel becomes 0 everywhere.
    return noise, ((low, span) if high - low > 1e-3 else (0.0, np.inf)), present


def measure_background_contrast(
    plane: Num[np.ndarray, "h w"],
) -> tuple[Float32[np.ndarray, "h w"], float]:
    """Return the smoothed image minus its background, and the noise of the image, in units of
    intensity."""
    values = plane.astype(np.float32)
    if plane.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=0, neginf=0)
    noise = estimate_noise(values)
    if plane.dtype.kind != "f":
        noise = max(noise, INTEGER_NOISE)
    smooth = ndi.uniform_filter(values, 3)
    return smooth - estimate_background(smooth), noise


def is_sparse(contrast: Float32[np.ndarray, "h w"], noise: float) -> bool:
    """Whether so few pixels are brighter than the background that percentiles describe the
    background only."""
    return float((contrast > SIGNAL * noise).mean()) < SPARSE


def estimate_noise(plane: Float32[np.ndarray, "h w"]) -> float:
    """Estimate the standard deviation of white noise from second differences in the quietest
    blocks."""
    lag = NOISE_LAG
    if min(plane.shape) <= lag:
        return 0.0
    difference = np.abs(
        plane[lag:, lag:] - plane[:-lag, lag:] - plane[lag:, :-lag] + plane[:-lag, :-lag]
    )
    means = _blocks(difference, NOISE_BLOCK).mean((1, 3))
    # The mean of |x| is sqrt(2 / pi) times the deviation of x, which is that of four pixels: twice
    # the noise.
    return float(np.quantile(means, QUIET_FRACTION) * np.sqrt(np.pi / 2) / 2)


def estimate_background(plane: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Interpolate the medians of blocks, each replaced by the median of its neighborhood."""
    blocks = _blocks(plane, BACKGROUND_BLOCK)
    rows, height, columns, width = blocks.shape
    # A quarter of the pixels is enough for a median. Shape: (rows, columns, pixels of a block).
    values = blocks[:, ::2, :, ::2].swapaxes(1, 2).reshape(rows, columns, -1)
    medians = ndi.median_filter(np.median(values, -1), 3, mode="nearest")
    for axis, block in enumerate((height, width)):
        medians = _interpolate(medians, axis, plane.shape[axis], block)
    return medians.astype(np.float32)


def _interpolate(values: np.ndarray, axis: int, size: int, block: int) -> np.ndarray:
    """Stretch block values linearly to `size` pixels along an axis; the ends repeat."""
    last = values.shape[axis] - 1
    position = np.clip((np.arange(size) + 0.5) / block - 0.5, 0, last).astype(np.float32)
    first = position.astype(int)
    weight = np.expand_dims(position - first, 1 - axis)
    second = np.minimum(first + 1, last)
    return np.take(values, first, axis) * (1 - weight) + np.take(values, second, axis) * weight


def _blocks(plane: np.ndarray, side: int) -> np.ndarray:
    """View as (rows of blocks, height, columns of blocks, width); a remainder at the end is left
    out."""
    rows, columns = (max(size // side, 1) for size in plane.shape)
    height, width = plane.shape[0] // rows, plane.shape[1] // columns
    return plane[: rows * height, : columns * width].reshape(rows, height, columns, width)


def percentiles(plane: Num[np.ndarray, "h w"]) -> tuple[float, float]:
    """Return the 1st and 99th percentile of the finite pixels, (0, 0) if there are none.

    Integers are counted instead of sorted: 3 ms instead of 25 for 1080 x 1080 pixels of 16 bits.
    """
    if plane.size > SAMPLED_FROM:
        plane = plane[:: plane.shape[0] // SAMPLE_SIDE, :: plane.shape[1] // SAMPLE_SIDE]
    if plane.dtype.kind != "u" or plane.dtype.itemsize > 2:
        finite = np.asarray(plane, np.float32)
        finite = finite[np.isfinite(finite)]
        low, high = np.percentile(finite, PERCENTILES) if finite.size else (0.0, 0.0)
        return float(low), float(high)
    # below[v] is the number of pixels of intensity v or lower.
    below = np.cumsum(np.bincount(plane.ravel()))
    # In single precision, as in NumPy's percentiles of float32 images, which the cellpose package
    # uses.
    position = (
        np.array(PERCENTILES, np.float32) / np.float32(100) * np.float32(plane.size - 1)
    ).astype(np.float64)
    # Intensities at the two ranks around each position; interpolated linearly between them below.
    first, second = (
        np.searchsorted(below, np.floor(position) + shift, side="right") for shift in (0, 1)
    )
    second = np.minimum(second, len(below) - 1)
    low, high = first + (second - first) * (position - np.floor(position))
    return float(low), float(high)


def remove_implausible_objects(
    labels: Integer[np.ndarray, "h w"],
    image: Num[np.ndarray, "h w c"],
    noise: Float[np.ndarray, " c"],
    diameter: float = 0.0,
) -> Integer[np.ndarray, "h w"]:
    """Drop objects that are too dim for the noise, or far smaller or larger than the others.

    Args:
        labels: 0 is background.
        image: the segmented image.
        noise: of each channel, from `analyze_foreground`.
        diameter: typical diameter of an object in pixels; 0 takes the median of the objects.

    Returns:
        Labels 1, 2, ... in the former order; the same array if every object is kept.
    """
    areas = np.bincount(labels.ravel())
    if len(areas) < 2:
        return labels
    areas[0] = 0
    typical = np.pi / 4 * diameter**2 if diameter else float(np.median(areas[areas > 0]))
    keep = (areas * AREA_RATIO >= typical) & (areas <= typical * AREA_RATIO)
    keep &= measure_contrast(labels, image, noise) >= MIN_CONTRAST
    keep[0] = False
    if keep.sum() == np.count_nonzero(areas):
        return labels
    # The cumulative sum numbers the remaining labels without gaps.
    return np.where(keep, np.cumsum(keep), 0).astype(labels.dtype)[labels]


def measure_contrast(
    labels: Integer[np.ndarray, "h w"],
    image: Num[np.ndarray, "h w c"],
    noise: Float[np.ndarray, " c"],
) -> Float[np.ndarray, " n"]:
    """Measure the contrast of each object to its surroundings in noise units, in its best channel.

    The surroundings are the background pixels of the square of twice the width of the object. An
    object without any, as in a confluent layer, is compared with the image's background."""
    outside = labels == 0
    contrast = np.zeros(labels.max(initial=0) + 1)
    boxes = ndi.find_objects(labels)
    for channel in range(image.shape[2]):
        plane = image[..., channel]
        lowest = float(np.percentile(plane[::2, ::2], PERCENTILES[0]))
        for label, box in enumerate(boxes, start=1):
            if box is None:
                continue
            # The box, enlarged at each end by half its size and one pixel.
            window = tuple(
                slice(
                    max(part.start - (part.stop - part.start) // 2 - 1, 0),
                    part.stop + (part.stop - part.start) // 2 + 1,
                )
                for part in box
            )
            surroundings = plane[window][outside[window]]
            base = float(np.median(surroundings)) if surroundings.size else lowest
            inside = float(plane[box][labels[box] == label].mean(dtype=np.float64))
            value = (inside - base) / max(float(noise[channel]), 1e-9)
            contrast[label] = max(contrast[label], value)
    return contrast
