"""Image files: half-written ones, and small ones that expand, claim huge sizes or never end."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import imagecodecs
import numcodecs
import numpy as np
import pandas as pd
import tifffile
import zarr

from tests.faults.arena import CommandServer, Request, reset, words
from tests.faults.material import BUILT, Material
from tests.faults.mutations import Mutation
from tests.faults.outcomes import Finding, make_finding

CHANNELS = ("DNA", "Actin")
Write = Callable[[Path, np.ndarray], object]


def _tiff(**options: object) -> Write:
    return lambda path, image: tifffile.imwrite(path, image, metadata=None, **options)


def _encoded(codec: str) -> Write:
    return lambda path, image: path.write_bytes(getattr(imagecodecs, f"{codec}_encode")(image))


def _encoded_bytes(codec: str) -> Write:
    """Encode the upper eight bits of the pixels."""
    encode = _encoded(codec)
    return lambda path, image: encode(path, (image >> 8).astype(np.uint8))


def _zarr2(compressor: object) -> Write:
    def write(path: Path, image: np.ndarray) -> None:
        zarr.create_array(
            path.parent, name=path.name, data=image, chunks=(24, 24), compressors=compressor,
            zarr_format=2, config={"write_empty_chunks": True},
        )  # fmt: skip

    return write


def _zarr3(path: Path, image: np.ndarray) -> None:
    zarr.create_array(
        path.parent, name=path.name, data=image, chunks=(24, 24), shards=image.shape,
        config={"write_empty_chunks": True},
    )  # fmt: skip


class Format(NamedTuple):
    """Folder and suffix of the files of a format, and the function that writes one."""

    folder: str
    suffix: str
    write: Write


#: Formats whose readers detect erased parts.
FORMATS: dict[str, Format] = {
    "TIFF, Deflate": Format("images", ".tif", _tiff(compression="zlib", tile=(32, 32))),
    "TIFF, LZW": Format("images", ".tif", _tiff(compression="lzw", rowsperstrip=8)),
    "TIFF, Zstandard": Format("images", ".tif", _tiff(compression="zstd")),
    "TIFF, JPEG 2000": Format("images", ".tif", _tiff(compression="jpeg2000", tile=(48, 48))),
    "PNG": Format("images", ".png", _encoded("png")),
    "JPEG 2000": Format("images", ".jp2", _encoded("jpeg2k")),
    "JPEG-LS": Format("images", ".jls", _encoded("jpegls")),
    "JPEG": Format("images", ".jpg", _encoded_bytes("jpeg8")),
    "Zarr 2, Blosc": Format("a.zarr", "", _zarr2(numcodecs.Blosc())),
    "Zarr 2, Zlib": Format("a.zarr", "", _zarr2(numcodecs.Zlib())),
    "Zarr 3, shards": Format("a.zarr", "", _zarr3),
}


def write_plate(material: Material, name: str) -> Path:
    """Write the first sites of the plate in a format, once; returns the folder."""
    folder, suffix, write = FORMATS[name]
    out = material.root / f"images {name}"
    if out.exists():
        return out
    table = pd.read_csv(material.plates / "load_data.csv", dtype=str).iloc[:3]
    (out / folder).mkdir(parents=True)
    for row in table.index:
        for channel in CHANNELS:
            file, path = f"FileName_Orig{channel}", f"PathName_Orig{channel}"
            image = tifffile.imread(material.plates / table.loc[row, path] / table.loc[row, file])
            table.loc[row, [file, path]] = [f"{row}_{channel}{suffix}", folder]
            write(out / folder / table.loc[row, file], image)
    names = [column for column in table if "Orig" in column and not column.endswith(CHANNELS)]
    table.drop(columns=names).to_csv(out / "load_data.csv", index=False)
    return out


def build_flags(folder: Path, out: Path) -> list[str]:
    """Return the command that builds a plate of `write_plate`."""
    command = f"data_prep build --load-data {{}} --images {{}} --out {{}} {BUILT}"
    return words(f"{command} --label-column none", folder / "load_data.csv", folder, out)


def zero_second_half(data: bytes, random: Random) -> bytes | None:
    half = len(data) // 2
    return data[:half] + bytes(len(data) - half) if half else None


def cut_second_half(data: bytes, random: Random) -> bytes | None:
    return data[: len(data) // 2] or None


#: What an interrupted copy leaves.
HALF_WRITTEN: dict[str, Mutation] = {
    "second half zero": zero_second_half,
    "second half missing": cut_second_half,
}


@functools.cache
def _zeros() -> bytes:
    return bytes(400 << 20)


def _chunk(codec: str, encode: Callable[[], bytes]) -> Callable[[Path], object]:
    """Replace an array by one with a chunk of 48 x 48 pixels that expands."""

    def spoil(folder: Path) -> None:
        array = next(folder.glob("a.zarr/*_DNA"))
        _write_array(array, {"compressor": {"id": codec}})
        (array / "0.0").write_bytes(encode())

    return spoil


def _write_array(array: Path, changes: dict[str, object]) -> None:
    metadata = {"zarr_format": 2, "shape": [48, 48], "chunks": [48, 48], "dtype": "<u2"}
    metadata |= {"fill_value": 0, "order": "C", "filters": None, "compressor": None}
    shutil.rmtree(array)
    array.mkdir()
    (array / ".zarray").write_text(json.dumps(metadata | changes))
    (array / "0.0").write_bytes(bytes(2 * 48 * 48))


def _array(**changes: object) -> Callable[[Path], object]:
    return lambda folder: _write_array(next(folder.glob("a.zarr/*_DNA")), changes)


def _file(name: str, write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Replace a file of a Zarr array or an image."""

    def spoil(folder: Path) -> None:
        array = next(folder.glob("a.zarr/*_DNA"))
        _write_array(array, {})
        (array / name).unlink()
        write(array / name)

    return spoil


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(60 << 30)


def _first(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = next((folder / "images").glob("0_DNA*"))
        path.unlink()
        write(path)

    return spoil


def _codestream_of(size: int) -> bytes:
    """Return JPEG 2000 whose codestream is larger than its image header box declares."""
    content = imagecodecs.jpeg2k_encode(np.ones((48, 48), np.uint8))
    start = content.index(b"\xff\x4f\xff\x51") + 8
    return content[:start] + struct.pack(">8I", *[size, size, 0, 0] * 2) + content[start + 32 :]


def _large_tile(path: Path) -> None:
    image = np.ones((48, 48), np.uint8)
    tifffile.imwrite(path, image, tile=(48, 48), compression="jpeg2000", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].tags[325].valueoffset
    content, tile = bytearray(path.read_bytes()[:offset]), _codestream_of(24_000)
    struct.pack_into("<I", content, count, len(tile))
    path.write_bytes(content + tile)


def _ome(**sizes: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        image = np.ones((3, 48, 48), np.uint16)
        tifffile.imwrite(path, image, metadata={"axes": "ZYX"}, ome=True)
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            text = tiff.ome_metadata
            for name, size in sizes.items():
                start = text.index(f'{name}="') + len(name) + 2
                text = text[:start] + str(size) + text[text.index('"', start) :]
            tiff.pages[0].tags["ImageDescription"].overwrite(text)

    return write


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _zero_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


#: Case → format of the plate, and change of one of its images.
HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{
        f"chunk that expands, {codec}": ("Zarr 2, Zlib", _chunk(codec, encode))
        for codec, encode in {
            "zlib": lambda: zlib.compress(_zeros()),
            "gzip": lambda: gzip.compress(_zeros()),
            "bz2": lambda: bz2.compress(_zeros()[: 1 << 26]),
            "lzma": lambda: lzma.compress(_zeros(), preset=0),
            "zstd": lambda: imagecodecs.zstd_encode(_zeros()),
            "blosc": lambda: numcodecs.Blosc().encode(_zeros()),
            "lz4": lambda: numcodecs.LZ4().encode(_zeros()),
            "imagecodecs_brotli": lambda: imagecodecs.brotli_encode(_zeros(), level=1),
            "imagecodecs_deflate": lambda: imagecodecs.deflate_encode(_zeros()),
            "imagecodecs_jpeg2k": lambda: imagecodecs.jpeg2k_encode(
                np.zeros((4096, 4096), np.uint16)
            ),
        }.items()
    },
    **{
        f"{name} is {kind}": ("Zarr 2, Zlib", _file(name, write))
        for name in (".zarray", "0.0")
        for kind, write in {"a pipe": _fifo, "/dev/zero": _zero_device, "60 GB": _sparse}.items()
    },
    "array without pixels": ("Zarr 2, Zlib", _array(shape=[0, 48])),
    "array of 2^40 pixels": ("Zarr 2, Zlib", _array(shape=[1 << 20, 1 << 20])),
    "16 million chunks": ("Zarr 2, Zlib", _array(shape=[4096, 4096], chunks=[1, 1])),
    "shape of another type": ("Zarr 2, Zlib", _array(shape={"a": 1})),
    "codestream of 24,000 x 24,000": (
        "JPEG 2000",
        _first(lambda path: path.write_bytes(_codestream_of(24_000))),
    ),
    "tile of 24,000 x 24,000": ("TIFF, JPEG 2000", _first(_large_tile)),
    "OME-XML of 2^31 planes": ("TIFF, LZW", _first(_ome(SizeZ=1 << 31))),
    "OME-XML of 2^31 columns": ("TIFF, LZW", _first(_ome(SizeX=1 << 31))),
    "OME-XML with plane 2^31": ("TIFF, LZW", _first(_ome(IFD=1 << 31))),
    "image is /dev/zero": ("PNG", _first(_zero_device)),
    "image is a pipe": ("JPEG 2000", _first(_fifo)),
    "image of 60 GB": ("TIFF, LZW", _first(_sparse)),
}
#: Case → name of the plate and content of its illumination functions.
FUNCTIONS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "function of 60 GB": ("P", _sparse),
    "function is a pipe": ("P", _fifo),
    "function is /dev/zero": ("P", _zero_device),
    "plate name of 300 letters": ("P" * 300, lambda path: None),
}


def hostile_images(server: CommandServer, material: Material, root: Path) -> Iterator[Finding]:
    """Build plates with one hostile image each; the command must refuse it."""
    for case, (name, spoil) in HOSTILE.items():
        folder = Path(shutil.copytree(write_plate(material, name), reset(root) / "plate"))
        spoil(folder)
        result = server.run(Request(build_flags(folder, root / "OUT"), root / "work"))
        finding = make_finding("hostile image", case, result)
        yield finding.require(result.status != 0, "wrong result")
    for case, (plate, write) in FUNCTIONS.items():
        folder = Path(shutil.copytree(write_plate(material, "PNG"), reset(root) / "plate"))
        table = pd.read_csv(folder / "load_data.csv", dtype=str).assign(Metadata_Plate=plate)
        table.to_csv(folder / "load_data.csv", index=False)
        (folder / "illum").mkdir()
        if len(plate) < 100:
            for channel in CHANNELS:
                write(folder / "illum" / f"{plate}_Illum{channel}.npy")
        flags = [*build_flags(folder, root / "OUT"), "--illumination", str(folder / "illum")]
        result = server.run(Request(flags, root / "work"))
        finding = make_finding("hostile image", case, result)
        yield finding.require(result.status != 0, "wrong result")
