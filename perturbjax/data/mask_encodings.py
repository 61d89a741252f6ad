"""Mask channel of the network input: encode instance labels as the integers that batches store.

The encodings are the records of `perturbjax.core.choices.MASK_ENCODINGS`. The mask channel of the
network input is `encode(mask, encoding) * MASK_ENCODINGS[encoding].scale`; the factor is applied on
the device.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.choices import MASK_ENCODINGS


def storage_dtype(encoding: str) -> np.dtype:
    """Return the integer type of masks in an encoding (uint16 for instance labels, else uint8)."""
    return np.dtype(MASK_ENCODINGS[encoding].dtype)


def encode(mask: UInt16[np.ndarray, "h w"], encoding: str) -> UInt[np.ndarray, "h w"]:
    """Encode the instance mask of one site.

    Args:
        mask: (H, W) uint16 instance labels, 0 is background.
        encoding: a name in `MASK_ENCODINGS`.

    Returns:
        (H, W) integers of the type `storage_dtype(encoding)`.
    """
    return MASK_ENCODINGS[encoding].encode(mask).astype(storage_dtype(encoding), copy=False)


def draw_disks(mask: UInt16[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """Replace each cell by a disk with its position and width, so that its shape is lost.

    The disk is centered in the bounding box of the cell and contains all of its pixels. Smaller
    disks are drawn over larger ones.

    Args:
        mask: (H, W) uint16 instance labels, 0 is background.

    Returns:
        (H, W) uint16 instance labels.
    """
    from scipy import ndimage

    disks = []
    # One entry for each label up to the maximum; None for absent labels.
    for label, box in enumerate(ndimage.find_objects(mask), start=1):
        if box is None:
            continue
        # Center of the bounding box in pixel coordinates; `stop` is exclusive.
        center = [(extent.start + extent.stop - 1) / 2 for extent in box]
        rows, columns = np.nonzero(mask[box] == label)
        distance = np.hypot(rows + box[0].start - center[0], columns + box[1].start - center[1])
        disks.append((float(distance.max()), label, center))
    out = np.zeros_like(mask)
    # Only the bounding box of the disk is drawn, clipped at the border of the site.
    for radius, label, (y, x) in sorted(disks, reverse=True):
        top, left = max(0, int(y - radius)), max(0, int(x - radius))
        part = out[top : int(y + radius) + 2, left : int(x + radius) + 2]
        rows, columns = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[np.hypot(rows - y, columns - x) <= radius] = label
    return out
