"""Estimate the diameter of the objects with the network itself, for one image or for all images of
a plate.

A guess from the pixels gives a first scale. The network segments the images at this scale, and if
the median diameter of its objects differs from the assumed one by more than `AGREEMENT`, it
segments them again at the better scale. Scales are powers of `SCALE_STEP`, so that images of nearly
the same scale share compiled programs."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num

from perturbjax.segmentation.diameters import guess_diameter, measure_diameters
from perturbjax.segmentation.foreground import analyze_foreground

if TYPE_CHECKING:
    from perturbjax.segmentation.api import Segmenter
    from perturbjax.segmentation.objects import Objects

#: Ratio of the measured to the assumed diameter above which the scale is corrected, and the maximum
#: number of scales.
AGREEMENT, MAX_SCALES = 1.3, 3
#: Step between scales, and the largest scale.
SCALE_STEP, LARGEST_SCALE = 2**0.25, 3.0


def segment_at_own_scale(
    segmenter: Segmenter, images: Iterable[Num[np.ndarray, "_h _w *_c"]]
) -> Iterator[Objects]:
    """Segment each image at the scale of its own objects; neighbors of one scale share batches.

    Raises:
        InputError: an image is empty, or has more channels than the network.
    """
    # The guess from pixels is rounded to a scale before grouping, so that groups are long.
    pairs = (
        (_rounded_diameter(segmenter, guess_diameter(_first_channel(image))), image)
        for image in map(np.asarray, images)
    )
    for diameter, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        # Images without a result yet, for a possible repetition at another scale.
        waiting: deque[np.ndarray] = deque()
        for objects in segmenter.with_diameter(diameter).masks(_remember(group, waiting)):
            yield _correct_scale(segmenter, waiting.popleft(), diameter, objects)


def _correct_scale(
    segmenter: Segmenter, image: Num[np.ndarray, "h w *c"], diameter: float, objects: Objects
) -> Objects:
    """Segment again at the scale of the objects, or at a larger one if there are none."""
    for _ in range(MAX_SCALES - 1):
        if not objects.present:
            break
        # No object may mean that the objects are smaller than assumed: try half the diameter.
        sizes = measure_diameters(objects.labels)
        better = float(np.median(sizes)) if len(sizes) else diameter / 2
        other = _rounded_diameter(segmenter, better)
        if max(better / diameter, diameter / better) < AGREEMENT or other == diameter:
            break
        repeated = next(segmenter.with_diameter(other).masks([image]))
        # A scale that loses all objects is worse than the previous one.
        if len(sizes) and not repeated.labels.any():
            break
        diameter, objects = other, repeated
    return objects


def estimate_diameter(
    segmenter: Segmenter, images: Sequence[Num[np.ndarray, "_h _w *_c"]]
) -> float:
    """Estimate one diameter in pixels for images of one plate: the median over images that contain
    objects.

    Returns:
        The diameter of the nearest scale that the network is run at; 0 if no image contains an
        object.
    """
    # Sites without objects would contribute diameters of noise.
    images = [image for image in images if analyze_foreground(_with_axis(image)).present]
    if not images:
        return 0.0
    guesses = [guess_diameter(_first_channel(image)) for image in images]
    diameter, tried = _rounded_diameter(segmenter, float(np.median(guesses))), set[float]()
    for _ in range(MAX_SCALES):
        tried.add(diameter)
        results = segmenter.with_diameter(diameter).masks(images)
        sizes = [measure_diameters(objects.labels) for objects in results]
        medians = [float(np.median(values)) for values in sizes if len(values)]
        better = float(np.median(medians)) if medians else diameter / 2
        other = _rounded_diameter(segmenter, better)
        # A scale that was tried before ends the search, so that it cannot oscillate.
        if max(better / diameter, diameter / better) < AGREEMENT or other in tried:
            return diameter if medians else 0.0
        diameter = other
    return diameter


def _rounded_diameter(segmenter: Segmenter, diameter: float) -> float:
    """Return the diameter of the nearest scale that is a power of `SCALE_STEP`."""
    network_diameter = segmenter.config.diam_mean
    # The scale is diam_mean / diameter; on a logarithmic axis the powers are equally spaced.
    steps = round(math.log(network_diameter / diameter, SCALE_STEP))
    return network_diameter / min(SCALE_STEP**steps, LARGEST_SCALE)


def _first_channel(image: Num[np.ndarray, "h w *c"]) -> Num[np.ndarray, "h w"]:
    return image[..., 0] if image.ndim == 3 else image


def _with_axis(image: Num[np.ndarray, "h w *c"]) -> Num[np.ndarray, "h w c"]:
    return image if image.ndim == 3 else image[..., None]


def _remember(
    pairs: Iterable[tuple[float, np.ndarray]], waiting: deque[np.ndarray]
) -> Iterator[np.ndarray]:
    for _, image in pairs:
        waiting.append(image)
        yield image
