"""What a segmenter learns from masks: flows that lead every pixel of an object to its centre.

Heat is let in at the centre and spreads inside the object; the flow is the direction in which it rises (Stringer et
al. 2021). All objects of an image spread at once, on the list of their pixels.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float32, Int, Integer

#: A pixel itself, those above and below, left and right, and the four at the corners.
_AROUND = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def masks_to_flows(labels: Integer[np.ndarray, "h w"]) -> Float32[np.ndarray, "2 h w"]:
    """Unit vectors (down, right) towards the centres of the objects; 0 in the background and at the centres.

    An object's heat spreads for twice as many steps as its box is high and wide, as in cellpose's package; which
    steps an object no longer takes are saved by leaving it behind.
    """
    flows = np.zeros((2, *labels.shape), np.float32)
    padded = np.pad(labels.astype(np.int64), 1)
    width = padded.shape[1]
    flat = padded.ravel()
    pixels = np.flatnonzero(flat)
    if not pixels.size:
        return flows
    centers, steps = _centers(labels)
    # Pixels of objects with many steps first, so that those still spreading are always the front of the list.
    pixels = pixels[np.argsort(-steps[flat[pixels]], kind="stable")]
    lasting = steps[flat[pixels]]
    place = np.full(flat.size, pixels.size)
    place[pixels] = np.arange(pixels.size)
    neighbours = np.stack([pixels + down * width + right for down, right in _AROUND])
    here = np.where(flat[neighbours] == flat[pixels], place[neighbours], pixels.size)
    sources = place[(centers[:, 0] + 1) * width + centers[:, 1] + 1]

    heat = np.zeros(pixels.size + 1)  # the last is what lies outside: always 0
    for step in range(lasting[0]):
        heating = np.searchsorted(-lasting, -step, side="left")
        heat[sources[sources < heating]] += 1
        heat[:heating] = heat[here[:, :heating]].sum(0) / 9
    slope = np.stack([heat[here[2]] - heat[here[1]], heat[here[4]] - heat[here[3]]])
    slope /= 1e-60 + np.sqrt((slope**2).sum(0))
    row, column = np.divmod(pixels, width)
    flows[:, row - 1, column - 1] = slope
    return flows


def _centers(
    labels: Integer[np.ndarray, "h w"],
) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, " m"]]:
    """The pixel of each object nearest to its mean, and for each label the steps that its heat spreads."""
    boxes = ndi.find_objects(labels)
    steps = np.zeros(len(boxes) + 1, int)
    centers = []
    for label, box in enumerate(boxes, start=1):
        if box is None:
            continue
        places = np.argwhere(labels[box] == label)
        nearest = places[((places - places.mean(0)) ** 2).sum(1).argmin()]
        centers.append(nearest + np.array([box[0].start, box[1].start]))
        steps[label] = 2 * sum(part.stop - part.start + 2 for part in box)
    return np.array(centers), steps
