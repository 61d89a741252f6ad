"""Reader for other lossless image files: PNG, JPEG 2000 and JPEG-LS. JPEG is refused by name.

imagecodecs decodes the pixels. The size is read from the header first, so that a damaged or hostile
header cannot make the decoder allocate memory without limit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt

from data_prep.sources.files import read_file, read_start
from data_prep.sources.plane import Plane, PlaneInfo, as_stored, require_size, select_sample
from perturbjax.core.errors import InputError

#: Number of bytes at the start of a file that contain the header in all of these formats.
HEADER = 1 << 16


class _Header(NamedTuple):
    height: int
    width: int
    bits: int
    samples: int


class _Kind(NamedTuple):
    name: str
    header: Callable[[bytes], _Header]
    codec: str


def read(planes: Sequence[Plane], where: str) -> list[UInt[np.ndarray, "h w"]]:
    """Read the plane of an image file, once for all requested planes.

    Raises:
        InputError: The file is not a readable image of its format, is truncated, is a color image
            without a selected sample, or its codec is not installed.
    """
    kind, content = _kind(planes[0], where), read_file(planes[0].file, where)
    header = _check(kind, content, planes, where)
    image = _decode(kind, content, header, planes[0], where)
    return [as_stored(_sample(image, plane, where), plane, where) for plane in planes]


def probe(planes: Sequence[Plane], where: str) -> list[PlaneInfo]:
    """Read data type and (height, width) from the header. Color images are decoded.

    Raises:
        InputError: As `read`, as far as the header shows it.
    """
    kind = _kind(planes[0], where)
    header = _check(kind, read_start(planes[0].file, where, HEADER), planes, where)
    if header.samples > 1:  # only pixels show whether a sample must be selected
        read(planes, where)
    dtype = np.dtype(np.uint8 if header.bits <= 8 else np.uint16)
    return [PlaneInfo(dtype, (header.height, header.width))] * len(planes)


def _sample(image: np.ndarray, plane: Plane, where: str) -> np.ndarray:
    return image if image.ndim == 2 else select_sample(image, plane, where)


def _decode(kind: _Kind, content: bytes, header: _Header, plane: Plane, where: str) -> np.ndarray:
    try:
        import imagecodecs

        image = np.asarray(getattr(imagecodecs, f"{kind.codec}_decode")(content))
    except Exception as error:  # each codec raises other types; a missing codec says so
        raise InputError(
            f"{where}: {plane} is not a readable {kind.name}, or is truncated ({error})"
        ) from error
    # The size limit was checked with the header, so the pixels must agree with it.
    if image.shape[:2] != (header.height, header.width) or image.ndim != 2 + (header.samples > 1):
        raise InputError(
            f"{where}: {plane} decodes to {image.shape}, but its header declares {header[:2]}; the "
            "file is damaged"
        )
    return image


def _kind(plane: Plane, where: str) -> _Kind:
    kind = KINDS[PurePosixPath(plane.file).suffix.lower()]
    if kind is None:
        raise InputError(
            f"{where}: {plane} is JPEG, a lossy format that changes pixels; use the original images"
        )
    return kind


def _check(kind: _Kind, content: bytes, planes: Sequence[Plane], where: str) -> _Header:
    plane = planes[0]
    if any(one.series or one.frame for one in planes):
        raise InputError(f"{where}: {plane} is not in the file, which contains one plane")
    try:
        header = kind.header(content)
    except (ValueError, struct.error) as error:
        raise InputError(
            f"{where}: {plane} is not a readable {kind.name}, or is truncated ({error})"
        ) from error
    if not 1 <= header.samples <= 4:
        raise InputError(
            f"{where}: {plane} has {header.samples} samples per pixel; one plane (height, width) "
            "is needed"
        )
    if not 8 <= header.bits <= 16:
        raise InputError(
            f"{where}: {plane} has {header.bits} bits per pixel; convert it to integers of 8 or 16 "
            "bits"
        )
    require_size((header.height, header.width, header.samples), plane, where)
    return header


def _png(content: bytes) -> _Header:
    """Parse the IHDR chunk, which is always first. Source: PNG specification, 11.2.2."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR":
        raise ValueError("wrong first bytes")
    width, height, bits, color = struct.unpack(">IIBB", content[16:26])
    if color == 3:  # a palette is expanded to RGB, or RGBA if it has transparent colors
        return _Header(height, width, 8, 4 if b"tRNS" in content[:HEADER] else 3)
    return _Header(height, width, bits, {0: 1, 2: 3, 4: 2, 6: 4}.get(color, 0))


def _jpeg2000(content: bytes) -> _Header:
    """Parse the SIZ marker of a JP2 file or a codestream. Source: ISO/IEC 15444-1, A.5.1."""
    start = content.find(b"\xff\x4f\xff\x51")
    if start < 0:
        raise ValueError("no codestream")
    # Bytes after the marker: length and capabilities, then the corners of the image area.
    right, lower, left, upper = struct.unpack(">4I", content[start + 8 : start + 24])
    (samples,) = struct.unpack(">H", content[start + 40 : start + 42])
    return _Header(lower - upper, right - left, (content[start + 42] & 0x7F) + 1, samples)


def _jpegls(content: bytes) -> _Header:
    """Parse the SOF55 marker. Source: ITU-T T.87, C.2.2."""
    if content[:2] != b"\xff\xd8":
        raise ValueError("wrong first bytes")
    start = content.find(b"\xff\xf7")
    if start < 0:
        raise ValueError("no JPEG-LS frame")
    # Two bytes of marker and two of length come first.
    bits, height, width, samples = struct.unpack(">BHHB", content[start + 4 : start + 10])
    return _Header(height, width, bits, samples)


_JPEG2000 = _Kind("JPEG 2000", _jpeg2000, "jpeg2k")
#: Suffix → reader; None marks formats that are refused by name.
KINDS: dict[str, _Kind | None] = {
    ".png": _Kind("PNG", _png, "png"),
    ".jp2": _JPEG2000,
    ".j2k": _JPEG2000,
    ".jls": _Kind("JPEG-LS", _jpegls, "jpegls"),
    ".jpg": None,
    ".jpeg": None,
}
