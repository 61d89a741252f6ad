"""Checks of a TIFF before its pixels are decoded: metadata, and the tiles or strips of a page.

tifffile bounds the output of most decoders by the size of a tile or strip. JPEG and JPEG 2000 have
their own headers, which are compared with the page here. Metadata can claim any number of planes;
tifffile would allocate a list for them.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np

from data_prep.sources import jpeg2000
from data_prep.sources.lossless import jpeg_frame, require_jpeg_end
from data_prep.sources.plane import Plane, require_size, warn_lossy
from data_prep.sources.remote import redacted
from perturbjax.core.errors import InputError
from perturbjax.dataset import LARGEST_SITE

#: Maximum number of planes in the metadata, and of pages in a file.
MOST_PLANES, MOST_PAGES = 1 << 20, 1 << 16
#: Maximum length of OME-XML. 10,000 planes need about 3 MB.
MOST_XML = 1 << 24
#: Maximum size in bytes of a value in the header, and of the pixels of a plane (float64).
LARGEST_TAG, LARGEST_READ = 1 << 24, 8 * LARGEST_SITE
_PLANE_COUNTS = ("SizeC", "SizeZ", "SizeT")
_PLANE_NUMBERS = ("IFD", "PlaneCount", "NumPlanes", "FirstC", "FirstZ", "FirstT")
#: Values of the tag Compression: codecs with a header of their own, which are lossy (JPEG) or may
#: be (JPEG 2000), and codecs whose output tifffile bounds.
_JPEG, _JPEG2000 = (6, 7), (33003, 33004, 33005, 34712)
_BOUNDED = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 50000)


class LimitedReader(io.RawIOBase):
    """A file with a limit for each read, because a header can claim tables of any size.

    Attributes:
        limit: Maximum number of bytes of a read.
    """

    def __init__(self, stream: io.BufferedIOBase):
        self._stream, self.limit = stream, LARGEST_TAG

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        self._require(size)
        return self._stream.read(size)

    def readinto(self, buffer: Any) -> int:
        self._require(memoryview(buffer).nbytes)
        return self._stream.readinto(buffer)

    def _require(self, size: int) -> None:
        if not 0 <= size <= self.limit:
            raise ValueError(f"a part of {size} bytes, but {self.limit} are allowed")


def require_plausible_metadata(tiff: Any, plane: Plane, where: str) -> None:
    """Refuse metadata with absurd numbers of planes, before tifffile uses them.

    Raises:
        InputError: A number in the OME or ImageJ metadata, or the number of pages, is too large.
    """
    count = 0
    if tiff.is_ome:
        count = _ome_planes(tiff.ome_metadata, plane, where)
    elif tiff.is_imagej:
        metadata = tiff.imagej_metadata or {}
        sizes = [metadata.get(name, 1) for name in ("frames", "slices", "channels", "images")]
        count = max(math.prod(sizes[:3]), sizes[3])
    elif tiff.is_shaped:
        page = tiff.pages[0]
        shapes = [part.get("shape", ()) for part in tiff.shaped_metadata or ()]
        count = max((math.prod(shape) for shape in shapes), default=0) // max(page.size, 1)
    try:
        tiff.pages[MOST_PAGES]
        count = max(count, MOST_PLANES + 1)
    except IndexError:
        pass
    if count > MOST_PLANES:
        raise InputError(
            f"{where}: {redacted(plane.file)} claims more than {MOST_PLANES} planes; it was not "
            "decoded"
        )


def require_complete(page: Any, plane: Plane, where: str) -> None:
    """Check by its header that all tiles or strips of a page exist, and its compression.

    Raises:
        InputError: One is missing or ends outside of the file, or the compression is not supported.
    """
    offsets, counts = np.asarray(page.dataoffsets), np.asarray(page.databytecounts)
    # tifffile reads tiles and strips without data as zeros; here they are an incomplete file.
    expected = math.prod(page.chunked)
    absent = max(expected - offsets.size, 0) + int(np.sum((offsets == 0) | (counts == 0)))
    if absent:
        raise InputError(
            f"{where}: {plane} is incomplete: {absent} of {expected} tiles or strips have no data"
        )
    # The header lists where each strip or tile ends.
    if max(offsets + counts, default=0) > page.parent.filehandle.size:
        raise InputError(f"{where}: {plane} is truncated: it ends before the end of its pixels")
    if page.compression in _JPEG:
        warn_lossy()
    if page.compression not in _JPEG + _JPEG2000 + _BOUNDED:
        raise InputError(
            f"{where}: {plane} has compression {getattr(page.compression, 'name', None)} "
            f"({int(page.compression)}), which is not supported; save it with LZW, Deflate, "
            "Zstandard or without compression"
        )


def require_bounded(page: Any, plane: Plane, where: str) -> None:
    """Check the headers of JPEG and JPEG 2000 tiles or strips, which the decoder would follow.

    Raises:
        InputError: A tile or strip is larger than its page declares, is incomplete or damaged.
    """
    if page.compression in _JPEG + _JPEG2000:
        for content in _segments(page):
            _require_size(content, page, plane, where)


def _ome_planes(text: str, plane: Plane, where: str) -> int:
    """Return the largest number of planes in OME-XML."""
    if len(text) > MOST_XML:
        raise InputError(
            f"{where}: {redacted(plane.file)} has {len(text)} bytes of OME-XML; it was not read"
        )
    largest = 0
    for element in ElementTree.fromstring(text).iter():
        kind = element.tag.rpartition("}")[2]
        if kind == "Pixels":
            size = tuple(int(element.get(name, 1)) for name in ("SizeY", "SizeX"))
            require_size(size, f"OME-XML of {redacted(plane.file)}", where)
            largest = max(largest, math.prod(int(element.get(name, 1)) for name in _PLANE_COUNTS))
        elif kind == "TiffData":
            numbers = (int(element.get(name, 0)) for name in _PLANE_NUMBERS)
            largest = max(largest, *numbers)
    return largest


def _segments(page: Any) -> Iterator[bytes]:
    """Yield the compressed bytes of each tile or strip."""
    file = page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(int(offset))
        yield file.read(int(count))


def _require_size(content: bytes, page: Any, plane: Plane, where: str) -> None:
    """Check the size in a JPEG or JPEG 2000 tile or strip, and that JPEG 2000 is complete."""
    try:
        if page.compression in _JPEG2000:
            codestream = jpeg2000.read_size(content)
            jpeg2000.require_complete(content, codestream)
            size = (codestream.height, codestream.width, codestream.samples)
        else:
            size = jpeg_frame(content)[1:]
            require_jpeg_end(content)
    except (ValueError, struct.error) as error:
        raise InputError(f"{where}: {plane} has a damaged tile or strip ({error})") from error
    # A tile of a page with separate samples has one sample.
    limits = (*page.chunks, 1)[:3]
    if any(actual > limit for actual, limit in zip(size, limits, strict=True)):
        raise InputError(
            f"{where}: {plane} has a tile or strip of {size[:2]} pixels, but its header declares "
            f"{limits[:2]}; it was not decoded"
        )
