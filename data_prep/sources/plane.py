"""One channel of one site: where it lies, what is known of it before it is read, and what it is once it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt

from perturbjax.core.errors import InputError
from perturbjax.dataset import LARGEST_SITE

#: How a stack of planes becomes one; none refuses to guess.
Project = Literal["none", "max", "mean", "middle"]
#: Planes a stack may have: more is a movie, or a header that lies.
DEEPEST_STACK = 4096
#: Says that a plane is asked for by a number; in a column of load_data.csv it is written as one.
NUMBER = "0123456789"


@dataclass(frozen=True)
class Plane:
    """Where one channel of one site lies."""

    file: str
    """Path or URL of an image file, or of an image in a Zarr store; empty where there is none."""
    channel: str = ""
    """Its name in a file that holds several, or its number from 0."""
    series: int | None = None
    """Which image of a file that holds several."""
    frame: int | None = None
    """Which plane of that image, in the file's order: as CellProfiler's LoadData counts, from 0."""
    project: Project = "none"
    """How a stack becomes one plane."""

    def __str__(self) -> str:
        parts = {"series": self.series, "frame": self.frame}
        said = "".join(f", {name} {value}" for name, value in parts.items() if value is not None)
        return f"{self.file}{said}"


@dataclass(frozen=True)
class Found:
    """What a header says of a plane."""

    dtype: np.dtype
    """As it is stored: uint8 or uint16."""
    shape: tuple[int, int]
    """(height, width)."""
    depth: int = 1
    """Planes of the stack it is made from."""


@runtime_checkable
class Source(Protocol):
    """What reads one kind of file: TIFF, other image files, images in Zarr stores.

    Both functions are given planes that lie in one file, so that it is opened, and what they share decoded, once.
    Both raise `InputError` that begins with `where`, the row of the table, and names the file.
    """

    def probe(self, planes: Sequence[Plane], where: str) -> list[Found]:
        """What headers and metadata say, without decoding pixels."""

    def read(self, planes: Sequence[Plane], where: str) -> list[UInt[np.ndarray, "h w"]]:
        """The planes as uint8 or uint16; other integers where their values fit."""


def pixel_digest(planes: Iterable[UInt[np.ndarray, "_ _"]]) -> str:
    """SHA-256 of what a site is made from: the same for the same pixels, whatever they were kept in."""
    digest = hashlib.sha256()
    for plane in planes:
        digest.update(f"{plane.dtype.name} {plane.shape};".encode())
        digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


def stored_type(dtype: np.dtype | None, plane: Plane | str, where: str) -> np.dtype:
    """uint8 for bytes, uint16 for every other integer.

    Raises:
        InputError: it holds no integers.
    """
    if dtype is None or not np.issubdtype(dtype, np.integer):
        raise InputError(f"{where}: {plane} holds {dtype}; convert it to integers of 8 or 16 bits")
    return np.dtype(np.uint8) if dtype == np.uint8 else np.dtype(np.uint16)


def as_stored(
    image: Integer[np.ndarray, "h w"], plane: Plane, where: str
) -> UInt[np.ndarray, "h w"]:
    """The plane as uint8 or uint16, in this machine's byte order.

    Raises:
        InputError: a value does not fit.
    """
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.min() < 0 or image.max() > 65535:
        raise InputError(
            f"{where}: {plane} holds {image.dtype}; convert it to integers of 8 or 16 bits"
        )
    return image.astype(np.uint16)


def require_size(shape: Sequence[int], plane: Plane | str, where: str) -> None:
    """Refuse what no camera makes before it is decoded.

    Raises:
        InputError: the plane, or a chunk that must be decoded whole, is larger.
    """
    if math.prod(shape) > LARGEST_SITE:
        raise InputError(
            f"{where}: {plane} claims {tuple(shape)} pixels, more than any camera's; it was not decoded"
        )


def require_stack(depth: int, plane: Plane, where: str) -> None:
    """Refuse a stack that nobody said how to project.

    Raises:
        InputError: so it is, or it is too deep.
    """
    if depth > DEEPEST_STACK:
        raise InputError(f"{where}: {plane} claims a stack of {depth} planes; it was not decoded")
    if depth > 1 and plane.project == "none":
        raise InputError(
            f"{where}: {plane} is a stack of {depth} planes; say how they become one with --project max, mean or middle"
        )


def chosen_depths(depth: int, how: Project) -> range:
    """Which planes of a stack are read: the one in the middle (of an even number the upper), or all."""
    return range(depth // 2, depth // 2 + 1) if how == "middle" else range(depth)


def projected(
    stack: Iterable[Integer[np.ndarray, "h w"]], how: Project
) -> Integer[np.ndarray, "h w"]:
    """The planes of a stack as one, read one after the other: the mean is rounded to the type they are stored in."""
    planes = iter(stack)
    first = next(planes)
    if how == "mean":
        total, count = first.astype(np.float64), 1
        for plane in planes:
            total += plane
            count += 1
        return np.rint(total / count).astype(first.dtype)
    for plane in planes:
        first = np.maximum(first, plane)
    return first


def channel_number(plane: Plane, names: Sequence[str], count: int, where: str) -> int:
    """Place of the channel asked for among those of a file, by its name in it, or by the number a table gives.

    Args:
        plane: what is asked for.
        names: of the file's channels; empty where it names none.
        count: channels the file holds.
        where: row of the table, for messages.

    Raises:
        InputError: the names are not as many as the channels; the channel is not there, or there twice.
    """
    if names and len(names) != count:
        raise InputError(
            f"{where}: {plane} names {len(names)} channels ({', '.join(names)}) and holds {count}; "
            "its metadata contradict its pixels"
        )
    if names.count(plane.channel) == 1:
        return names.index(plane.channel)
    if plane.channel in names:
        raise InputError(
            f"{where}: {plane} names two channels {plane.channel}; give its number in Channel_Orig<CHANNEL>"
        )
    if plane.channel and set(plane.channel) <= set(NUMBER) and int(plane.channel) < count:
        return int(plane.channel)
    if count == 1 and not names:
        return 0
    have = f"it has {', '.join(names)}" if names else f"it holds {count} channels without names"
    raise InputError(
        f"{where}: {plane} has no channel {plane.channel}; {have}: say which in a column Channel_Orig<CHANNEL> "
        "(a name, or a number from 0)"
    )
