"""Diameters of objects: measured from masks, guessed from pixels, and a warning if they do not fit
the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float, Integer, Num

#: Fraction of objects dropped for their flow error above which the assumed size is doubtful. With a
#: diameter that fits few objects are dropped; of nuclei of three times the size, half.
MAX_DROPPED = 0.3
#: Ratio of the measured to the assumed diameter above which a warning is given.
MAX_RATIO = 1.6
#: Number of objects below which no warning is given.
MIN_OBJECTS = 8
#: Range of guessed diameters, in pixels.
GUESSES = (8.0, 60.0)
#: Pixels above which a guess uses every second row and column.
SUBSAMPLED_FROM = 600**2


def measure_diameters(labels: Integer[np.ndarray, "h w"]) -> Float[np.ndarray, " objects"]:
    """Return the diameter in pixels of the disk with the area of each object."""
    # Without label 0, the background.
    areas = np.bincount(labels.ravel())[1:]
    return 2 * np.sqrt(areas[areas > 0] / np.pi)


def guess_diameter(plane: Num[np.ndarray, "h w"]) -> float:
    """Guess the diameter of the objects without a network, in pixels.

    The foreground is brighter than Otsu's threshold of the square root of the intensities. Over a
    disk of radius r the mean distance to the edge is r / 3, so six times the mean distance over the
    foreground is the diameter."""
    from skimage.filters import threshold_otsu

    step = 2 if plane.size > SUBSAMPLED_FROM else 1
    smooth = ndi.gaussian_filter(np.nan_to_num(plane[::step, ::step].astype(np.float32)), 1)
    # The square root compresses bright objects, so that dim ones are above the threshold, too.
    root = np.sqrt(smooth - smooth.min(initial=np.inf)) if smooth.size else smooth
    if np.ptp(root) < 1e-6:
        return sum(GUESSES) / 2
    # The image's edge counts as an edge of objects: one pixel of background is added around it.
    depth = ndi.distance_transform_edt(np.pad(root > threshold_otsu(root), 1))
    return float(np.clip(6 * step * depth[depth > 0].mean(), *GUESSES))


def diameter_warning(
    measurements: Sequence[tuple[np.ndarray, np.ndarray]],
    expected: float,
    flow_threshold: float = 0.4,
) -> str:
    """Return one line if the objects do not have the expected diameter, else an empty text.

    Args:
        measurements: of each image the flow errors of all objects, and the diameters in pixels of
            those that remain.
        expected: diameter in pixels that the network assumed.
        flow_threshold: flow error above which objects were dropped.
    """
    if not measurements:
        return ""
    errors, sizes = (np.concatenate(part) for part in zip(*measurements, strict=True))
    if len(errors) < MIN_OBJECTS:
        return ""
    dropped = float((errors > flow_threshold).mean()) if flow_threshold > 0 else 0.0
    typical = float(np.median(sizes)) if len(sizes) else expected
    if dropped > MAX_DROPPED:
        # The remaining objects may all be fragments; then their size is no guide, and twice the
        # assumed diameter is suggested.
        suggested = typical if typical > expected * MAX_RATIO else 2 * expected
        return (
            f"{dropped:.0%} of {len(errors)} objects were dropped because their shape contradicts "
            "the network's flow. "
            f"They may be larger than the assumed diameter of {expected:.0f} pixels: try "
            f"--diameter {suggested:.0f} "
            "and inspect the masks"
        )
    if not expected / MAX_RATIO <= typical <= expected * MAX_RATIO:
        return (
            f"the median object is {typical:.0f} pixels wide, but the assumed diameter is "
            f"{expected:.0f}: "
            f"try --diameter {max(typical, 2):.0f} and inspect the masks"
        )
    return ""
