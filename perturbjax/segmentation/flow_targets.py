"""Training targets: flows that lead each pixel of an object to its center (Stringer et al. 2021).

Heat is released at the center of an object and spreads inside it: in each step, a pixel becomes the
mean of its 3 x 3 neighborhood, where pixels outside the object count as 0. The flow is the unit
vector along the gradient of the heat. All objects of an image spread at the same time, on one list
of their pixels."""

from __future__ import annotations

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float32, Int, Integer

#: The pixel itself, then up, down, left, right and the four corners.
_NEIGHBORHOOD = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def masks_to_flows(labels: Integer[np.ndarray, "h w"]) -> Float32[np.ndarray, "2 h w"]:
    """Return unit vectors (down, right) towards the centers of objects; 0 in the background and at
    the centers.

    The heat of an object spreads for twice as many steps as its box is high and wide, as in the
    cellpose package. Objects that have taken all their steps leave the list."""
    flows = np.zeros((2, *labels.shape), np.float32)
    # One ring of background, so that every pixel has eight neighbors.
    padded = np.pad(labels.astype(np.int64), 1)
    width = padded.shape[1]
    flat = padded.ravel()
    pixels = np.flatnonzero(flat)
    if not pixels.size:
        return flows
    centers, steps = _find_centers(labels)
    # Pixels of objects with many steps first, so that those that still spread are the start of the
    # list.
    pixels = pixels[np.argsort(-steps[flat[pixels]], kind="stable")]
    pixel_steps = steps[flat[pixels]]
    # Position of each pixel in the list. The background points to an extra element at the end.
    index = np.full(flat.size, pixels.size)
    index[pixels] = np.arange(pixels.size)
    # (9, pixels): position of each neighbor in the list; those of a different label are outside.
    neighbors = np.stack([pixels + down * width + right for down, right in _NEIGHBORHOOD])
    neighbors = np.where(flat[neighbors] == flat[pixels], index[neighbors], pixels.size)
    sources = index[(centers[:, 0] + 1) * width + centers[:, 1] + 1]

    heat = np.zeros(pixels.size + 1)  # the last element is the outside, always 0
    for step in range(pixel_steps[0]):
        # The first `active` pixels belong to objects that take more than `step` steps.
        active = np.searchsorted(-pixel_steps, -step, side="left")
        heat[sources[sources < active]] += 1
        heat[:active] = heat[neighbors[:, :active]].sum(0) / 9
    # Central differences: below minus above, right minus left.
    gradient = np.stack(
        [heat[neighbors[2]] - heat[neighbors[1]], heat[neighbors[4]] - heat[neighbors[3]]]
    )
    # Heat far from a center is tiny, so the term against division by 0 must be even smaller.
    gradient /= 1e-60 + np.sqrt((gradient**2).sum(0))
    row, column = np.divmod(pixels, width)
    flows[:, row - 1, column - 1] = gradient
    return flows


def _find_centers(
    labels: Integer[np.ndarray, "h w"],
) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, " m"]]:
    """Return the pixel of each object nearest to its centroid, and the number of steps of each
    label."""
    boxes = ndi.find_objects(labels)
    steps = np.zeros(len(boxes) + 1, int)
    centers = []
    for label, box in enumerate(boxes, start=1):
        if box is None:
            continue
        pixels = np.argwhere(labels[box] == label)
        nearest = pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()]
        centers.append(nearest + np.array([box[0].start, box[1].start]))
        steps[label] = 2 * sum(part.stop - part.start + 2 for part in box)
    return np.array(centers), steps
