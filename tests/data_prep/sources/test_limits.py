"""Images that claim, or expand to, more than their size are refused before they are decoded."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numcodecs
import numpy as np
import PIL.Image
import pytest
import tifffile
import zarr

from data_prep.sources import Plane, probe_planes, read_planes
from data_prep.sources.zarr_files import LARGEST_METADATA
from perturbjax.core.errors import InputError

IMAGE = np.random.default_rng(0).integers(100, 60_000, (64, 64), dtype=np.uint16)
#: A chunk of 8 kB that expands to this many bytes.
EXPANDED = 1 << 25
ZEROS = bytes(EXPANDED)
BOMBS = {
    "zlib": lambda: zlib.compress(ZEROS),
    "gzip": lambda: gzip.compress(ZEROS),
    "bz2": lambda: bz2.compress(ZEROS),
    "lzma": lambda: lzma.compress(ZEROS, preset=0),
    "zstd": lambda: imagecodecs.zstd_encode(ZEROS),
    "blosc": lambda: numcodecs.Blosc().encode(ZEROS),
    "lz4": lambda: numcodecs.LZ4().encode(ZEROS),
    "imagecodecs_brotli": lambda: imagecodecs.brotli_encode(ZEROS, level=1),
    "imagecodecs_deflate": lambda: imagecodecs.deflate_encode(ZEROS),
    "imagecodecs_lzma": lambda: imagecodecs.lzma_encode(ZEROS, level=0),
    "imagecodecs_jpeg2k": lambda: imagecodecs.jpeg2k_encode(np.zeros((2048, 2048), np.uint16)),
    "imagecodecs_jpegxl": lambda: imagecodecs.jpegxl_encode(
        np.zeros((2048, 2048), np.uint16), effort=1
    ),
    "imagecodecs_png": lambda: imagecodecs.png_encode(np.zeros((2048, 2048), np.uint16)),
}


def read_one(file: Path) -> np.ndarray:
    (pixels,) = read_planes([Plane(str(file), "0")], "row 2").values()
    return pixels


def v2_array(folder: Path, compressor: dict | None, chunk: bytes, **changes: object) -> Path:
    """Write a Zarr v2 array of one chunk of 64 x 64 pixels."""
    array = folder / "a.zarr/image"
    array.mkdir(parents=True)
    metadata = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "<u2"}
    metadata |= {"fill_value": 0, "order": "C", "filters": None, "compressor": compressor}
    (array / ".zarray").write_text(json.dumps(metadata | changes))
    (array / "0.0").write_bytes(chunk)
    return array


@pytest.mark.parametrize("codec", BOMBS)
def test_chunk_cannot_expand(tmp_path, codec):
    array = v2_array(tmp_path, {"id": codec}, BOMBS[codec]())
    read_one_failing(array)
    tracemalloc.start()
    read_one_failing(array)
    # The limit is the size of the chunk: 8 kB.
    assert tracemalloc.get_traced_memory()[1] < EXPANDED / 8
    tracemalloc.stop()


def read_one_failing(file: Path, match: str = "row 2: .* cannot be read: .*") -> None:
    with pytest.raises(InputError, match=match):
        read_one(file)


def test_chunk_of_a_zarr_v3_array_cannot_expand(tmp_path):
    for codec in (zarr.codecs.GzipCodec(), zarr.codecs.ZstdCodec(), zarr.codecs.BloscCodec()):
        name = type(codec).__name__
        big = zarr.create_array(
            tmp_path / "b.zarr", name=name, data=np.zeros((4096, 4096), np.uint16),
            chunks=(4096, 4096), compressors=codec, config={"write_empty_chunks": True},
        )  # fmt: skip
        small = zarr.create_array(
            tmp_path / "a.zarr", name=name, data=IMAGE, chunks=(64, 64), compressors=codec
        )
        np.testing.assert_array_equal(read_one(tmp_path / "a.zarr" / name), IMAGE)
        (tmp_path / "a.zarr" / name / "c/0/0").write_bytes(
            (tmp_path / "b.zarr" / name / "c/0/0").read_bytes()
        )
        assert big.dtype == small.dtype
        read_one_failing(tmp_path / "a.zarr" / name)


def test_shard_without_a_chunk_is_incomplete(tmp_path):
    data = IMAGE.copy()
    data[32:, 32:] = 0
    zarr.create_array(
        tmp_path / "a.zarr", name="image", data=data, chunks=(32, 32), shards=(64, 64)
    )
    # zarr-python leaves out chunks of zeros; a writer that stopped half-way leaves the same gap.
    read_one_failing(tmp_path / "a.zarr/image", r"chunk \(1, 1\) is missing; the store is incompl")
    zarr.create_array(
        tmp_path / "a.zarr", name="whole", data=data, chunks=(32, 32), shards=(64, 64),
        config={"write_empty_chunks": True},
    )  # fmt: skip
    np.testing.assert_array_equal(read_one(tmp_path / "a.zarr/whole"), data)
    shard = tmp_path / "a.zarr/whole/c/0/0"
    shard.write_bytes(shard.read_bytes()[:3000])
    read_one_failing(tmp_path / "a.zarr/whole")


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
@pytest.mark.parametrize("name", [".zarray", "0.0"])
def test_only_regular_files_of_a_store_are_read(tmp_path, name, kind):
    array = v2_array(tmp_path, None, IMAGE.tobytes())
    (array / name).unlink()
    if kind == "pipe":
        os.mkfifo(array / name)
    elif kind == "device":
        (array / name).symlink_to("/dev/zero")
    else:
        with open(array / name, "wb") as file:
            file.truncate(60 << 30)
    read_one_failing(array, "not a regular file" if kind != "large" else "bytes, but .* allowed")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [0, 64]},
        {"chunks": [1, 1], "shape": [4096, 4096]},
        {"chunks": [0, 64]},
        {"shape": "wide"},
        {"dtype": 3},
        {"shape": [1 << 40, 64]},
        {"filters": [{"id": "delta", "dtype": "<f8", "astype": "i1"}] * 9},
    ],
)
def test_absurd_array_metadata_are_one_line(tmp_path, changes):
    read_one_failing(v2_array(tmp_path, None, IMAGE.tobytes(), **changes), "row 2: ")


@pytest.mark.parametrize("value", [None, 3, "text", [], [[]], {"multiscales": 1}])
@pytest.mark.parametrize("name", ["multiscales", "omero", "ome"])
def test_attributes_of_the_wrong_type_are_one_line(tmp_path, name, value):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=IMAGE)
    group.attrs["multiscales"] = [{"datasets": [{"path": "0"}], "axes": ["y", "x"]}]
    if name == "omero" and isinstance(value, dict):
        value = {"channels": 1}
    group.attrs[name] = value
    read_one_failing(tmp_path / "a.zarr", "row 2: ")


def test_metadata_of_a_store_are_limited(tmp_path):
    array = v2_array(tmp_path, None, IMAGE.tobytes())
    (array / ".zattrs").write_text("[" * (LARGEST_METADATA + 1))
    read_one_failing(array, "bytes, but .* allowed")


def jp2(image: np.ndarray = IMAGE, **options: object) -> bytes:
    return imagecodecs.jpeg2k_encode(image, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"level": 30}, {"resolutions": 3}, {"codecformat": "j2k"}],
    ids=str,
)
def test_complete_jpeg_2000_is_read(tmp_path, options):
    content = jp2(**options)
    (tmp_path / "a.jp2").write_bytes(content)
    np.testing.assert_array_equal(read_one(tmp_path / "a.jp2"), imagecodecs.jpeg2k_decode(content))
    (tmp_path / "b.jp2").write_bytes(jp2(np.zeros((64, 64), np.uint16), **options))
    assert not read_one(tmp_path / "b.jp2").any()


def test_jpeg_2000_with_tiles_and_layers_is_read(tmp_path):
    options = {"tile_size": (32, 32), "quality_layers": [40, 10, 0], "num_resolutions": 3}
    image = (IMAGE >> 8).astype(np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "a.jp2", **options)
    np.testing.assert_array_equal(read_one(tmp_path / "a.jp2"), image)
    content = (tmp_path / "a.jp2").read_bytes()
    last = content.rindex(b"\xff\x90\x00\x0a")
    # The same file without its last tile.
    (tmp_path / "b.jp2").write_bytes(content[:last] + b"\xff\xd9")
    read_one_failing(tmp_path / "b.jp2", "1 of 4 tiles lack data")


def _declare(content: bytes, size: int) -> bytes:
    """Change the size in the codestream."""
    start = content.index(b"\xff\x4f\xff\x51") + 8
    large = struct.pack(">8I", size, size, 0, 0, size, size, 0, 0)
    return content[:start] + large + content[start + 32 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[: len(content) // 2] + bytes(len(content) // 2),
        lambda content: content[:1000] + bytes(500) + content[1500:],
        lambda content: content[:-2],
        lambda content: _declare(content, 24_000),
        # A small codestream in a box before the large one that is decoded.
        lambda content: (
            content[:12]
            + struct.pack(">I4s", 8 + len(content), b"uuid")
            + content
            + _declare(content, 24_000)[12:]
        ),
    ],
    ids=["half", "second half zero", "range zero", "no end", "larger", "decoy"],
)
def test_damaged_jpeg_2000_is_refused(tmp_path, damage):
    (tmp_path / "a.jp2").write_bytes(damage(jp2()))
    read_one_failing(tmp_path / "a.jp2", r"row 2: .*a\.jp2 is not a readable JPEG 2000")


@pytest.mark.parametrize("zeros", [0, 500])
def test_half_of_a_jpeg_is_refused(tmp_path, zeros):
    content = imagecodecs.jpeg8_encode((IMAGE >> 8).astype(np.uint8))
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2] + bytes(zeros))
    read_one_failing(tmp_path / "a.jpg", "is not a readable JPEG, or is truncated .it has no end")


def test_image_of_a_gif_that_exceeds_its_canvas_is_refused(tmp_path):
    content = bytearray(imagecodecs.gif_encode((IMAGE >> 8).astype(np.uint8)))
    start = content.index(b",\0\0\0\0" + struct.pack("<HH", 64, 64))
    content[start + 5 : start + 9] = struct.pack("<HH", 65535, 65535)
    (tmp_path / "a.gif").write_bytes(content)
    read_one_failing(tmp_path / "a.gif", "an image is larger than the canvas")


@pytest.mark.parametrize("damage", ["size", "zero"])
@pytest.mark.parametrize("compression", ["jpeg2000", "jpeg"])
def test_tile_with_another_size_is_refused(tmp_path, compression, damage):
    image = (IMAGE >> 8).astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", image, tile=(64, 64), compression=compression, metadata=None
    )
    assert read_one(tmp_path / "a.tif").shape == (64, 64)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    tile = bytes(content[offset : offset + count])
    if damage == "zero":
        tile = tile[: count // 8] + bytes(count - count // 8)
    elif compression == "jpeg2000":
        tile = _declare(tile, 24_000)
    else:
        start = tile.index(b"\xff\xc0") + 5
        tile = tile[:start] + struct.pack(">HH", 60_000, 60_000) + tile[start + 4 :]
    content[offset : offset + count] = tile
    (tmp_path / "a.tif").write_bytes(content)
    read_one_failing(tmp_path / "a.tif", "row 2: .*damaged tile or strip|was not decoded")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('SizeZ="3"', 'SizeZ="3000000000"'),
        ('SizeC="1"', 'SizeC="99999999"'),
        ('PlaneCount="3"', 'PlaneCount="1999999999"'),
        ('IFD="0"', 'IFD="1999999999"'),
        ('SizeX="64"', 'SizeX="1999999999"'),
    ],
)
def test_ome_metadata_of_absurd_size_are_refused(tmp_path, old, new):
    tifffile.imwrite(
        tmp_path / "a.ome.tif", np.stack([IMAGE] * 3), metadata={"axes": "ZYX"}, ome=True
    )
    with tifffile.TiffFile(tmp_path / "a.ome.tif", mode="r+b") as tiff:
        text = tiff.ome_metadata
        assert old in text
        tiff.pages[0].tags["ImageDescription"].overwrite(text.replace(old, new))
    with pytest.raises(InputError, match=r"row 2: .* claims .*; it was not decoded"):
        probe_planes([Plane(str(tmp_path / "a.ome.tif"), project="max")], "row 2")


def test_unknown_tiff_compression_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, compression="jpegxl", metadata=None)
    read_one_failing(tmp_path / "a.tif", r"has compression JPEGXL.* is not supported")


def test_table_of_strips_in_a_sparse_file_is_limited(tmp_path):
    tags = [(256, 64), (257, 64), (258, 16), (259, 1), (262, 1), (277, 1), (278, 1)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries[5:5] = [struct.pack("<HHII", 273, 4, 50_000_000, 4096)]
    entries.append(struct.pack("<HHII", 279, 4, 50_000_000, 4096))
    with open(tmp_path / "a.tif", "wb") as file:
        file.write(struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries))
        file.truncate(1 << 30)
    read_one_failing(tmp_path / "a.tif", "a part of 200000000 bytes, but 16777216 are allowed|tag")


def test_tiff_with_fewer_strips_than_rows_is_incomplete(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, rowsperstrip=16, metadata=None)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    for tag in (273, 279):  # offsets and byte counts of the strips: half of them
        start = content.index(struct.pack("<HHI", tag, 4 if tag == 273 else 3, 4)) + 4
        content[start : start + 4] = struct.pack("<I", 2)
    (tmp_path / "a.tif").write_bytes(content)
    read_one_failing(tmp_path / "a.tif", "of 4 tiles or strips have no data")
