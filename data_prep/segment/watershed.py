"""The embedded engine: threshold, distance transform, seeded watershed. Needs no weights and no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Bool, Float, UInt, UInt16

from data_prep.channel_images import scaled
from perturbjax.core.errors import InputError

#: Smoothing before the threshold and of the seeds' map, and the least area kept, in units of the object's diameter
#: (chosen on the training images of the 2018 Data Science Bowl, judged on its test images).
SMOOTH = 1 / 50
SEED_SMOOTH = 1 / 16
SEED_SPACING = 1 / 5
SMALLEST_AREA = 1 / 10
#: Width over which the ground of a bright place is averaged (standard deviation), as a share of the image's shorter
#: side and at least in pixels. An object is brighter than its surroundings too: without that, haze over half an image
#: became one object, its size the objects' estimated diameter, and all else too small to keep (1 of 100 training
#: images; mean AP at IoU 0.5 there 0.792 without, 0.804 with).
GROUND, GROUND_LEAST = 1 / 16, 20


class Watershed:
    """Bright objects on a dark ground, touching ones parted where their outline has a waist."""

    def __init__(self, weights: str = "", diameter: float = 0.0):
        """
        Args:
            weights: must be empty.
            diameter: typical diameter of an object in pixels; 0 estimates it for each site.

        Raises:
            InputError: weights were given, or the diameter is negative.
        """
        if weights:
            raise InputError(
                f"--weights {weights}: the watershed has no weights; choose --segmenter cellpose for them"
            )
        if diameter < 0:
            raise InputError(f"--diameter {diameter}: must not be negative; 0 estimates it")
        self.diameter = diameter

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "engine": "watershed",
            "version": f"scikit-image {version('scikit-image')}",
            "weights": None,
            "sha256": None,
            "parameters": {
                "diameter": self.diameter or "estimated for each site",
                "smooth": SMOOTH,
                "seed_smooth": SEED_SMOOTH,
                "seed_spacing": SEED_SPACING,
                "smallest_area": SMALLEST_AREA,
                "ground": [GROUND, GROUND_LEAST],
            },
        }

    def segment(self, image: UInt[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w"]:
        """Several channels are scaled alike and averaged first."""
        from skimage.measure import label
        from skimage.segmentation import watershed

        plane = scaled(image).mean(axis=-1)
        diameter = self.diameter or _estimated_diameter(
            _foreground(ndi.gaussian_filter(plane, 1.0))
        )
        foreground = _foreground(ndi.gaussian_filter(plane, max(diameter * SMOOTH, 0.5)))
        least = max(int(SMALLEST_AREA * np.pi / 4 * diameter**2), 4)
        foreground = ndi.binary_fill_holes(foreground)
        if not foreground.any():
            return np.zeros(plane.shape, np.uint16)
        distance = ndi.gaussian_filter(
            ndi.distance_transform_edt(foreground), diameter * SEED_SMOOTH
        )
        seeds = label(_peaks(distance, foreground, max(round(diameter * SEED_SPACING), 1)))
        labels = watershed(-distance, seeds, mask=foreground)
        return _relabelled(labels, least)


def _foreground(plane: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Otsu's threshold on the square root: intensities of cells are skewed, and dim cells count too. And brighter than
    the surroundings are."""
    from skimage.filters import threshold_otsu

    root = np.sqrt(np.clip(plane, 0, None))
    if np.ptp(root) < 1e-6:
        return np.zeros(plane.shape, bool)
    ground = ndi.gaussian_filter(root, max(min(root.shape) * GROUND, GROUND_LEAST))
    return (root > threshold_otsu(root)) & (root > ground)


def _estimated_diameter(foreground: Bool[np.ndarray, "h w"]) -> float:
    """Over a disk of radius r the mean distance to the edge is r / 3: six times it is the diameter."""
    if not foreground.any():
        return 30.0
    distance = ndi.distance_transform_edt(np.pad(foreground, 1))
    return float(np.clip(6 * distance[distance > 0].mean(), 6, max(foreground.shape)))


def _peaks(
    distance: Float[np.ndarray, "h w"], foreground: Bool[np.ndarray, "h w"], spacing: int
) -> Bool[np.ndarray, "h w"]:
    """Local maxima at least `spacing` pixels apart; every connected piece of foreground has one."""
    from skimage.feature import peak_local_max
    from skimage.measure import label

    places = peak_local_max(
        distance,
        min_distance=spacing,
        labels=label(foreground),
        exclude_border=False,
        threshold_abs=0,
    )
    peaks = np.zeros(distance.shape, bool)
    peaks[tuple(places.T)] = True
    return peaks


def _relabelled(labels: np.ndarray, least: int) -> UInt16[np.ndarray, "h w"]:
    """Drop objects below `least` pixels and number the rest 1, 2, … without gaps."""
    areas = np.bincount(labels.ravel())
    keep = areas >= least
    keep[0] = False
    numbers = np.where(keep, np.cumsum(keep), 0).astype(np.uint16)
    return numbers[labels]
