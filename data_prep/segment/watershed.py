"""The watershed engine: threshold, distance transform, seeded watershed. It needs no weights and no
network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Bool, Float, UInt, UInt16

from data_prep.channel_images import scaled
from data_prep.segment import SegmenterConfig, to_uint16
from perturbjax.core.errors import InputError
from perturbjax.segmentation.foreground import (
    SIGNAL,
    analyze_foreground,
    is_sparse,
    measure_background_contrast,
    remove_implausible_objects,
)

#: Smoothing before the threshold and of the distance map, distance of seeds, and smallest area, in
#: units of the object's diameter (chosen on the training images of the 2018 Data Science Bowl,
#: evaluated on its test images).
SMOOTH = 1 / 50
SEED_SMOOTH = 1 / 16
SEED_SPACING = 1 / 5
SMALLEST_AREA = 1 / 10
#: Width of the average that a bright pixel must exceed (standard deviation), as a fraction of the
#: image's shorter side and at least in pixels. Without it, haze over half an image became one
#: object whose size was taken for that of the nuclei (1 of 100 training images; mean AP at IoU 0.5
#: there 0.792 without, 0.804 with).
GROUND, MIN_GROUND = 1 / 16, 20
#: Diameter in pixels assumed where there is no foreground.
UNKNOWN_DIAMETER = 30.0


class Watershed:
    """Bright objects on a dark background; touching objects are separated where their outline has a
    waist."""

    def __init__(self, config: SegmenterConfig | None = None):
        """
        Args:
            config: only the diameter is used; the default estimates it for each image.

        Raises:
            InputError: weights were given.
        """
        config = SegmenterConfig("watershed", diameter="per-site") if config is None else config
        if config.weights:
            raise InputError(
                f"--weights {config.weights}: the watershed has no weights; choose --segmenter "
                "cellpose to use them"
            )
        self.config = config

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "engine": "watershed",
            "version": f"scikit-image {version('scikit-image')}",
            "weights": None,
            "sha256": None,
            "parameters": {
                "diameter": self.config.pixels or self.config.diameter_mode,
                "smooth": SMOOTH,
                "seed_smooth": SEED_SMOOTH,
                "seed_spacing": SEED_SPACING,
                "smallest_area": SMALLEST_AREA,
                "ground": [GROUND, MIN_GROUND],
            },
        }

    def estimate_diameter(self, images: Sequence[UInt[np.ndarray, "_h _w _c"]]) -> float:
        # One pixel of smoothing, because the diameter is not available yet.
        estimates = [
            _estimate_diameter(_foreground(ndi.gaussian_filter(scaled(image).mean(axis=-1), 1.0)))
            for image in images
            if analyze_foreground(image).present
        ]
        return float(np.median(estimates)) if estimates else 0.0

    def segment(
        self, image: UInt[np.ndarray, "h w c"], diameter: float = 0.0
    ) -> UInt16[np.ndarray, "h w"]:
        """Segment one site; several channels are scaled alike and averaged first."""
        from skimage.measure import label
        from skimage.segmentation import watershed

        if not analyze_foreground(image).present:
            return np.zeros(image.shape[:2], np.uint16)
        plane = scaled(image).mean(axis=-1)
        diameter = self.config.pixels or diameter
        if not diameter:
            diameter = _estimate_diameter(_foreground(ndi.gaussian_filter(plane, 1.0)))
        # Smoothing grows with the diameter, so that texture inside an object does not divide it.
        foreground = _foreground(ndi.gaussian_filter(plane, max(diameter * SMOOTH, 0.5)))
        foreground = ndi.binary_fill_holes(foreground)
        if not foreground.any():
            return np.zeros(plane.shape, np.uint16)
        # Smoothing joins nearby maxima of the distance map, which would divide an object.
        distance = ndi.gaussian_filter(
            ndi.distance_transform_edt(foreground), diameter * SEED_SMOOTH
        )
        seeds = label(_peaks(distance, foreground, max(round(diameter * SEED_SPACING), 1)))
        # Regions grow from the seeds and meet where the distance to the edge is smallest, at the
        # waist.
        labels = watershed(-distance, seeds, mask=foreground)
        # A fraction of the area of a disk with the object's diameter.
        least = max(int(SMALLEST_AREA * np.pi / 4 * diameter**2), 4)
        labels = _drop_small(labels, least)
        # Noise in units of the scaled image, with which the contrast of objects is compared.
        noise = measure_background_contrast(plane)[1]
        return remove_implausible_objects(labels, plane[..., None], np.array([noise]), diameter)


def _foreground(plane: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Threshold an image.

    Otsu's threshold of the square root, because intensities of cells are skewed and dim cells count
    too; and brighter than the surroundings. In a sparse field Otsu's threshold splits the noise:
    there, objects are the pixels above half of the brightest core."""
    from skimage.filters import threshold_otsu

    root = np.sqrt(np.clip(plane, 0, None))
    if np.ptp(root) < 1e-6:
        return np.zeros(plane.shape, bool)
    contrast, noise = measure_background_contrast(plane)
    if is_sparse(contrast, noise):
        # The brightest square of 5 x 5 pixels, as in `analyze_foreground`.
        core = float(ndi.minimum_filter(contrast, 5).max())
        return contrast > max(core / 2, SIGNAL * noise)
    ground = ndi.gaussian_filter(root, max(min(root.shape) * GROUND, MIN_GROUND))
    return (root > threshold_otsu(root)) & (root > ground)


def _estimate_diameter(foreground: Bool[np.ndarray, "h w"]) -> float:
    """Return six times the mean distance to the edge: over a disk of radius r it is r / 3."""
    if not foreground.any():
        return UNKNOWN_DIAMETER
    # The image's edge counts as an edge of the object.
    distance = ndi.distance_transform_edt(np.pad(foreground, 1))
    return float(np.clip(6 * distance[distance > 0].mean(), 6, max(foreground.shape)))


def _peaks(
    distance: Float[np.ndarray, "h w"], foreground: Bool[np.ndarray, "h w"], spacing: int
) -> Bool[np.ndarray, "h w"]:
    """Mark local maxima at least `spacing` pixels apart; every connected component has one."""
    from skimage.feature import peak_local_max
    from skimage.measure import label

    positions = peak_local_max(
        distance,
        min_distance=spacing,
        labels=label(foreground),
        exclude_border=False,
        threshold_abs=0,
    )
    peaks = np.zeros(distance.shape, bool)
    peaks[tuple(positions.T)] = True
    return peaks


def _drop_small(labels: np.ndarray, least: int) -> UInt16[np.ndarray, "h w"]:
    """Drop objects below `least` pixels and number the rest 1, 2, ... without gaps.

    Raises:
        InputError: more objects remain than 16 bits can number.
    """
    areas = np.bincount(labels.ravel())
    keep = areas >= least
    keep[0] = False
    return to_uint16(np.where(keep, np.cumsum(keep), 0)[labels])
