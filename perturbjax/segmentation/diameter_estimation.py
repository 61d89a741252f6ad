"""Images whose objects are of unknown and differing size: each is shown to the network at the scale that suits it."""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Num

from perturbjax.segmentation.api import Segmenter
from perturbjax.segmentation.diameters import diameters
from perturbjax.segmentation.dynamics import Objects

#: Diameters that a first guess may name, in pixels.
GUESSES = (8.0, 60.0)
#: Ratio of the diameter found to the guessed one beyond which an image is looked at again, and how often.
AGREEMENT, LOOKS = 1.3, 3
#: Scales are powers of this, so that images of nearly one scale share compiled programs; the largest of them.
SCALE_STEP, LARGEST_SCALE = 2**0.25, 3.0
#: Pixels beyond which a guess is made on every second row and column.
GUESSED_WHOLE = 600**2


class AnySize:
    """A segmenter that finds the typical diameter of each image by itself; else as `Segmenter`."""

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter

    def masks(self, images: Iterable[Num[np.ndarray, "_h _w *_c"]]) -> Iterator[Objects]:
        """The objects of each image, in order; neighbours of one scale go through the network together.

        Raises:
            InputError: an image is empty, or has more channels than the network.
        """
        scaled = (
            (self._scale(guessed_diameter(_first(image))), image)
            for image in map(np.asarray, images)
        )
        for scale, alike in itertools.groupby(scaled, key=lambda pair: pair[0]):
            waiting: deque[np.ndarray] = deque()
            for found in self._at(scale).masks(_kept(alike, waiting)):
                yield self._corrected(waiting.popleft(), scale, found)

    def _corrected(self, image: Num[np.ndarray, "h w *c"], scale: float, found: Objects) -> Objects:
        """Look again at the scale that suits what was found, or closer where nothing was."""
        for _ in range(LOOKS - 1):
            assumed, widths = self._known / scale, diameters(found.labels)
            better = float(np.median(widths)) if len(widths) else assumed / 2
            other = self._scale(better)
            if max(better / assumed, assumed / better) < AGREEMENT or other == scale:
                break
            again = next(self._at(other).masks([image]))
            if len(widths) and not again.labels.any():
                break
            scale, found = other, again
        return found

    @property
    def _known(self) -> float:
        return self.segmenter.config.diam_mean

    def _scale(self, diameter: float) -> float:
        return min(SCALE_STEP ** round(math.log(self._known / diameter, SCALE_STEP)), LARGEST_SCALE)

    def _at(self, scale: float) -> Segmenter:
        scaled = copy.copy(self.segmenter)
        scaled.diameter = self._known / scale
        return scaled


def _first(image: Num[np.ndarray, "h w *c"]) -> Num[np.ndarray, "h w"]:
    return image[..., 0] if image.ndim == 3 else image


def _kept(
    pairs: Iterable[tuple[float, np.ndarray]], waiting: deque[np.ndarray]
) -> Iterator[np.ndarray]:
    for _, image in pairs:
        waiting.append(image)
        yield image


def guessed_diameter(plane: Num[np.ndarray, "h w"]) -> float:
    """Six times the mean depth of what is brighter than Otsu's threshold of the root, in pixels: a disk's diameter."""
    from skimage.filters import threshold_otsu

    step = 2 if plane.size > GUESSED_WHOLE else 1
    smooth = ndi.gaussian_filter(np.nan_to_num(plane[::step, ::step].astype(np.float32)), 1)
    root = np.sqrt(smooth - smooth.min(initial=np.inf)) if smooth.size else smooth
    if np.ptp(root) < 1e-6:
        return sum(GUESSES) / 2
    depth = ndi.distance_transform_edt(np.pad(root > threshold_otsu(root), 1))
    return float(np.clip(6 * step * depth[depth > 0].mean(), *GUESSES))
