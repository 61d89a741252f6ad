"""Reading the channels of a site, and making the stored image and mask of them."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt, UInt16

from perturbjax.console import InputError
from perturbjax.dataset import LARGEST_SITE

Aggregate = Literal["median", "mean", "max", "none"]

_STORED = (np.uint8, np.uint16)
#: Bytes a file of one plane may have beyond its pixels, uncompressed.
_HEADER_BYTES = 64 << 20


def read_file(path: str | Path, where: str) -> bytes:
    """The bytes of a TIFF.

    Raises:
        InputError: it is a folder, a pipe or a device, is too large for one plane, or cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{where}: {path} is not a file, and so not a readable TIFF")
        if status.st_size > 2 * LARGEST_SITE + _HEADER_BYTES:
            raise InputError(f"{where}: {path} has {status.st_size} bytes, more than one plane can; crop or tile it")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror or error})") from error


def read_plane(path: str | Path, where: str) -> UInt[np.ndarray, "h w"]:
    """One channel as uint8 or uint16.

    Args:
        path: a TIFF of one plane; other integer types are stored as uint16 where their values fit.
        where: the CSV row it comes from, for messages.

    Raises:
        InputError: the file is not a readable TIFF, is cut short, is not one plane, or does not hold integers
            of up to 16 bits.
    """
    return decode_plane(read_file(path, where), path, where)


def decode_plane(content: bytes, path: str | Path, where: str) -> UInt[np.ndarray, "h w"]:
    """`read_plane` of a file that was read already."""
    with _open_plane(content, path, where) as page:
        image = page.asarray().reshape(page.imagelength, page.imagewidth)
    if image.dtype in _STORED:
        return image
    if image.min() < 0 or image.max() > 65535:
        raise InputError(f"{where}: {path} holds {image.dtype}; convert it to integers of 8 or 16 bits")
    return image.astype(np.uint16)


def probe_plane(path: str | Path, where: str) -> tuple[np.dtype, tuple[int, int]]:
    """Stored type and (height, width) of a TIFF from its header, without decoding its pixels.

    Raises:
        InputError: as `read_plane`, as far as the header and the file's length tell.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror or error})") from error
    if not regular:
        raise InputError(f"{where}: {path} is not a file, and so not a readable TIFF")
    with _open_plane(Path(path), path, where) as page:
        dtype = np.dtype(np.uint8) if page.dtype == np.uint8 else np.dtype(np.uint16)
        return dtype, (page.imagelength, page.imagewidth)


@contextmanager
def _open_plane(source: bytes | Path, path: str | Path, where: str) -> Iterator[Any]:
    """The one page of a TIFF, whose header promises one plane of integers of a size that can be decoded."""
    import tifffile

    try:
        with tifffile.TiffFile(BytesIO(source) if isinstance(source, bytes) else source) as tiff:
            _check_header(tiff, path, where)
            yield tiff.pages[0]
    except InputError:
        raise
    except Exception as error:  # tifffile and its codecs raise many kinds; to the user they all mean the same
        raise InputError(f"{where}: {path} is not a readable TIFF, or is cut short ({error})") from error


def _check_header(tiff: Any, path: str | Path, where: str) -> None:
    page = tiff.pages[0]
    if math.prod(page.shape) != page.imagelength * page.imagewidth:
        raise InputError(f"{where}: {path} has shape {page.shape}; one plane (height, width) is needed")
    chunk = math.prod(page.chunks) if page.chunks else 0
    if max(math.prod(page.shape), chunk) > LARGEST_SITE:
        raise InputError(f"{where}: {path} claims {page.shape} pixels, more than any camera's; it was not decoded")
    if page.dtype is None or not np.issubdtype(page.dtype, np.integer):
        raise InputError(f"{where}: {path} holds {page.dtype}; convert it to integers of 8 or 16 bits")
    if max(np.add(page.dataoffsets, page.databytecounts), default=0) > tiff.filehandle.size:
        raise InputError(f"{where}: {path} is cut short: it ends before its pixels do")
    if _has_second_plane(tiff):
        raise InputError(f"{where}: {path} has several pages; one plane (height, width) is needed: split it")


def _has_second_plane(tiff: Any) -> bool:
    """Whether a page follows that is no small copy of the first."""
    try:
        return not tiff.pages[1].is_reduced
    except IndexError:
        return False


def stack_planes(
    planes: Mapping[Any, UInt[np.ndarray, "h w"]], paths: Sequence[str | Path], where: str
) -> UInt[np.ndarray, "h w c"]:
    """The channels of one site, in the order of their files; uint16 as soon as one of them is.

    Raises:
        InputError: channels differ in shape.
    """
    for path in paths:
        if planes[path].shape != planes[paths[0]].shape:
            first = planes[paths[0]].shape
            raise InputError(f"{where}: {path} is {planes[path].shape}, but {paths[0]} of the same site is {first}")
    return np.stack([planes[path] for path in paths], axis=-1)


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
