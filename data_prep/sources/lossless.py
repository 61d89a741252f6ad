"""Image files other than TIFF that keep pixels as they were: PNG, JPEG 2000, JPEG-LS; JPEG is told apart and refused.

Their codecs are imagecodecs'. Sizes are read from the header before anything is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt

from data_prep.sources.files import read_file, read_start
from data_prep.sources.plane import Found, Plane, as_stored, require_size
from perturbjax.core.errors import InputError

#: Bytes in which every header of these formats lies.
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
    """The one plane of an image file, for each that asks for it.

    Raises:
        InputError: it is not a readable image of its kind, is cut short, holds colours, or its codec is not installed.
    """
    plane = planes[0]
    kind, content = _kind(plane, where), read_file(plane.file, where)
    header = _checked(kind, content, planes, where)
    try:
        import imagecodecs

        image = np.asarray(getattr(imagecodecs, f"{kind.codec}_decode")(content))
    except Exception as error:  # each codec raises its own kinds; a missing one says so
        raise InputError(
            f"{where}: {plane} is not a readable {kind.name}, or is cut short ({error})"
        ) from error
    if image.shape != (header.height, header.width):
        raise InputError(
            f"{where}: {plane} decodes to {image.shape}; its header promises one plane, {header[:2]}"
        )
    stored = as_stored(image, plane, where)
    return [stored] * len(planes)


def probe(planes: Sequence[Plane], where: str) -> list[Found]:
    """Stored type and (height, width) from the header.

    Raises:
        InputError: as `read`, as far as the header tells.
    """
    kind = _kind(planes[0], where)
    header = _checked(kind, read_start(planes[0].file, where, HEADER), planes, where)
    dtype = np.dtype(np.uint8 if header.bits <= 8 else np.uint16)
    return [Found(dtype, (header.height, header.width))] * len(planes)


def _kind(plane: Plane, where: str) -> _Kind:
    suffix = PurePosixPath(plane.file).suffix.lower()
    kind = KINDS[suffix]
    if kind is None:
        raise InputError(
            f"{where}: {plane} is JPEG, which does not keep pixels as they were; use the original images"
        )
    return kind


def _checked(kind: _Kind, content: bytes, planes: Sequence[Plane], where: str) -> _Header:
    plane = planes[0]
    if any(one.series or one.frame for one in planes):
        raise InputError(f"{where}: {plane} is not in the file, which holds one plane")
    try:
        header = kind.header(content)
    except (ValueError, struct.error) as error:
        raise InputError(
            f"{where}: {plane} is not a readable {kind.name}, or is cut short ({error})"
        ) from error
    if header.samples != 1:
        raise InputError(
            f"{where}: {plane} has {header.samples} samples a pixel or a palette; one plane (height, width) is needed"
        )
    if not 8 <= header.bits <= 16:
        raise InputError(
            f"{where}: {plane} holds {header.bits} bits a pixel; convert it to integers of 8 or 16 bits"
        )
    require_size((header.height, header.width), plane, where)
    return header


def _png(content: bytes) -> _Header:
    """The IHDR chunk (PNG specification, 11.2.2), which comes first."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR":
        raise ValueError("it does not begin as one")
    width, height, bits, colour = struct.unpack(">IIBB", content[16:26])
    return _Header(height, width, bits, 1 if colour == 0 else 3)


def _jpeg2000(content: bytes) -> _Header:
    """The SIZ marker of the codestream (ISO/IEC 15444-1, A.5.1), in a JP2 file or by itself."""
    at = content.find(b"\xff\x4f\xff\x51")
    if at < 0:
        raise ValueError("it has no codestream")
    right, lower, left, upper = struct.unpack(">4I", content[at + 8 : at + 24])
    (samples,) = struct.unpack(">H", content[at + 40 : at + 42])
    return _Header(lower - upper, right - left, (content[at + 42] & 0x7F) + 1, samples)


def _jpegls(content: bytes) -> _Header:
    """The SOF55 marker (ITU-T T.87, C.2.2)."""
    if content[:2] != b"\xff\xd8":
        raise ValueError("it does not begin as one")
    at = content.find(b"\xff\xf7")
    if at < 0:
        raise ValueError("it has no frame of JPEG-LS")
    bits, height, width, samples = struct.unpack(">BHHB", content[at + 4 : at + 10])
    return _Header(height, width, bits, samples)


_JPEG2000 = _Kind("JPEG 2000", _jpeg2000, "jpeg2k")
#: End of a name → how it is read; None is refused by name.
KINDS: dict[str, _Kind | None] = {
    ".png": _Kind("PNG", _png, "png"),
    ".jp2": _JPEG2000,
    ".j2k": _JPEG2000,
    ".jls": _Kind("JPEG-LS", _jpegls, "jpegls"),
    ".jpg": None,
    ".jpeg": None,
}
