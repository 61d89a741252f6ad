"""What the mask channel holds: instance numbers turned into the integers that a feed stores."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.config import MaskEncoding

#: The mask channel of the model's input is `encode(mask, how) * SCALES[how]`.
SCALES: dict[MaskEncoding, float] = {
    "instance": 1.0,
    "binary": 1.0,
    "boundary": 1.0,
    "distance": 1 / 255,
}


def storage_dtype(how: MaskEncoding) -> np.dtype:
    """The dtype that `encode` gives: uint16 for instance numbers, uint8 for the rest."""
    return np.dtype(np.uint16 if how == "instance" else np.uint8)


def encode(mask: UInt16[np.ndarray, "h w"], how: MaskEncoding) -> UInt[np.ndarray, "h w"]:
    """Encode one site's instance mask (0 is background).

    instance: the numbers themselves. binary: 1 in cells. boundary: 1 on every cell's outermost pixels, between
    touching cells too. distance: in cells, the Euclidean distance to the nearest pixel outside the cell, over the
    greatest such distance in that cell, in 1/255. The site's border is no outline: a cell cut by it goes on beyond.
    """
    match how:
        case "instance":
            return mask
        case "binary":
            return (mask > 0).astype(np.uint8)
        case "boundary":
            return _outline(mask).astype(np.uint8)
        case "distance":
            return _relative_depth(mask)


def draw_disks(mask: UInt16[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """Every cell as the disc about the middle of its box that holds it: where it is and how wide, and no shape.

    Of discs that overlap the smaller lies on top.
    """
    from scipy import ndimage

    found = []
    for number, box in enumerate(ndimage.find_objects(mask), start=1):
        if box is None:
            continue
        middle = [(side.start + side.stop - 1) / 2 for side in box]
        rows, columns = np.nonzero(mask[box] == number)
        away = np.hypot(rows + box[0].start - middle[0], columns + box[1].start - middle[1])
        found.append((float(away.max()), number, middle))
    out = np.zeros_like(mask)
    for radius, number, (y, x) in sorted(found, reverse=True):
        top, left = max(0, int(y - radius)), max(0, int(x - radius))
        part = out[top : int(y + radius) + 2, left : int(x + radius) + 2]
        rows, columns = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[np.hypot(rows - y, columns - x) <= radius] = number
    return out


def _outline(mask: UInt16[np.ndarray, "h w"]) -> np.ndarray:
    """Pixels of a cell with a pixel of something else above, below, left or right."""
    outline = np.zeros(mask.shape, bool)
    down = mask[1:] != mask[:-1]
    right = mask[:, 1:] != mask[:, :-1]
    outline[1:] |= down
    outline[:-1] |= down
    outline[:, 1:] |= right
    outline[:, :-1] |= right
    return outline & (mask > 0)


def _relative_depth(mask: UInt16[np.ndarray, "h w"]) -> UInt[np.ndarray, "h w"]:
    """Depth inside the cell over the cell's greatest depth, as uint8 (255 at the deepest pixel).

    One distance transform serves all cells: from inside a cell, any other cell lies behind the cell's own outline.
    """
    from scipy import ndimage

    outline = _outline(mask)
    if not outline.any():  # no cell at all, or one that fills the site
        return np.where(mask > 0, 255, 0).astype(np.uint8)
    depth = (ndimage.distance_transform_edt(~outline) + 1) * (mask > 0)
    cells, position = np.unique(mask, return_inverse=True)
    deepest = ndimage.maximum(depth, position, np.arange(len(cells)))
    deepest[cells == 0] = 1
    return np.rint(255 * depth / deepest[position]).astype(np.uint8)
