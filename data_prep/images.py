"""Reading the channels of a site, and making the stored image and mask of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt, UInt16

from perturbjax.console import InputError

Aggregate = Literal["median", "mean", "max", "none"]

_STORED = (np.uint8, np.uint16)


def read_plane(path: str | Path, where: str) -> UInt[np.ndarray, "h w"]:
    """One channel as uint8 or uint16.

    Args:
        path: a TIFF of one plane; other integer types are stored as uint16 where their values fit.
        where: the CSV row it comes from, for messages.

    Raises:
        InputError: the file is not a readable TIFF, is cut short, is not one plane, or does not hold integers
            of up to 16 bits.
    """
    import tifffile

    try:
        image = tifffile.imread(path)
    except Exception as error:  # tifffile and its codecs raise many kinds; to the user they all mean the same
        raise InputError(f"{where}: {path} is not a readable TIFF, or is cut short ({error})") from error
    image = np.squeeze(image)
    if image.ndim != 2:
        raise InputError(f"{where}: {path} has shape {image.shape}; one plane (height, width) is needed")
    if image.dtype in _STORED:
        return image
    if not np.issubdtype(image.dtype, np.integer) or image.min() < 0 or image.max() > 65535:
        raise InputError(f"{where}: {path} holds {image.dtype}; convert it to integers of 8 or 16 bits")
    return image.astype(np.uint16)


def probe_plane(path: str | Path, where: str) -> tuple[np.dtype, tuple[int, int]]:
    """Stored type and (height, width) of a TIFF from its header, without decoding its pixels.

    Raises:
        InputError: as `read_plane`, as far as the header and the file's length tell.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            shape = tuple(size for size in tiff.series[0].shape if size > 1)
            end = max(np.add(page.dataoffsets, page.databytecounts), default=0)
            complete = end <= tiff.filehandle.size
            dtype = np.dtype(page.dtype)
    except Exception as error:  # as above
        raise InputError(f"{where}: {path} is not a readable TIFF, or is cut short ({error})") from error
    if not complete:
        raise InputError(f"{where}: {path} is cut short: it ends before its pixels do")
    if len(shape) != 2:
        raise InputError(f"{where}: {path} has shape {shape}; one plane (height, width) is needed")
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"{where}: {path} holds {dtype}; convert it to integers of 8 or 16 bits")
    return (np.dtype(np.uint8) if dtype == np.uint8 else np.dtype(np.uint16)), shape


def read_channels(paths: Sequence[str | Path], where: str) -> UInt[np.ndarray, "h w c"]:
    """The channels of one site, in the order given; uint16 as soon as one of them is.

    Raises:
        InputError: a file cannot be used, or channels differ in shape.
    """
    planes = [read_plane(path, where) for path in paths]
    for path, plane in zip(paths, planes, strict=True):
        if plane.shape != planes[0].shape:
            raise InputError(f"{where}: {path} is {plane.shape}, but {paths[0]} of the same site is {planes[0].shape}")
    return np.stack(planes, axis=-1)


def aggregate_channels(image: UInt[np.ndarray, "h w c"], how: Aggregate) -> UInt[np.ndarray, "h w k"]:
    """The stored image: k = 1 after median, mean (rounded) or max over channels; all of them after none."""
    if how == "none":
        return image
    if how == "max":
        return image.max(axis=-1, keepdims=True)
    if how == "median":
        return _median(image)
    return np.rint(image.mean(axis=-1, keepdims=True)).astype(image.dtype)


def _median(image: UInt[np.ndarray, "h w c"]) -> UInt[np.ndarray, "h w 1"]:
    """The middle value; of an even number of channels the rounded mean of the two in the middle."""
    ordered = np.sort(image, axis=-1)
    middle = image.shape[-1] // 2
    if image.shape[-1] % 2:
        return ordered[..., middle : middle + 1]
    pair = ordered[..., middle - 1 : middle + 1].mean(axis=-1, keepdims=True)
    return np.rint(pair).astype(image.dtype)


def resize_image(image: UInt[np.ndarray, "h w c"], side: int) -> UInt[np.ndarray, "side side c"]:
    """To `side` × `side` pixels by area averaging, so that nothing aliases; stored type kept."""
    from skimage.transform import resize_local_mean

    if image.shape[:2] == (side, side):
        return image
    resized = resize_local_mean(image, (side, side), preserve_range=True, channel_axis=-1)
    return np.clip(np.rint(resized), 0, np.iinfo(image.dtype).max).astype(image.dtype)


def resize_mask(mask: UInt16[np.ndarray, "h w"], side: int) -> UInt16[np.ndarray, "side side"]:
    """To `side` × `side` pixels, each with the label at its centre: labels never mix."""
    rows = ((np.arange(side) + 0.5) * mask.shape[0] / side).astype(int)
    columns = ((np.arange(side) + 0.5) * mask.shape[1] / side).astype(int)
    return mask[np.ix_(rows, columns)]


def scaled(image: UInt[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Each channel with its 1st percentile at 0 and its 99.8th at 1, not clipped."""
    low, high = np.percentile(image, (1, 99.8), axis=(0, 1))
    return (image.astype(np.float32) - low.astype(np.float32)) / np.maximum(high - low, 1).astype(np.float32)
