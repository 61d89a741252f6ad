"""TIFF: one plane a file, and OME-TIFF, ImageJ's and other files of several channels, planes and images.

A file of one page is read as it is. In any other, what the pages are must be known: from OME's or ImageJ's metadata, or
from the row of the table, which names a series, a channel or a frame. Nothing is taken because it comes first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Integer, UInt

from data_prep.sources.files import open_file
from data_prep.sources.plane import (
    Found,
    Plane,
    as_stored,
    channel_number,
    chosen_depths,
    projected,
    require_size,
    require_stack,
    stored_type,
)
from perturbjax.core.errors import InputError


def read(planes: Sequence[Plane], where: str) -> list[UInt[np.ndarray, "h w"]]:
    """The planes of one TIFF.

    Raises:
        InputError: it is not a readable TIFF, is cut short, does not say which of its pages is meant, or does not hold
            integers of up to 16 bits.
    """
    with _opened(planes[0].file, where) as tiff:
        return [
            as_stored(_pixels(_choose(tiff, plane, where), plane), plane, where) for plane in planes
        ]


def probe(planes: Sequence[Plane], where: str) -> list[Found]:
    """Stored type, (height, width) and depth of the planes, from the file's headers.

    Raises:
        InputError: as `read`, as far as headers and the file's length tell.
    """
    with _opened(planes[0].file, where, header=True) as tiff:
        return [_found(_choose(tiff, plane, where), plane, where) for plane in planes]


def _found(pages: list[Any], plane: Plane, where: str) -> Found:
    page = pages[0]
    return Found(
        stored_type(page.dtype, plane, where), (page.imagelength, page.imagewidth), len(pages)
    )


def _pixels(pages: list[Any], plane: Plane) -> Integer[np.ndarray, "h w"]:
    chosen = [pages[depth] for depth in chosen_depths(len(pages), plane.project)]
    return projected(
        (page.asarray().reshape(page.imagelength, page.imagewidth) for page in chosen),
        plane.project,
    )


@contextmanager
def _opened(file: str, where: str, header: bool = False) -> Iterator[Any]:
    import tifffile

    with open_file(file, where, header) as opened:
        try:
            logging.getLogger("tifffile").setLevel(
                logging.CRITICAL
            )  # what it complains of ends in a line of ours
            with tifffile.TiffFile(cast(IO[bytes], opened), _multifile=False) as tiff:
                yield tiff
        except InputError:
            raise
        except (
            Exception
        ) as error:  # tifffile and its codecs raise many kinds; to the user they all mean the same
            raise InputError(
                f"{where}: {file} is not a readable TIFF, or is cut short ({error})"
            ) from error


def _choose(tiff: Any, plane: Plane, where: str) -> list[Any]:
    """The pages of the channel asked for, one a depth, whose headers promise integers of a size that can be decoded."""
    if not _has_second_plane(tiff):
        if plane.series or plane.frame:
            raise InputError(f"{where}: {plane} is not in the file, which holds one plane")
        pages = [tiff.pages[0]]
    else:
        pages = _of_series(tiff, plane, where)
    for page in pages:
        _check_page(page, tiff, plane, where)
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise InputError(f"{where}: {plane} is a stack of planes of different sizes or types")
    require_stack(len(pages), plane, where)
    return pages


def _has_second_plane(tiff: Any) -> bool:
    """Whether a page follows that is no small copy of the first."""
    try:
        return not getattr(
            tiff.pages[1], "is_reduced", False
        )  # what was found to be part of a series has no such word
    except IndexError:
        return False


def _of_series(tiff: Any, plane: Plane, where: str) -> list[Any]:
    series, number = _series(tiff, plane, where)
    axes = [
        (name, size)
        for name, size in zip(series.axes, series.shape, strict=True)
        if name not in "YX"
    ]
    sizes = dict(axes)
    pages = list(series.pages)
    if len(pages) != math.prod(size for _, size in axes) or None in pages:
        raise InputError(
            f"{where}: {plane} has {sum(page is not None for page in pages)} pages where its metadata promise "
            f"{' x '.join(f'{size} {name}' for name, size in axes)}; it is half there, or mixes colours"
        )
    if plane.frame is not None:
        if plane.frame >= len(pages):
            raise InputError(
                f"{where}: {plane} is not in the file, which holds {len(pages)} planes"
            )
        return [pages[plane.frame].aspage()]
    unknown = [f"{size} {name}" for name, size in axes if name not in "CZ" and size > 1]
    if unknown:
        raise InputError(
            f"{where}: {plane} has several pages ({', '.join(unknown)}), and nothing says which is meant; one plane "
            "(height, width) is needed: split it, or say which in a column Frame_Orig<CHANNEL>"
        )
    names = _channel_names(tiff, number)
    channel = channel_number(plane, names, sizes["C"], where) if sizes.get("C", 1) > 1 else 0
    order = np.arange(len(pages)).reshape([size for _, size in axes])
    picked = order[tuple(channel if name == "C" else slice(None) for name, _ in axes)]
    return [pages[index].aspage() for index in picked.ravel()]


def _series(tiff: Any, plane: Plane, where: str) -> tuple[Any, int]:
    number = plane.series or 0
    if plane.series is None and len(tiff.series) > 1:
        raise InputError(
            f"{where}: {plane} has several pages, as {len(tiff.series)} images; one plane (height, width) is needed: "
            "split it, or say which image in a column Series_Orig<CHANNEL>"
        )
    if number >= len(tiff.series):
        raise InputError(
            f"{where}: {plane} is not in the file, which holds {len(tiff.series)} images"
        )
    return tiff.series[number], number


def _channel_names(tiff: Any, series: int) -> list[str]:
    """Names of an image's channels in OME's metadata; none where one has no name."""
    import tifffile

    if not tiff.is_ome:
        return []
    images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
    image = images[series] if isinstance(images, list) else images
    channels = image["Pixels"].get("Channel", [])
    names = [
        str(channel.get("Name", ""))
        for channel in (channels if isinstance(channels, list) else [channels])
    ]
    return names if all(names) else []


def _check_page(page: Any, tiff: Any, plane: Plane, where: str) -> None:
    if math.prod(page.shape) != page.imagelength * page.imagewidth:
        raise InputError(
            f"{where}: {plane} has shape {page.shape}; one plane (height, width) is needed"
        )
    require_size(page.shape, plane, where)
    require_size(page.chunks or (0,), plane, where)
    stored_type(page.dtype, plane, where)
    if max(np.add(page.dataoffsets, page.databytecounts), default=0) > tiff.filehandle.size:
        raise InputError(f"{where}: {plane} is cut short: it ends before its pixels do")
