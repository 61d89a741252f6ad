"""Where pixels come from: TIFF and OME-TIFF, other lossless images, images in Zarr stores; on a disk or behind a URL.

A table says where every channel of a site lies (`Plane`). A source reads planes of one file; nothing above this room
knows which kind it was, and a dataset's digests are the same for the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import cast

import numpy as np
from jaxtyping import UInt

from data_prep.sources import lossless, tiff, zarrs
from data_prep.sources.plane import Found, Plane, Project, Source, pixel_digest

__all__ = [
    "Found",
    "Plane",
    "Project",
    "Source",
    "pixel_digest",
    "probe_planes",
    "read_planes",
    "source_of",
]


def source_of(file: str) -> Source:
    """What reads a file, by its name; TIFF where that says nothing."""
    if zarrs.inside_store(file):
        return cast(Source, zarrs)
    suffix = PurePosixPath(file).suffix.lower()
    return cast(Source, lossless if suffix in lossless.KINDS else tiff)


def read_planes(planes: Iterable[Plane], where: str) -> dict[Plane, UInt[np.ndarray, "_ _"]]:
    """The planes of a site as uint8 or uint16, in the order asked for; each file is opened once.

    Raises:
        InputError: begins with `where` and names the file.
    """
    asked = list(dict.fromkeys(planes))
    found: dict[Plane, np.ndarray] = {}
    for group in _by_file(asked):
        found.update(zip(group, source_of(group[0].file).read(group, where), strict=True))
    return {plane: found[plane] for plane in asked}


def probe_planes(planes: Iterable[Plane], where: str) -> dict[Plane, Found]:
    """What headers say of the planes of a site, in the order asked for.

    Raises:
        InputError: as `read_planes`, as far as headers tell.
    """
    asked = list(dict.fromkeys(planes))
    found: dict[Plane, Found] = {}
    for group in _by_file(asked):
        found.update(zip(group, source_of(group[0].file).probe(group, where), strict=True))
    return {plane: found[plane] for plane in asked}


def _by_file(planes: Sequence[Plane]) -> list[list[Plane]]:
    groups: dict[str, list[Plane]] = {}
    for plane in planes:
        groups.setdefault(plane.file, []).append(plane)
    return list(groups.values())
