"""Image quality of a site for `index.parquet`: focus, saturation, background, cells at the border,
debris.

Everything is measured on the pixels of the files, before illumination correction, aggregation and
resizing."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt, UInt16

#: Increased when the meaning of a column changes; a dataset of another version is rebuilt.
VERSION = 2
#: Largest values of cameras with 8, 10, 12, 14 and 16 bits.
FULL_SCALES = (255, 1023, 4095, 16383, 65535)
#: Frequencies in cycles per pixel between which the slope of the power spectrum is fitted. Below
#: are cells and uneven illumination, above is camera noise, which makes a blurred image look sharp.
#: On jump_fov, blurred by 0 to 8 pixels with added noise, the slope decreases over this whole
#: range; with an upper limit of 0.35 it increases from 4 pixels on.
FREQUENCIES = (0.02, 0.15)
#: Number of bands, equally wide in the logarithm of the frequency.
BANDS = 12
#: Objects below this fraction of the site's median area count as debris.
SMALL = 0.25
#: Smallest area in pixels of a bright spot outside all cells, and the percentile of cell pixels
#: that it exceeds.
SPOT_PIXELS, SPOT_PERCENTILE = 9, 90


def site_quality(
    planes: Mapping[str, UInt[np.ndarray, "h w"]],
    mask: UInt16[np.ndarray, "h w"],
    segmented: Shaped[np.ndarray, "h w"],
    failed: bool = False,
) -> dict[str, float]:
    """Measure the quality columns of a site.

    Args:
        planes: channels by name.
        mask: instance labels of the cells.
        segmented: image that was segmented.
        failed: whether the segmentation failed.

    Returns:
        Of each channel `focus_` (slope of the power spectrum), `laplacian_`, `saturated_` and
        `background_`; of the site `border_cells`, `debris` and `segmentation_failed` (0 or 1).
    """
    outside = mask == 0
    columns: dict[str, float] = {}
    for channel, plane in planes.items():
        columns[f"focus_{channel}"] = spectrum_slope(plane)
        columns[f"laplacian_{channel}"] = laplacian_variance(plane)
        columns[f"saturated_{channel}"] = saturated_fraction(plane)
        columns[f"background_{channel}"] = (
            float(np.median(plane[outside])) if outside.any() else np.nan
        )
    return {
        **columns,
        "border_cells": border_fraction(mask),
        "debris": float(count_debris(mask, segmented)),
        "segmentation_failed": float(failed),
    }


def spectrum_slope(plane: UInt[np.ndarray, "h w"]) -> float:
    """Return the slope of the power spectrum in log-log coordinates, NaN for a constant image.

    Images in focus have -2 to -5, blurred images less.

    Source: PowerLogLogSlope of Bray et al., J Biomol Screen 2012.
    """
    from scipy import fft

    values = plane.astype(np.float32)
    # Without the mean, which would dominate the lowest frequencies.
    values = (values - values.mean()) * _window(plane.shape)
    # (h, w // 2 + 1) frequencies, flattened as in `_bands`.
    power = np.square(np.abs(fft.rfft2(values))).ravel()
    band, counts = _bands(plane.shape)
    # Total power of each band; the last entry collects frequencies outside of all bands.
    # The last band has the frequencies outside the range, and is removed.
    sums = np.bincount(band, weights=power, minlength=BANDS + 1)[:BANDS]
    valid = (counts > 0) & (sums > 0)
    if valid.sum() < 3:
        return float("nan")
    # The slope refers to the mean power of a band at its center on the logarithmic axis.
    edges = np.log(np.geomspace(FREQUENCIES[0], FREQUENCIES[1], BANDS + 1))
    centers = (edges[:-1] + edges[1:]) / 2
    return float(np.polyfit(centers[valid], np.log(sums[valid] / counts[valid]), 1)[0])


@functools.lru_cache(maxsize=4)
def _window(shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Return a Hann window: without it the step between opposite edges counts as detail."""
    return np.outer(np.hanning(shape[0]), np.hanning(shape[1])).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _bands(shape: tuple[int, int]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " bands"]]:
    """Return the band of each value of `rfft2` (`BANDS` if in none), and the number of values of
    each band."""
    frequency = np.hypot(
        np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    ).ravel()
    edges = np.geomspace(FREQUENCIES[0], FREQUENCIES[1], BANDS + 1)
    # Number of the band that contains each frequency; negative below the first one.
    band = np.searchsorted(edges, frequency, side="right") - 1
    band[(band < 0) | (band >= BANDS)] = BANDS
    return band, np.bincount(band, minlength=BANDS + 1)[:BANDS]


def laplacian_variance(plane: UInt[np.ndarray, "h w"]) -> float:
    """Return the variance of the discrete Laplacian; it decreases with blur and with brightness."""
    values = plane.astype(np.float32)
    if min(values.shape) < 3:
        return float("nan")
    inner = values[1:-1, 1:-1]
    # Sum of the four neighbors minus four times the pixel.
    laplacian = (
        values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * inner
    )
    return float(laplacian.var(dtype=np.float64))


def saturated_fraction(plane: UInt[np.ndarray, "h w"]) -> float:
    """Return the fraction of pixels at the camera's largest value; 0 if the brightest pixel is
    below it."""
    brightest = int(plane.max())
    return (
        float(np.count_nonzero(plane == brightest) / plane.size)
        if brightest in FULL_SCALES
        else 0.0
    )


def border_fraction(mask: UInt16[np.ndarray, "h w"]) -> float:
    """Return the fraction of cells at the image border; 0 without cells."""
    # Labels can have gaps, so areas above 0 are counted instead of the largest label.
    cells = np.count_nonzero(np.bincount(mask.ravel())[1:])
    # Labels at the border; `count_nonzero` ignores the background, label 0.
    cut = np.unique(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]))
    return float(np.count_nonzero(cut) / cells) if cells else 0.0


def count_debris(mask: UInt16[np.ndarray, "h w"], image: Shaped[np.ndarray, "h w"]) -> int:
    """Count objects far smaller than the site's cells, and bright spots outside all cells."""
    from scipy import ndimage

    areas = np.bincount(mask.ravel())[1:]
    areas = areas[areas > 0]
    if not areas.size:
        return 0
    # Connected regions brighter than most cell pixels.
    spots, _ = ndimage.label(image > np.percentile(image[mask > 0], SPOT_PERCENTILE))
    sizes = np.bincount(spots.ravel())
    # Spots that touch a cell are no debris. Entry 0 is the background of the labeling.
    # Spots that overlap a cell are not debris.
    sizes[np.unique(spots[mask > 0])] = 0
    sizes[0] = 0
    return int((areas < SMALL * np.median(areas)).sum() + (sizes >= SPOT_PIXELS).sum())
