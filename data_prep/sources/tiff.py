"""Reader for TIFF: single planes, and OME-TIFF, ImageJ and other files with several planes.

A file with one page is read directly. In files with several pages, OME or ImageJ metadata, or the
series, channel or frame of the table, must identify the page; the first page is never used by
default.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Real

from data_prep.sources.files import open_file
from data_prep.sources.pixel_size import tiff_size
from data_prep.sources.plane import (
    Plane,
    PlaneInfo,
    as_stored,
    channel_number,
    chosen_depths,
    print_once,
    project_stack,
    require_size,
    require_stack,
    select_sample,
    stored_type,
)
from data_prep.sources.remote import redacted
from data_prep.sources.tiff_checks import (
    LARGEST_READ,
    LimitedReader,
    require_bounded,
    require_complete,
    require_plausible_metadata,
)
from perturbjax.core.errors import InputError

#: Microscope and image formats without a reader here, by the suffix of the file.
FOREIGN = {
    **dict.fromkeys((".c01", ".dib"), "Cellomics C01/DIB"),
    ".vsi": "Olympus VSI",
    ".oib": "Olympus OIB",
    ".oif": "Olympus OIF",
    ".oir": "Olympus OIR",
    ".ims": "Imaris IMS",
    ".dv": "DeltaVision DV",
    ".stk": "MetaMorph STK",
    ".h5": "HDF5",
    ".mrc": "MRC",
    ".jxl": "JPEG XL",
    ".webp": "WebP",
}
_MIN_IS_WHITE = 0


def read(planes: Sequence[Plane], where: str) -> list[Real[np.ndarray, "h w"]]:
    """Read planes of one TIFF.

    Raises:
        InputError: The file is not a readable TIFF or is truncated, its pages are ambiguous, or it
            contains neither floats nor integers of up to 16 bits.
    """
    with _open(planes[0].file, where) as (tiff, reader):
        chosen = [_choose(tiff, plane, where) for plane in planes]
        reader.limit = LARGEST_READ
        return [
            _plane_pixels(pages, plane, where) for pages, plane in zip(chosen, planes, strict=True)
        ]


def probe(planes: Sequence[Plane], where: str) -> list[PlaneInfo]:
    """Read stored type, (height, width) and depth of planes from the headers of a file.

    Pixels of color images are decoded, because only they show whether a sample must be selected.

    Raises:
        InputError: As `read`, as far as headers and the length of the file show it.
    """
    with _open(planes[0].file, where, header=True) as (tiff, reader):
        chosen = [_choose(tiff, plane, where) for plane in planes]
        reader.limit = LARGEST_READ
        return [
            _info(tiff, pages, plane, where) for pages, plane in zip(chosen, planes, strict=True)
        ]


def _info(tiff: Any, pages: list[Any], plane: Plane, where: str) -> PlaneInfo:
    page = pages[0]
    if _samples(page) > 1:
        _page_pixels(page, plane, where)
    dtype = stored_type(page.dtype, plane, where)
    size = tiff_size(tiff, page, plane.series)
    return PlaneInfo(dtype, (page.imagelength, page.imagewidth), len(pages), size)


def _plane_pixels(pages: list[Any], plane: Plane, where: str) -> Real[np.ndarray, "h w"]:
    chosen = [pages[depth] for depth in chosen_depths(len(pages), plane.project)]
    return project_stack((_page_pixels(page, plane, where) for page in chosen), plane.project)


def _samples(page: Any) -> int:
    """Return the number of samples per pixel: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA."""
    return math.prod(page.shape) // max(page.imagelength * page.imagewidth, 1)


def _page_pixels(page: Any, plane: Plane, where: str) -> Real[np.ndarray, "h w"]:
    require_bounded(page, plane, where)
    image = page.asarray()
    size, samples = (page.imagelength, page.imagewidth), _samples(page)
    if samples > 1:
        # PlanarConfiguration 2 stores one plane per sample: (samples, height, width).
        planar = page.planarconfig == 2
        image = image.reshape((samples, *size) if planar else (*size, samples))
        image = select_sample(np.moveaxis(image, 0, -1) if planar else image, plane, where)
    image = as_stored(image.reshape(size), plane, where)
    if page.photometric == _MIN_IS_WHITE:
        # TIFF 6.0, section 3: 0 is white. Invert within the bits of a pixel, as Bio-Formats does.
        if image.dtype.kind == "f":
            raise InputError(
                f"{where}: {plane} contains {image.dtype} with photometric interpretation "
                "WhiteIsZero, whose white level is not defined; save it as BlackIsZero"
            )
        print_once("info: TIFF images with photometric interpretation WhiteIsZero are inverted")
        image = np.asarray((1 << min(page.bitspersample, 16)) - 1, image.dtype) - image
    return image


@contextmanager
def _open(file: str, where: str, header: bool = False) -> Iterator[tuple[Any, LimitedReader]]:
    """Open a TIFF, and limit its reader; any error within the block becomes one line."""
    import tifffile

    label = redacted(file)
    if name := FOREIGN.get(PurePosixPath(file).suffix.lower()):
        raise InputError(
            f"{where}: {label} is {name}, which is not supported; convert it to OME-Zarr with "
            "bioformats2raw, or export TIFF or OME-TIFF"
        )
    with open_file(file, where, header) as stream:
        try:
            # tifffile's own messages are replaced by the InputError below.
            logging.getLogger("tifffile").setLevel(logging.CRITICAL)
            # Files of a multi-file OME data set are not followed: the table names each file.
            reader = LimitedReader(stream)
            with tifffile.TiffFile(cast(IO[bytes], reader), _multifile=False) as tiff:
                yield tiff, reader
        except InputError:
            raise
        except Exception as error:  # tifffile and its codecs raise many types
            raise InputError(
                f"{where}: {label} is not a readable TIFF, or is truncated ({error})"
            ) from error


def _choose(tiff: Any, plane: Plane, where: str) -> list[Any]:
    """Return the pages of a channel, one per depth, after checking their headers."""
    if not _has_second_plane(tiff):
        if plane.series or plane.frame:
            raise InputError(f"{where}: {plane} is not in the file, which contains one plane")
        pages = [tiff.pages[0]]
    else:
        pages = _series_pages(tiff, plane, where)
    for page in pages:
        _check_page(page, plane, where)
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise InputError(f"{where}: {plane} is a stack of planes of different sizes or types")
    require_stack(len(pages), plane, where)
    return pages


def _has_second_plane(tiff: Any) -> bool:
    """Return whether there is a second page that is not a smaller copy of the first."""
    try:
        # tifffile's frames (pages of a known series) do not have this attribute.
        return not getattr(tiff.pages[1], "is_reduced", False)
    except IndexError:
        return False


def _series_pages(tiff: Any, plane: Plane, where: str) -> list[Any]:
    require_plausible_metadata(tiff, plane, where)
    series, number = _series(tiff, plane, where)
    axes = [
        (name, size)
        for name, size in zip(series.axes, series.shape, strict=True)
        if name not in "YX"
    ]
    sizes = dict(axes)
    pages = list(series.pages)
    if len(pages) != math.prod(size for _, size in axes) or None in pages:
        expected = " x ".join(f"{size} {name}" for name, size in axes)
        raise InputError(
            f"{where}: {plane} has {sum(page is not None for page in pages)} pages, but its "
            f"metadata list {expected}; it is incomplete, or mixes colors"
        )
    # An explicit frame selects the page directly.
    if plane.frame is not None:
        if plane.frame >= len(pages):
            raise InputError(
                f"{where}: {plane} is not in the file, which contains {len(pages)} planes"
            )
        return [pages[plane.frame].aspage()]
    # Only channels and depths can be resolved; time points and other axes cannot.
    unknown = [f"{size} {name}" for name, size in axes if name not in "CZ" and size > 1]
    if unknown:
        raise InputError(
            f"{where}: {plane} has several pages ({', '.join(unknown)}); one plane (height, width) "
            "is needed: split the file, or select a page in a column Frame_Orig<CHANNEL>"
        )
    names = _channel_names(tiff, number)
    channel = channel_number(plane, names, sizes["C"], where) if sizes.get("C", 1) > 1 else 0
    # Page numbers in the shape of the axes; indexing selects those of one channel.
    order = np.arange(len(pages)).reshape([size for _, size in axes])
    picked = order[tuple(channel if name == "C" else slice(None) for name, _ in axes)]
    return [pages[index].aspage() for index in picked.ravel()]


def _series(tiff: Any, plane: Plane, where: str) -> tuple[Any, int]:
    number = plane.series or 0
    if plane.series is None and len(tiff.series) > 1:
        raise InputError(
            f"{where}: {plane} has several pages, as {len(tiff.series)} images; one plane (height, "
            "width) is needed: split the file, or select an image in a column Series_Orig<CHANNEL>"
        )
    if number >= len(tiff.series):
        raise InputError(
            f"{where}: {plane} is not in the file, which contains {len(tiff.series)} images"
        )
    return tiff.series[number], number


def _channel_names(tiff: Any, series: int) -> list[str]:
    """Return the channel names of an image in OME metadata; none if a channel has no name."""
    import tifffile

    if not tiff.is_ome:
        return []
    images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
    image = images[series] if isinstance(images, list) else images
    channels = image["Pixels"].get("Channel", [])
    # The XML parser gives a dictionary instead of a list for a single channel.
    channels = channels if isinstance(channels, list) else [channels]
    names = [str(channel.get("Name", "")) for channel in channels]
    return names if all(names) else []


def _check_page(page: Any, plane: Plane, where: str) -> None:
    """Check size, type and completeness of a page by its header."""
    if math.prod(page.shape) != page.imagelength * page.imagewidth * min(page.samplesperpixel, 4):
        raise InputError(
            f"{where}: {plane} has shape {page.shape}; one plane (height, width) is needed"
        )
    require_size(page.shape, plane, where)
    require_size(page.chunks or (1,), plane, where)
    stored_type(page.dtype, plane, where)
    require_complete(page, plane, where)
