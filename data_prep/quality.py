"""How good the images of a site are: focus, saturation, background, cells cut by the border, debris; for the index.

All is measured on the pixels as the files hold them: before light is evened, channels are aggregated or sites resized.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt, UInt16

#: Raised when a column gets another meaning: a dataset of another version is built again.
VERSION = 1
#: Full scales of cameras, in stored units: 8, 10, 12, 14 and 16 bits.
FULL_SCALES = (255, 1023, 4095, 16383, 65535)
#: Frequencies, in cycles a pixel, between which the slope of the power spectrum is taken: below lie cells and light,
#: above a camera's noise, in which a blurred image would look sharp. On jump_fov, blurred by 0 to 8 pixels and with
#: noise added, the slope falls all the way between these; up to 0.35 it rises again from 4 pixels on.
FREQUENCIES = (0.02, 0.15)
#: Bands of equal width in the logarithm of the frequency that the power is averaged in.
BANDS = 12
#: An object of the mask is like debris below this share of the site's median area of a cell.
SMALL = 0.25
#: Pixels that a bright spot outside all cells has at least, and the percentile of cells' pixels that it exceeds.
SPOT_PIXELS, SPOT_PERCENTILE = 9, 90


def site_quality(
    planes: Mapping[str, UInt[np.ndarray, "h w"]],
    mask: UInt16[np.ndarray, "h w"],
    segmented: Shaped[np.ndarray, "h w"],
) -> dict[str, float]:
    """The quality columns of a site.

    Args:
        planes: its channels by name.
        mask: its cells.
        segmented: the image in which they were found.

    Returns:
        Of each channel `focus_` (slope of the power spectrum), `laplacian_`, `saturated_` and `background_`, and of the
        site `border_cells` and `debris`.
    """
    outside = mask == 0
    columns: dict[str, float] = {}
    for channel, plane in planes.items():
        columns[f"focus_{channel}"] = spectrum_slope(plane)
        columns[f"laplacian_{channel}"] = laplacian_variance(plane)
        columns[f"saturated_{channel}"] = saturated_share(plane)
        columns[f"background_{channel}"] = (
            float(np.median(plane[outside])) if outside.any() else np.nan
        )
    return {
        **columns,
        "border_cells": border_share(mask),
        "debris": float(debris_like(mask, segmented)),
    }


def spectrum_slope(plane: UInt[np.ndarray, "h w"]) -> float:
    """Slope of the logarithm of power over that of frequency: from -2 to -5 in focus, steeper out of it; NaN where
    nothing is to be seen. (Bray et al., J Biomol Screen 2012: PowerLogLogSlope.)
    """
    from scipy import fft

    values = plane.astype(np.float32)
    values = (values - values.mean()) * _window(plane.shape)
    power = np.square(np.abs(fft.rfft2(values))).ravel()
    band, counts = _bands(plane.shape)
    sums = np.bincount(band, weights=power, minlength=BANDS + 1)[:BANDS]
    seen = (counts > 0) & (sums > 0)
    if seen.sum() < 3:
        return float("nan")
    edges = np.log(np.geomspace(FREQUENCIES[0], FREQUENCIES[1], BANDS + 1))
    middle = (edges[:-1] + edges[1:]) / 2
    return float(np.polyfit(middle[seen], np.log(sums[seen] / counts[seen]), 1)[0])


@functools.lru_cache(maxsize=4)
def _window(shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Without it the step from one edge to the opposite one looks like detail."""
    return np.outer(np.hanning(shape[0]), np.hanning(shape[1])).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _bands(shape: tuple[int, int]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " bands"]]:
    """The band of every value of `rfft2`, `BANDS` for what is in none, and how many values each has."""
    frequency = np.hypot(
        np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    ).ravel()
    edges = np.geomspace(FREQUENCIES[0], FREQUENCIES[1], BANDS + 1)
    band = np.searchsorted(edges, frequency, side="right") - 1
    band[(band < 0) | (band >= BANDS)] = BANDS
    return band, np.bincount(band, minlength=BANDS + 1)[:BANDS]


def laplacian_variance(plane: UInt[np.ndarray, "h w"]) -> float:
    """Variance of the discrete Laplacian, in stored units squared: it falls with focus, and with brightness."""
    values = plane.astype(np.float32)
    if min(values.shape) < 3:
        return float("nan")
    inner = values[1:-1, 1:-1]
    laplacian = (
        values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * inner
    )
    return float(laplacian.var(dtype=np.float64))


def saturated_share(plane: UInt[np.ndarray, "h w"]) -> float:
    """Share of the pixels at the camera's full scale, where the brightest pixel is at one."""
    brightest = int(plane.max())
    return (
        float(np.count_nonzero(plane == brightest) / plane.size)
        if brightest in FULL_SCALES
        else 0.0
    )


def border_share(mask: UInt16[np.ndarray, "h w"]) -> float:
    """Share of the cells that the border cuts; 0 where there is no cell."""
    cells = np.count_nonzero(np.bincount(mask.ravel())[1:])
    cut = np.unique(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]))
    return float(np.count_nonzero(cut) / cells) if cells else 0.0


def debris_like(mask: UInt16[np.ndarray, "h w"], image: Shaped[np.ndarray, "h w"]) -> int:
    """Objects far smaller than the site's cells, and spots as bright as cells that lie outside all of them."""
    from scipy import ndimage

    areas = np.bincount(mask.ravel())[1:]
    areas = areas[areas > 0]
    if not areas.size:
        return 0
    spots, _ = ndimage.label(image > np.percentile(image[mask > 0], SPOT_PERCENTILE))
    sizes = np.bincount(spots.ravel())
    sizes[np.unique(spots[mask > 0])] = 0
    sizes[0] = 0
    return int((areas < SMALL * np.median(areas)).sum() + (sizes >= SPOT_PIXELS).sum())
