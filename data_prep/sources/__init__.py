"""Image sources: TIFF, other image files, microscope files and Zarr stores, on disk or remote.

A table locates each channel of a site (`Plane`). A source reads the planes of one file. Other
packages do not depend on the file format, and the checksum of a dataset depends on the pixels only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import TypeVar, cast

import numpy as np
from jaxtyping import Real, UInt

from data_prep.sources import lossless, microscopes, tiff, zarrs
from data_prep.sources.floats import FloatRange, measure_range
from data_prep.sources.plane import Plane, PlaneInfo, Project, Source, pixel_digest
from perturbjax.core.errors import InputError

__all__ = [
    "Plane",
    "PlaneInfo",
    "Project",
    "Source",
    "measure_floats",
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
    if suffix in microscopes.KINDS:
        return cast(Source, microscopes)
    return cast(Source, lossless if suffix in lossless.KINDS else tiff)


def read_planes(planes: Iterable[Plane], where: str) -> dict[Plane, UInt[np.ndarray, "_ _"]]:
    """Read planes of a site as uint8 or uint16, in the given order; each file is opened once.

    Args:
        planes: Planes to read; those with float pixels need a scale.
        where: Table and row, with which error messages begin.

    Raises:
        InputError: A plane cannot be read.
    """
    return {plane: _integers(image, plane, where) for plane, image in _read(planes, where).items()}


def measure_floats(planes: Iterable[Plane], where: str) -> dict[Plane, FloatRange]:
    """Measure the range of the pixels of float planes.

    Raises:
        InputError: A plane cannot be read.
    """
    return {plane: measure_range(image) for plane, image in _read(planes, where).items()}


def probe_planes(planes: Iterable[Plane], where: str) -> dict[Plane, PlaneInfo]:
    """Read the headers of planes of a site, in the given order.

    Raises:
        InputError: As `read_planes`, as far as headers show it.
    """
    return _by_file(planes, lambda group: source_of(group[0].file).probe(group, where))


def _read(planes: Iterable[Plane], where: str) -> dict[Plane, Real[np.ndarray, "_ _"]]:
    return _by_file(planes, lambda group: source_of(group[0].file).read(group, where))


def _integers(image: Real[np.ndarray, "h w"], plane: Plane, where: str) -> UInt[np.ndarray, "h w"]:
    if image.dtype.kind != "f":
        return cast(np.ndarray, image)
    if plane.scale is None:
        raise InputError(
            f"{where}: {plane} contains {image.dtype}, but had integers when the files were "
            "checked; run the same command again"
        )
    return plane.scale.stored(image)


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
