"""Reader for files of one plane: PNG, JPEG 2000, JPEG-LS, BMP, GIF, NumPy; JPEG with a warning.

imagecodecs decodes the pixels. The size is read from the header first, so that a damaged or hostile
header cannot make the decoder allocate memory without limit.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Real

from data_prep.sources import jpeg2000
from data_prep.sources.files import read_file, read_start
from data_prep.sources.plane import (
    Plane,
    PlaneInfo,
    as_stored,
    require_size,
    select_sample,
    stored_type,
    warn_lossy,
)
from perturbjax.core.errors import InputError

#: Number of bytes at the start of a file that contain the header in all of these formats.
HEADER = 1 << 16
#: Markers that start a frame of JPEG: C0 to CF, without the tables C4, C8 and CC.
_FRAMES = tuple(set(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC})


class _Header(NamedTuple):
    height: int
    width: int
    bits: int
    samples: int
    dtype: np.dtype | None = None
    """Type of the pixels, if the number of bits does not determine it."""


class _Kind(NamedTuple):
    name: str
    header: Callable[[bytes], _Header]
    decode: Callable[[bytes], np.ndarray]
    is_lossy: bool = False


def read(planes: Sequence[Plane], where: str) -> list[Real[np.ndarray, "h w"]]:
    """Read the plane of an image file, once for all requested planes.

    Raises:
        InputError: The file is not a readable image of its format, is truncated, is a color image
            without a selected sample, or its codec is not installed.
    """
    kind, content = _kind(planes[0], where), read_file(planes[0].file, where)
    header = _check(kind, content, planes, where)
    image = _pixels(kind, content, header, planes[0], where)
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
    dtype = header.dtype or np.dtype(np.uint8 if header.bits <= 8 else np.uint16)
    dtype = stored_type(dtype, planes[0], where)
    return [PlaneInfo(dtype, (header.height, header.width))] * len(planes)


def _sample(image: np.ndarray, plane: Plane, where: str) -> np.ndarray:
    return image if image.ndim == 2 else select_sample(image, plane, where)


def _pixels(kind: _Kind, content: bytes, header: _Header, plane: Plane, where: str) -> np.ndarray:
    try:
        image = np.asarray(kind.decode(content))
    except Exception as error:  # each codec raises other types; a missing codec says so
        raise InputError(
            f"{where}: {plane} is not a readable {kind.name}, or is truncated ({error})"
        ) from error
    # The size limit was checked with the header, so the pixels must agree with it.
    if image.shape[:2] != (header.height, header.width) or image.ndim > 2 + (header.samples > 1):
        raise InputError(
            f"{where}: {plane} decodes to {image.shape}, but its header declares {header[:2]}; the "
            "file is damaged"
        )
    return image


def _kind(plane: Plane, where: str) -> _Kind:
    kind = KINDS[PurePosixPath(plane.file).suffix.lower()]
    if kind.is_lossy:
        warn_lossy()
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
    if header.dtype is None and not 8 <= header.bits <= 16:
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
    size = jpeg2000.read_size(content)
    return _Header(size.height, size.width, size.bits, size.samples)


def _jpegls(content: bytes) -> _Header:
    """Parse the SOF55 marker. Source: ITU-T T.87, C.2.2."""
    bits, height, width, samples = jpeg_frame(content, (0xFFF7,))
    return _Header(height, width, bits, samples)


def _jpeg(content: bytes) -> _Header:
    bits, height, width, samples = jpeg_frame(content)
    if samples == 4:
        raise ValueError("CMYK colors")
    return _Header(height, width, bits, samples)


def jpeg_frame(content: bytes, markers: Sequence[int] = _FRAMES) -> tuple[int, int, int, int]:
    """Return bits, height, width and samples of a JPEG. Source: ITU-T T.81, B.2.2.

    Args:
        content: The file, or its first bytes.
        markers: Markers that start a frame.

    Raises:
        ValueError: It has no such marker.
        struct.error: It ends before the marker.
    """
    if content[:2] != b"\xff\xd8":
        raise ValueError("wrong first bytes")
    start = 2
    while True:
        marker, length = struct.unpack(">HH", content[start : start + 4])
        if marker in markers:
            return struct.unpack(">BHHB", content[start + 4 : start + 10])
        if marker < 0xFF01:
            raise ValueError("no start of frame")
        # Bytes 0xFF between segments are padding.
        start += 1 if marker == 0xFFFF else 2 + length


def require_jpeg_end(content: bytes) -> None:
    """Check the marker at the end of a JPEG, without which decoders fill the rest with gray.

    Raises:
        ValueError: It is missing.
    """
    # Some programs append a few bytes.
    if b"\xff\xd9" not in content[-64:]:
        raise ValueError("it has no end")


def _bmp(content: bytes) -> _Header:
    """Parse the BITMAPINFOHEADER. Source: Windows GDI reference."""
    if content[:2] != b"BM":
        raise ValueError("wrong first bytes")
    size, width, height, _, bits, compression = struct.unpack("<IiiHHI", content[14:34])
    # 0 uncompressed, 3 uncompressed with bit masks; others contain JPEG, PNG or run lengths.
    if size < 40 or width <= 0 or compression not in (0, 3):
        raise ValueError("not an uncompressed bitmap")
    # The decoder expands palettes to gray or RGB; only its result shows which.
    samples = _bmp_palette_samples(content, size, bits) if bits <= 8 else 3
    return _Header(abs(height), width, 8, samples)


def _bmp_palette_samples(content: bytes, size: int, bits: int) -> int:
    (used,) = struct.unpack("<I", content[46:50])
    colors = content[14 + size : 14 + size + 4 * min(used or 1 << bits, 256)]
    palette = np.frombuffer(colors[: len(colors) // 4 * 4], np.uint8).reshape(-1, 4)
    return 1 if (palette[:, :3] == palette[:, :1]).all() else 3


def _gif(content: bytes) -> _Header:
    """Parse the blocks of a GIF and refuse several images. Source: GIF89a specification."""
    if content[:6] not in (b"GIF87a", b"GIF89a"):
        raise ValueError("wrong first bytes")
    width, height, flags = struct.unpack("<HHB", content[6:11])
    start, images = 13 + _gif_palette(flags), 0
    # A header contains the first blocks only; the check is repeated with the whole file.
    while start < len(content) and content[start] != 0x3B:  # trailer
        if content[start] == 0x2C:  # image descriptor
            images += 1
            left, top, *size = struct.unpack("<4H", content[start + 1 : start + 9].ljust(8, b"\0"))
            # The decoder allocates memory for this size.
            if left + size[0] > width or top + size[1] > height:
                raise ValueError("an image is larger than the canvas")
            start += 11 + _gif_palette(content[start + 9]) if start + 9 < len(content) else 11
        else:  # extension
            start += 2
        while start < len(content) and content[start]:  # sub-blocks with their lengths
            start += content[start] + 1
        start += 1
    if images > 1:
        raise ValueError(f"it contains {images} images; export one")
    return _Header(height, width, 8, 3)  # the decoder expands the palette


def _gif_palette(flags: int) -> int:
    """Return the size in bytes of a color table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _npy(content: bytes) -> _Header:
    """Parse the header of a NumPy file; arrays of objects are refused, because they need pickle."""
    shape, _, dtype, _ = _npy_header(content)
    if len(shape) not in (2, 3):
        raise ValueError(f"it has shape {shape}; (height, width) is needed")
    return _Header(shape[0], shape[1], 0, shape[2] if len(shape) == 3 else 1, dtype)


def _npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    parsers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in parsers:
        raise ValueError(f"version {version}")
    shape, is_fortran, dtype = parsers[version](stream)
    if dtype.hasobject:
        raise ValueError("it contains Python objects")
    return shape, is_fortran, dtype, stream.tell()


def _decode_npy(content: bytes) -> np.ndarray:
    shape, is_fortran, dtype, start = _npy_header(content)
    pixels = np.frombuffer(content, dtype, count=math.prod(shape), offset=start)
    image = pixels.reshape(shape, order="F" if is_fortran else "C")
    return image[..., 0] if image.ndim == 3 and shape[2] == 1 else image


def _decode_gif(content: bytes) -> np.ndarray:
    image = _decoder("gif")(content)
    # All GIF images have a palette, so a gray one is no exception that must be reported.
    return image[..., 0] if (image == image[..., :1]).all() else image


def _decoder(codec: str) -> Callable[[bytes], np.ndarray]:
    """Return the decoder of imagecodecs; it is imported when it is used."""

    def decode(content: bytes) -> np.ndarray:
        import imagecodecs

        return getattr(imagecodecs, f"{codec}_decode")(content)

    return decode


def _decode_jpeg2000(content: bytes) -> np.ndarray:
    jpeg2000.require_complete(content, jpeg2000.read_size(content))
    return _decoder("jpeg2k")(content)


def _decode_jpeg(content: bytes) -> np.ndarray:
    require_jpeg_end(content)
    return _decoder("jpeg8")(content)


_JPEG2000 = _Kind("JPEG 2000", _jpeg2000, _decode_jpeg2000)
_JPEG = _Kind("JPEG", _jpeg, _decode_jpeg, is_lossy=True)
#: Suffix → reader.
KINDS: dict[str, _Kind] = {
    ".png": _Kind("PNG", _png, _decoder("png")),
    ".jp2": _JPEG2000,
    ".j2k": _JPEG2000,
    ".jls": _Kind("JPEG-LS", _jpegls, _decoder("jpegls")),
    ".bmp": _Kind("BMP", _bmp, _decoder("bmp")),
    ".gif": _Kind("GIF", _gif, _decode_gif),
    ".npy": _Kind("NumPy array", _npy, _decode_npy),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}
