"""Read a folder of images with masks for `train-segmenter`, and check all of it before training
starts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float32, Integer, Num, UInt

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.segmentation.foreground import analyze_foreground

#: Ends of the names of masks: those of perturbjax and of Cellpose.
SUFFIXES = ("_labels", "_masks")


class LabeledImage(NamedTuple):
    """An image and its instance mask."""

    name: str
    image: Float32[np.ndarray, "h w"]
    """Normalized as for the network's input."""
    labels: UInt[np.ndarray, "h w"]


def read_folder(folder: Path) -> list[LabeledImage]:
    """Read every image NAME.tif with its mask NAME_labels.tif or NAME_masks.tif, in the order of
    names.

    Masks in which one value marks all objects, for example 0 and 255, are split into connected
    components.

    Raises:
        InputError: the folder or its images are missing, an image has no mask or two, a file is not
            a plane of numbers, image and mask differ in size, or no mask contains an object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"--images {folder}: is not a folder. Pass a folder with NAME.tif and NAME_labels.tif "
            "for each image"
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
            f"--images {folder}: contains no image. Add NAME.tif and NAME_labels.tif for each image"
        )
    pairs = [_read_pair(stem, files) for stem in images]
    if not any(pair.labels.any() for pair in pairs):
        raise InputError(
            f"--images {folder}: no mask contains an object (all pixels are 0), so nothing can be "
            "learned"
        )
    # `separate_objects` returns the same array if it changes no label; the count below relies on
    # this.
    separated = [pair._replace(labels=separate_objects(pair.labels)) for pair in pairs]
    count = sum(a.labels is not b.labels for a, b in zip(pairs, separated, strict=True))
    if count:
        console.print(
            f"info: {folder}: {count} masks have one value for all objects; "
            "their connected components are used as objects"
        )
    return separated


def _read_pair(stem: str, files: dict[str, Path]) -> LabeledImage:
    path = files[stem]
    masks = [stem + suffix for suffix in SUFFIXES if stem + suffix in files]
    if len(masks) != 1:
        problem = (
            f"has both {' and '.join(masks)}; keep one"
            if masks
            else f"has no mask {stem}{SUFFIXES[0]}.tif"
        )
        raise InputError(f"{path}: {problem}")
    image, labels = _read_plane(path), _read_plane(files[masks[0]])
    if image.shape != labels.shape:
        raise InputError(
            f"{files[masks[0]]}: is {labels.shape} pixels, but its image is {image.shape}"
        )
    if labels.dtype.kind not in "ui" or labels.min(initial=0) < 0:
        raise InputError(
            f"{files[masks[0]]}: contains {labels.dtype}; a mask contains whole numbers, 0 for "
            "background"
        )
    return LabeledImage(stem, normalize(image), labels.astype(np.uint32))


def _read_plane(path: Path) -> np.ndarray:
    import tifffile

    try:
        # Axes of length 1, such as a single page or channel, are removed.
        plane = np.squeeze(tifffile.imread(path))
    except Exception as error:  # tifffile and its codecs raise many kinds
        raise InputError(f"{path}: cannot be read as TIFF ({error})") from error
    if plane.ndim != 2 or plane.dtype.kind not in "uif" or min(plane.shape) < 2:
        raise InputError(
            f"{path}: is {plane.shape} of {plane.dtype}; it must be one channel of gray values"
        )
    return plane


def separate_objects(labels: Integer[np.ndarray, "h w"]) -> Integer[np.ndarray, "h w"]:
    """Number the connected components of a mask with a single label; keep other masks."""
    if len(np.unique(labels[labels > 0])) != 1:
        return labels
    # One component is a mask with one object, not a binary mask of several.
    components, count = ndi.label(labels > 0)
    return components.astype(labels.dtype) if count > 1 else labels


def normalize(plane: Num[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Scale intensities as for the network's input: 0 and 1 at the 1st and 99th percentile of most
    images."""
    low, span = analyze_foreground(plane[..., None]).ranges[0]
    # A channel without contrast has an infinite span, and becomes 0.
    return np.nan_to_num((plane.astype(np.float32) - low) / span)
