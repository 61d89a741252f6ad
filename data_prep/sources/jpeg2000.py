"""Structure of JPEG 2000 files: check it before decoding.

OpenJPEG decodes incomplete codestreams without an error, and fills the rest of the image with
zeros. It allocates memory for the size in the codestream, which can differ from the size in the
header of the file. Therefore the markers are checked first: the image size, the end of the
codestream, and the presence of every tile. Entropy-coded data have no checksum: changed bytes
within them remain undetected.

Source: ISO/IEC 15444-1, annexes A (codestream) and I (JP2 boxes).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_SOC_SIZ, _SOT, _EOC, _COD = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\xd9", b"\xff\x52"
_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
#: Maximum number of tiles of a small image, and minimum number of pixels of a tile in a larger one.
#: OpenJPEG allocates several kilobytes for each tile.
_MOST_TILES, _SMALLEST_TILE = 1024, 64 * 64
#: Zero bytes that can follow each other by chance, in addition to one for each empty packet.
_ZEROS = 64


class Codestream(NamedTuple):
    """Image size in a codestream, and the position of its markers in the file."""

    height: int
    width: int
    bits: int
    samples: int
    tile: tuple[int, int]
    """(height, width) of a tile, at most that of the image."""
    tiles: int
    start: int
    end: int


def read_size(content: bytes) -> Codestream:
    """Parse the SIZ marker of a JP2 file or a codestream; its first 64 kB suffice.

    Raises:
        ValueError: It is not a JPEG 2000 file, or its header contradicts its codestream.
    """
    start, end, header = 0, len(content), None
    if content.startswith(_JP2):
        start, end, header = _jp2_codestream(content)
    if content[start : start + 4] != _SOC_SIZ:
        raise ValueError("no codestream")
    fields = struct.unpack(">8IH", content[start + 8 : start + 42])
    right, lower, left, upper, tile_width, tile_height, tile_left, tile_upper, samples = fields
    height, width = lower - upper, right - left
    if min(height, width, tile_height, tile_width, samples) < 1:
        raise ValueError("the codestream declares an empty image")
    if header is not None and header != (height, width, samples):
        raise ValueError(
            f"the file declares {header[:2]} pixels, its codestream {(height, width)} pixels"
        )
    tiles = -(-(right - tile_left) // tile_width) * -(-(lower - tile_upper) // tile_height)
    if not 1 <= tiles <= _MOST_TILES + height * width // _SMALLEST_TILE:
        raise ValueError(f"the codestream declares {tiles} tiles")
    bits = (content[start + 42] & 0x7F) + 1
    tile = (min(tile_height, height), min(tile_width, width))
    return Codestream(height, width, bits, samples, tile, tiles, start, end)


def require_complete(content: bytes, codestream: Codestream) -> None:
    """Check that a codestream has all of its tiles and its end, and no erased range.

    Args:
        content: The whole file.
        codestream: Result of `read_size`.

    Raises:
        ValueError: It is incomplete.
    """
    position, packets = _main_header(content, codestream)
    if packets > codestream.end - codestream.start:
        raise ValueError(f"the codestream is too short for {packets} packets")
    present = set()
    while content[position : position + 2] == _SOT:
        (tile, length) = struct.unpack(">HI", content[position + 4 : position + 10])
        present.add(tile)
        # Length 0: the tile part extends to the end of the codestream.
        position = position + length if length else codestream.end - 2
        if length in range(1, 14) or position + 2 > codestream.end:
            raise ValueError("the codestream is truncated")
    if content[position : position + 2] != _EOC:
        raise ValueError("the codestream has no end")
    if present != set(range(codestream.tiles)):
        raise ValueError(f"{codestream.tiles - len(present)} of {codestream.tiles} tiles lack data")
    # An empty packet is one zero byte. Longer runs of zeros are a part that was not written.
    if content.find(bytes(packets + _ZEROS), codestream.start, codestream.end) >= 0:
        raise ValueError("a range of the codestream is zero")


def _jp2_codestream(content: bytes) -> tuple[int, int, tuple[int, int, int]]:
    """Return start and end of the first codestream, and the size in the image header box."""
    header = None
    position = len(_JP2)
    while position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        start = position + 8
        if length == 1:
            (length,) = struct.unpack(">Q", content[start : start + 8])
            start += 8
        # Length 0: the box extends to the end of the file.
        end = position + length if length else len(content)
        if kind == b"jp2c":
            if header is None:
                raise ValueError("no image header before the codestream")
            return start, end, header
        # The image header is the first box within the superbox jp2h.
        if kind == b"jp2h" and content[start + 4 : start + 8] == b"ihdr":
            header = struct.unpack(">IIH", content[start + 8 : start + 18])
        if end < start:
            break
        position = end
    raise ValueError("no codestream")


def _main_header(content: bytes, codestream: Codestream) -> tuple[int, int]:
    """Return the position of the first tile part, and the number of packets of a tile."""
    position, packets = codestream.start + 2, None
    while (marker := content[position : position + 2]) != _SOT:
        (length,) = struct.unpack(">H", content[position + 2 : position + 4])
        if marker[:1] != b"\xff" or length < 2:
            raise ValueError("the main header is damaged")
        if marker == _COD:
            packets = _packets(content[position + 4 : position + 2 + length], codestream)
        position += 2 + length
    if packets is None:
        raise ValueError("the main header lacks the coding style")
    return position, packets


def _packets(style: bytes, codestream: Codestream) -> int:
    """Return the number of packets of a tile: precincts of all resolutions, layers and samples."""
    (layers,), levels = struct.unpack(">H", style[2:4]), style[5]
    if levels > 32 or not layers:
        raise ValueError("the coding style is damaged")
    # Without explicit sizes, a precinct has 2^15 x 2^15 pixels.
    sizes = style[10 : 11 + levels] if style[0] & 1 else b"\xff" * (levels + 1)
    if len(sizes) <= levels:
        raise ValueError("the coding style is damaged")
    precincts = 0
    for level, size in enumerate(sizes):
        scale = levels - level
        precincts += -(-codestream.tile[0] >> (scale + (size >> 4))) * -(
            -codestream.tile[1] >> (scale + (size & 15))
        )
    return precincts * layers * codestream.samples
