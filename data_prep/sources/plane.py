"""One channel of one site: its location, its header, and rules for its pixels."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, Real, Shaped

from data_prep.sources.floats import FloatScale
from data_prep.sources.remote import redacted
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.dataset import LARGEST_SITE

#: Projection of a stack to one plane; "none" refuses stacks.
Project = Literal["none", "max", "mean", "middle"]
#: Maximum number of planes of a stack; more is a movie or a wrong header.
DEEPEST_STACK = 4096
#: Names of the samples of a color image in `Channel_Orig<CHANNEL>`.
COLORS = "RGB"
#: Minimum below which int16 pixels are unsigned numbers minus 32,768 (Olympus ScanR). Images from
#: which a background was subtracted have small negative values only.
_OFFSET_LIMIT = -(1 << 14)


@dataclass(frozen=True)
class Plane:
    """Location of one channel of one site."""

    file: str
    """Path or URL of an image file, or of an image in a Zarr store; "" if there is none."""
    channel: str = ""
    """Name of the channel in a file with several channels, or its number from 0."""
    series: int | None = None
    """Number of the image in a file with several images, from 0."""
    frame: int | None = None
    """Number of the plane in the image, in file order from 0 (as in CellProfiler LoadData)."""
    project: Project = "none"
    """Projection of a stack to one plane."""
    scale: FloatScale | None = None
    """Mapping of float pixels to uint16; ignored for integers."""

    def __str__(self) -> str:
        parts = {"series": self.series, "frame": self.frame}
        text = "".join(f", {name} {value}" for name, value in parts.items() if value is not None)
        return f"{redacted(self.file)}{text}"


@dataclass(frozen=True)
class PlaneInfo:
    """Properties of a plane from its header."""

    dtype: np.dtype
    """uint8, uint16 (any other integer), or the float type of the file."""
    shape: tuple[int, int]
    """(height, width)."""
    depth: int = 1
    """Number of planes in its stack."""
    pixel_size: float = 0.0
    """Height and width of a pixel in micrometers; 0 if the file does not state it."""


@runtime_checkable
class Source(Protocol):
    """Reader for one kind of file: TIFF, other image files, or images in Zarr stores.

    All planes of a call are in one file, so that it is opened, and shared data are decoded, once.
    Errors are `InputError`; they begin with `where`, the row of the table, and name the file.
    """

    def probe(self, planes: Sequence[Plane], where: str) -> list[PlaneInfo]:
        """Read headers and metadata; pixels are decoded for color images only."""

    def read(self, planes: Sequence[Plane], where: str) -> list[Real[np.ndarray, "h w"]]:
        """Read planes as uint8, uint16 or float; other integers are converted if they fit."""


def pixel_digest(planes: Iterable[Integer[np.ndarray, "_ _"]]) -> str:
    """Return the SHA-256 of the pixels of a site; it does not depend on the file format."""
    digest = hashlib.sha256()
    for plane in planes:
        # Planes of another type or shape can have the same bytes.
        digest.update(f"{plane.dtype.name} {plane.shape};".encode())
        digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


@functools.cache
def print_once(message: str) -> None:
    """Print a line about a kind of file, once per process: plates have thousands of files."""
    console.print(message)


def warn_lossy() -> None:
    """Warn about JPEG, in a file of its own or inside TIFF."""
    print_once(
        "warning: images with JPEG compression are lossy: intensities and textures differ from the "
        "original images; prefer these"
    )


def stored_type(dtype: np.dtype | None, plane: Plane | str, where: str) -> np.dtype:
    """Return the type of a plane: uint8 for bytes, uint16 for other integers, or the float type.

    Raises:
        InputError: The type is neither an integer nor a float.
    """
    if dtype is not None and dtype.kind == "f":
        return dtype.newbyteorder("=")
    if dtype is None or not np.issubdtype(dtype, np.integer):
        raise InputError(
            f"{where}: {plane} contains {dtype}; convert it to integers of 8 or 16 bits"
        )
    return np.dtype(np.uint8) if dtype == np.uint8 else np.dtype(np.uint16)


def as_stored(
    image: Shaped[np.ndarray, "h w"], plane: Plane, where: str
) -> Real[np.ndarray, "h w"]:
    """Convert a plane of integers to uint8 or uint16, in native byte order. Floats are unchanged.

    int16 planes with a minimum below -16,384 are unsigned numbers with an offset of -32,768 (as
    Olympus ScanR writes them): 32,768 is added, and a line is printed.

    Raises:
        InputError: A value does not fit.
    """
    if image.dtype in (np.uint8, np.uint16) or image.dtype.kind == "f":
        return image.astype(image.dtype.newbyteorder("="), copy=False)
    # Other integer types are accepted if all values fit into 16 bits.
    low, high = int(image.min()), int(image.max())
    if image.dtype.kind == "i" and image.dtype.itemsize == 2 and low < _OFFSET_LIMIT:
        print_once("info: images are int16 with an offset of -32768; 32768 is added to all pixels")
        # int32, because the sum exceeds the range of int16.
        return (image.astype(np.int32) + 32768).astype(np.uint16)
    if low < 0 or high > 65535:
        raise InputError(
            f"{where}: {plane} contains {image.dtype} with values from {low} to {high}; convert it "
            "to unsigned integers of 8 or 16 bits"
        )
    return image.astype(np.uint16)


def select_sample(
    image: Real[np.ndarray, "h w s"], plane: Plane, where: str
) -> Real[np.ndarray, "h w"]:
    """Select one sample of a color image: gray, gray + alpha, RGB or RGBA.

    The sample named by the channel (R, G or B) is used; else the only one that is not zero; else
    gray, if all samples are equal. Alpha is ignored. Automatic choices are printed.

    Raises:
        InputError: Samples differ, and the table does not select one.
    """
    count = {2: 1, 4: 3}.get(image.shape[-1], image.shape[-1])  # without alpha
    colors = image[..., :count]
    if plane.channel in list(COLORS[:count]):
        return colors[..., COLORS.index(plane.channel)]
    # Samples with at least one pixel that is not zero.
    used = [index for index in range(count) if colors[..., index].any()]
    if len(used) == 1 and count > 1:
        print_once(
            f"info: color images with pixels in sample {COLORS[used[0]]} only, which is used"
        )
        return colors[..., used[0]]
    if (colors == colors[..., :1]).all():
        print_once("info: gray images stored with several samples per pixel; the first is used")
        return colors[..., 0]
    names = ", ".join(COLORS[index] for index in used)
    raise InputError(
        f"{where}: {plane} is a color image with different pixels in {names}; select one with a "
        "column Channel_Orig<CHANNEL> (R, G or B)"
    )


def require_size(shape: Sequence[int], plane: Plane | str, where: str) -> None:
    """Refuse planes, or chunks, that are larger than any camera image before decoding them.

    Raises:
        InputError: The product of `shape` exceeds the maximum number of pixels of a site, or is 0.
    """
    if min(shape, default=1) < 1:
        raise InputError(f"{where}: {plane} is empty: its shape is {tuple(shape)}")
    # A damaged header could otherwise make the decoder allocate all memory.
    if math.prod(shape) > LARGEST_SITE:
        raise InputError(
            f"{where}: {plane} claims {tuple(shape)} pixels, more than any camera image; it was "
            "not decoded"
        )


def require_stack(depth: int, plane: Plane, where: str) -> None:
    """Refuse stacks that are too deep or have no projection.

    Raises:
        InputError: The stack cannot become one plane.
    """
    if depth > DEEPEST_STACK:
        raise InputError(f"{where}: {plane} claims a stack of {depth} planes; it was not decoded")
    if depth > 1 and plane.project == "none":
        raise InputError(
            f"{where}: {plane} is a stack of {depth} planes; choose a projection with --project "
            "max, mean or middle"
        )


def chosen_depths(depth: int, how: Project) -> range:
    """Return the planes to read: all, or the middle one (the upper of an even number)."""
    return range(depth // 2, depth // 2 + 1) if how == "middle" else range(depth)


def project_stack(
    stack: Iterable[Real[np.ndarray, "h w"]], how: Project
) -> Real[np.ndarray, "h w"]:
    """Project a stack to one plane, reading one plane at a time; a mean of integers is rounded."""
    planes = iter(stack)
    result = next(planes)
    if how == "mean":
        # float64, because the sum exceeds the range of the pixels.
        total, count = result.astype(np.float64), 1
        for plane in planes:
            total += plane
            count += 1
        mean = total / count
        return (mean if result.dtype.kind == "f" else np.rint(mean)).astype(result.dtype)
    for plane in planes:
        result = np.maximum(result, plane)
    return result


def channel_number(plane: Plane, names: Sequence[str], count: int, where: str) -> int:
    """Return the index of a channel in a file, by its name or its number in the table.

    Args:
        plane: The requested plane.
        names: Channel names in the file; empty if it has none.
        count: Number of channels in the file.
        where: Table and row, for messages.

    Raises:
        InputError: Names and channels differ in number; or the channel is missing or ambiguous.
    """
    if names and len(names) != count:
        raise InputError(
            f"{where}: {plane} names {len(names)} channels ({', '.join(names)}) but has {count}; "
            "its metadata contradict its pixels"
        )
    if names.count(plane.channel) == 1:
        return names.index(plane.channel)
    if plane.channel in names:
        raise InputError(
            f"{where}: {plane} has two channels named {plane.channel}; give its number in "
            "Channel_Orig<CHANNEL>"
        )
    # A number counts as an index only if no channel has this name.
    if re.fullmatch("[0-9]{1,9}", plane.channel) and int(plane.channel) < count:
        return int(plane.channel)
    if count == 1 and not names:
        return 0
    available = f"available: {', '.join(names)}" if names else f"{count} channels without names"
    raise InputError(
        f"{where}: {plane} has no channel {plane.channel} ({available}); select it in a column "
        "Channel_Orig<CHANNEL> (a name, or a number from 0)"
    )
