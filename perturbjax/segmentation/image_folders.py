"""A folder of images with masks, as the trainer reads it: everything checked before anything is learned."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt

from perturbjax.core.errors import InputError
from perturbjax.segmentation.tiles import percentiles

#: How a mask is named after its image: ours, and cellpose's.
SUFFIXES = ("_labels", "_masks")


class Picture(NamedTuple):
    """An image and the truth about it."""

    name: str
    image: Float32[np.ndarray, "h w"]
    """0 and 1 at its 1st and 99th percentile."""
    labels: UInt[np.ndarray, "h w"]


def read_folder(folder: Path) -> list[Picture]:
    """Every image NAME.tif of a folder with its mask, NAME_labels.tif or NAME_masks.tif, in the order of names.

    Raises:
        InputError: there is no folder or no image in it, an image has no mask or two, or one of the two is no plane of
            whole numbers, or they differ in size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"--images {folder}: is no folder; it should hold NAME.tif and NAME_labels.tif for each image"
        )
    files = {
        path.stem: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".tif", ".tiff")
    }
    masks = {stem for stem in files if stem.endswith(SUFFIXES)}
    images = [stem for stem in files if stem not in masks]
    if not images:
        raise InputError(
            f"--images {folder}: holds no image; it should hold NAME.tif and NAME_labels.tif for each"
        )
    return [_read(stem, files) for stem in images]


def _read(stem: str, files: dict[str, Path]) -> Picture:
    path = files[stem]
    theirs = [stem + suffix for suffix in SUFFIXES if stem + suffix in files]
    if len(theirs) != 1:
        problem = (
            f"has both {' and '.join(theirs)}; keep one"
            if theirs
            else f"has no mask {stem}{SUFFIXES[0]}.tif"
        )
        raise InputError(f"{path}: {problem}")
    image, labels = _plane(path), _plane(files[theirs[0]])
    if image.shape != labels.shape:
        raise InputError(
            f"{files[theirs[0]]}: is {labels.shape} pixels, and its image is {image.shape}"
        )
    if labels.dtype.kind not in "ui" or labels.min(initial=0) < 0:
        raise InputError(
            f"{files[theirs[0]]}: holds {labels.dtype}; a mask holds whole numbers, 0 for background"
        )
    return Picture(stem, normalised(image), labels.astype(np.uint32))


def _plane(path: Path) -> np.ndarray:
    import tifffile

    try:
        plane = np.squeeze(tifffile.imread(path))
    except Exception as error:  # tifffile and its codecs raise many kinds
        raise InputError(f"{path}: cannot be read as TIFF ({error})") from error
    if plane.ndim != 2 or plane.dtype.kind not in "uif" or min(plane.shape) < 2:
        raise InputError(
            f"{path}: is {plane.shape} of {plane.dtype}; one channel of grey values is wanted"
        )
    return plane


def normalised(plane: np.ndarray) -> Float32[np.ndarray, "h w"]:
    """As the network is given it: 0 and 1 at the 1st and 99th percentile."""
    low, span = percentiles(plane[..., None])[0]
    return np.nan_to_num((plane.astype(np.float32) - low) / span)
