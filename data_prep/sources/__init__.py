"""Image sources: TIFF and OME-TIFF, other lossless images, and Zarr stores, on disk or remote.

A table locates each channel of a site (`Plane`). A source reads the planes of one file. Other
packages do not depend on the file format, and the checksum of a dataset depends on the pixels only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import TypeVar, cast

import numpy as np
from jaxtyping import UInt

from data_prep.sources import lossless, tiff, zarrs
from data_prep.sources.plane import Plane, PlaneInfo, Project, Source, pixel_digest

__all__ = [
    "Plane",
    "PlaneInfo",
    "Project",
    "Source",
    "pixel_digest",
    "probe_planes",
    "read_planes",
    "source_of",
]

T = TypeVar("T")


def source_of(file: str) -> Source:
    """Return the reader of a file by its name; TIFF by default."""
    if zarrs.inside_store(file):
        return cast(Source, zarrs)
    suffix = PurePosixPath(file).suffix.lower()
    return cast(Source, lossless if suffix in lossless.KINDS else tiff)


def read_planes(planes: Iterable[Plane], where: str) -> dict[Plane, UInt[np.ndarray, "_ _"]]:
    """Read planes of a site as uint8 or uint16, in the given order; each file is opened once.

    Args:
        planes: Planes to read.
        where: Table and row, with which error messages begin.

    Raises:
        InputError: A plane cannot be read.
    """
    return _by_file(planes, lambda group: source_of(group[0].file).read(group, where))


def probe_planes(planes: Iterable[Plane], where: str) -> dict[Plane, PlaneInfo]:
    """Read the headers of planes of a site, in the given order.

    Raises:
        InputError: As `read_planes`, as far as headers show it.
    """
    return _by_file(planes, lambda group: source_of(group[0].file).probe(group, where))


def _by_file(planes: Iterable[Plane], function: Callable[[list[Plane]], list[T]]) -> dict[Plane, T]:
    """Call a function on the planes of each file; return its results in the order of the planes."""
    requested = list(dict.fromkeys(planes))
    groups: dict[str, list[Plane]] = {}
    for plane in requested:
        # Planes of one file are read together, so that it is opened once.
        groups.setdefault(plane.file, []).append(plane)
    results: dict[Plane, T] = {}
    for group in groups.values():
        results.update(zip(group, function(group), strict=True))
    # The groups can have another order than the request.
    return {plane: results[plane] for plane in requested}
