"""Every row of the table of formats in docs/howto/sources.md, with the result that it states."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import microscope_files
import numpy as np
import pytest
import tifffile
import zarr
from image_writers import NAMES, encoded, ome_zarr, plate_store, tiff

from data_prep.site_table import read_sites
from data_prep.sources import Plane, measure_floats, plane, probe_planes, read_planes
from data_prep.sources.floats import choose_scale
from perturbjax.core.errors import InputError

PAGE = Path(__file__).parents[3] / "docs/howto/sources.md"
GRAY = np.random.default_rng(0).integers(1, 250, (24, 32), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(1, 60_000, (24, 32), dtype=np.uint16)
COLOR = np.random.default_rng(2).integers(1, 250, (24, 32, 3), dtype=np.uint8)
#: Pixels of microscope files: (scene, channel, z, height, width).
SCENES = np.random.default_rng(3).integers(1, 60_000, (2, 3, 2, 24, 32), dtype=np.uint16)
#: Planes to read with the expected pixels (works, converted), or with a pattern of the error.
Cases = list[tuple[Plane, Any]]
ROWS: dict[str, Callable[[Path, pytest.MonkeyPatch], Cases]] = {}


def row(name: str) -> Callable:
    """Register the function that writes the images of a row of the table."""

    def register(function: Callable) -> Callable:
        ROWS[name] = function
        return function

    return register


def table_rows() -> dict[str, str]:
    """Return images → result of the table."""
    section = PAGE.read_text().split("## Formats")[1].split("\n## ")[0]
    cells = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return {images.strip(): result.strip() for images, result, *_ in cells[2:]}


@row("TIFF with one plane of 8 or 16 bits")
def _(tmp_path, _):
    return [(Plane(str(tiff(tmp_path / f"{i.dtype}.tif", i))), i) for i in (GRAY, DEEP)]


@row("OME-TIFF with several channels")
def _(tmp_path, _):
    metadata = {"axes": "CYX", "Channel": {"Name": list(NAMES)}}
    path = tiff(tmp_path / "a.ome.tif", SCENES[0, :, 0], ome=True, metadata=metadata)
    return [(Plane(str(path), name), SCENES[0, number, 0]) for number, name in enumerate(NAMES)]


@row("ImageJ TIFF with several channels")
def _(tmp_path, _):
    path = tiff(tmp_path / "a.tif", SCENES[0, :, 0], imagej=True, metadata={"axes": "CYX"})
    return [(Plane(str(path), "2"), SCENES[0, 2, 0])]


@row("OME-Zarr (Zarr v2 and v3), plate or image")
def _(tmp_path, _):
    stores = [ome_zarr(tmp_path / f"{v}.zarr", SCENES[0, :, 0], "cyx", v) for v in (2, 3)]
    return [(Plane(str(store), "AGP"), SCENES[0, 1, 0]) for store in stores]


def plate_plane(tmp_path: Path, images: list[dict[str, Any]]) -> Plane:
    store = plate_store(tmp_path, SCENES[0, :, 0], images, "A/1", "A/2")
    text = "Metadata_Plate,Metadata_Well,Metadata_Site\nP1,A01,1\n"
    (tmp_path / "load_data.csv").write_text(text)
    return read_sites(tmp_path / "load_data.csv", store).sites["file_DNA"].iloc[0]


@row("OME-Zarr plate that lists wells without images")
def _(tmp_path, _):
    return [(plate_plane(tmp_path, [{"path": "0"}]), SCENES[0, 0, 0])]


def acquired_twice(tmp_path: Path) -> Path:
    """Write a plate whose well has two sites in each of the acquisitions 0 and 1."""
    paths = [{"path": str(number), "acquisition": number // 2} for number in range(4)]
    store = plate_store(tmp_path, SCENES[0, :, 0], paths, "A/1")
    for number in range(4):
        array = zarr.open_array(store / "A/1" / str(number) / "0", mode="a")
        array[0] = SCENES[number // 2, number % 2, 0]
    return store


@row("OME-Zarr plate with several acquisitions and `Metadata_Acquisition`")
def _(tmp_path, _):
    store, table = acquired_twice(tmp_path), tmp_path / "load_data.csv"
    cases = []
    for acquisition in range(2):
        header = "Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_Acquisition\n"
        table.write_text(f"{header}P1,A01,1,{acquisition}\nP1,A01,2,{acquisition}\n")
        planes = read_sites(table, store).sites["file_DNA"]
        cases += [(planes[site], SCENES[acquisition, site, 0]) for site in range(2)]
    return cases


@row("OME-Zarr plate with several acquisitions, without that column")
def _(tmp_path, _):
    store, table = acquired_twice(tmp_path), tmp_path / "load_data.csv"
    with pytest.raises(InputError, match="acquisitions 0, 1; to select one, pass --load-data"):
        read_sites(None, store)
    header = "Metadata_Plate,Metadata_Well,Metadata_Site"
    for text, reason in (("P1,A01,1,2", "is 2; write"), ("P1,A01,1,", "is missing; write")):
        table.write_text(f"{header},Metadata_Acquisition\n{text}\n")
        with pytest.raises(InputError, match=f"row 2: plate P1 has acquisitions 0, 1, .*{reason}"):
            read_sites(table, store)
    table.write_text(f"{header}\nP1,A01,1\n")
    with pytest.raises(InputError, match="is missing; write one of them into that column"):
        read_sites(table, store)
    return []


@row("JUMP-Lite Zarr store")
def _(tmp_path, _):
    name, pixels = "source_4__B1__P1__A01__1", np.stack([GRAY + number for number in range(5)])
    zarr.create_array(zarr.storage.LocalStore(tmp_path / "lite.zarr"), name=name, data=pixels)
    return [(Plane(f"{tmp_path}/lite.zarr/{name}", "DNA"), pixels[1])]


@row("PNG, JPEG 2000, JPEG-LS, BMP or GIF with one plane")
def _(tmp_path, _):
    cases = [(Plane(str(encoded(tmp_path / f"a.{s}", GRAY))), GRAY) for s in ("png", "jls", "bmp")]
    lossless = encoded(tmp_path / "a.jp2", DEEP, level=0)
    gif = encoded(tmp_path / "a.gif", GRAY)
    color = encoded(tmp_path / "color.bmp", COLOR)
    return [
        *cases,
        (Plane(str(lossless)), DEEP),
        (Plane(str(gif)), GRAY),
        (Plane(str(color), "G"), COLOR[..., 1]),
    ]


@row("NumPy array (`.npy`)")
def _(tmp_path, _):
    np.save(tmp_path / "a.npy", DEEP)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(DEEP))
    return [(Plane(f"{tmp_path}/{name}.npy"), DEEP) for name in ("a", "fortran")]


def microscope_cases(path: Path, names: tuple[str, ...]) -> Cases:
    """Every channel of two scenes, projected and as a single plane."""
    cases: Cases = []
    for scene, channel in np.ndindex(SCENES.shape[:2]):
        one = Plane(str(path), names[channel], series=scene, project="max")
        cases.append((one, SCENES[scene, channel].max(axis=0)))
        single = Plane(str(path), series=scene, frame=3 + channel)
        cases.append((single, SCENES[scene, channel, 1]))
    return cases


@row("Nikon ND2")
def _(tmp_path, _):
    path = microscope_files.write_nd2(tmp_path / "a.nd2", SCENES, NAMES)
    missing = microscope_files.write_nd2(tmp_path / "missing.nd2", SCENES, NAMES, skip=3)
    with pytest.raises(InputError, match=r"missing.nd2 is not .* \(frame 3 is missing\)"):
        read_planes([Plane(str(missing), "DNA", series=1, project="max")], "row 2")
    return microscope_cases(path, NAMES)


@row("Zeiss CZI")
def _(tmp_path, _):
    path = microscope_files.write_czi(tmp_path / "a.czi", SCENES, NAMES)
    missing = microscope_files.write_czi(tmp_path / "missing.czi", SCENES, NAMES, skip=(1, 0, 1))
    with pytest.raises(InputError, match=r"missing.czi is not .* is missing\)"):
        read_planes([Plane(str(missing), "DNA", series=1, project="max")], "row 2")
    return microscope_cases(path, NAMES)


@row("Leica LIF or LOF")
def _(tmp_path, _):
    path = microscope_files.write_lif(tmp_path / "a.lif", SCENES)
    return microscope_cases(path, ("0", "1", "2"))


@row("color image and `Channel_Orig<CHANNEL>` = R, G or B")
def _(tmp_path, _):
    files = (tiff(tmp_path / "a.tif", COLOR, photometric="rgb"), encoded(tmp_path / "a.png", COLOR))
    return [(Plane(str(f), c), COLOR[..., k]) for f in files for k, c in enumerate("RGB")]


def stack(tmp_path: Path, axes: str) -> Path:
    return tiff(tmp_path / "a.ome.tif", SCENES[0, 0], ome=True, metadata={"axes": axes})


@row("stack of focal planes and `--project`")
def _(tmp_path, _):
    path, pixels = str(stack(tmp_path, "ZYX")), SCENES[0, 0]
    mean = np.rint(pixels.mean(axis=0)).astype(np.uint16)
    return [
        (Plane(path, project="max"), pixels.max(axis=0)),
        (Plane(path, project="mean"), mean),
        (Plane(path, project="middle"), pixels[1]),
    ]


@row("stack of focal planes without `--project`")
def _(tmp_path, _):
    return [(Plane(str(stack(tmp_path, "ZYX"))), "stack of 2 planes; choose a projection")]


@row("movie and `Frame_Orig<CHANNEL>`")
def _(tmp_path, _):
    return [(Plane(str(stack(tmp_path, "TYX")), frame=1), SCENES[0, 0, 1])]


@row("movie without `Frame_Orig<CHANNEL>`")
def _(tmp_path, _):
    store = ome_zarr(tmp_path / "a.zarr", SCENES[0, 0], "tyx")
    return [
        (Plane(str(stack(tmp_path, "TYX"))), "several pages .*Frame_Orig<CHANNEL>"),
        (Plane(str(store)), "is a movie of 2 frames; export one time point"),
    ]


@row("file with several images without `Series_Orig<CHANNEL>`")
def _(tmp_path, _):
    lif = microscope_files.write_lif(tmp_path / "a.lif", SCENES)
    return [(Plane(str(lif), "0"), "contains 2 images .*Series_Orig<CHANNEL>")]


@row("integers of 32 or 64 bits, values up to 65,535")
def _(tmp_path, _):
    return [
        (Plane(str(tiff(tmp_path / f"{dtype}.tif", DEEP.astype(dtype)))), DEEP)
        for dtype in ("uint32", "int64")
    ]


@row("integers above 65,535")
def _(tmp_path, _):
    path = tiff(tmp_path / "a.tif", DEEP.astype(np.uint32) + 65_536)
    return [(Plane(str(path)), "contains uint32 with values from .*convert it")]


@row("int16 with an offset of −32,768 (Olympus ScanR)")
def _(tmp_path, _):
    image = (GRAY.astype(np.int32) - 32768).astype(np.int16)
    return [(Plane(str(tiff(tmp_path / "a.tif", image))), GRAY.astype(np.uint16))]


@row("int16 with other negative values")
def _(tmp_path, _):
    path = tiff(tmp_path / "a.tif", GRAY.astype(np.int16) - 20)
    return [(Plane(str(path)), "contains int16 with values from -")]


@row("TIFF with WhiteIsZero (MinIsWhite)")
def _(tmp_path, _):
    return [(Plane(str(tiff(tmp_path / "a.tif", 255 - GRAY, photometric="miniswhite"))), GRAY)]


@row("RGB or RGBA with pixels in one color only")
def _(tmp_path, _):
    green = np.zeros((*GRAY.shape, 4), np.uint8)
    green[..., 1], green[..., 3] = GRAY, 255
    files = (tiff(tmp_path / "a.tif", green[..., :3], photometric="rgb"),)
    return [(Plane(str(f), "DNA"), GRAY) for f in (*files, encoded(tmp_path / "a.png", green))]


@row("gray saved as RGB or RGBA, or with alpha")
def _(tmp_path, _):
    alpha = np.full_like(GRAY, 255)
    images = {2: [GRAY, alpha], 3: [GRAY] * 3, 4: [GRAY, GRAY, GRAY, alpha]}
    files = [encoded(tmp_path / f"{n}.png", np.dstack(image)) for n, image in images.items()]
    return [(Plane(str(file), "DNA"), GRAY) for file in files]


@row("float16, float32 or float64")
def _(tmp_path, _):
    cases: Cases = []
    for dtype in ("float16", "float32", "float64"):
        image = (DEEP / 100 - 7.5).astype(dtype)
        np.save(tmp_path / f"{dtype}.npy", image)
        files = [tmp_path / f"{dtype}.npy", ome_zarr(tmp_path / f"{dtype}.zarr", image, "yx")]
        files.append(tiff(tmp_path / f"{dtype}.tif", image))
        for one in (Plane(str(file)) for file in files):
            scale = choose_scale(measure_floats([one], "row 2")[one])
            cases.append((Plane(one.file, scale=scale), scale.stored(image)))
            restored = (scale.stored(image).astype(float) - scale.zero) * scale.step
            assert np.abs(restored - image).max() <= scale.step / 2
    print("info: printed by the build, see test_float_images.py", file=sys.stderr)
    return cases


@row("JPEG, also inside TIFF")
def _(tmp_path, _):
    smooth = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8)
    jpeg = encoded(tmp_path / "a.jpg", smooth, level=95)
    inside = tiff(tmp_path / "a.tif", smooth, compression="jpeg", compressionargs={"level": 95})
    expected = [imagecodecs.jpeg8_decode(jpeg.read_bytes()), tifffile.imread(inside)]
    return [(Plane(str(file)), image) for file, image in zip((jpeg, inside), expected, strict=True)]


@row("color image with different pixels in several colors")
def _(tmp_path, _):
    return [
        (Plane(str(file), "DNA"), r"in R, G, B; select one with a column Channel_Orig<CHANNEL>")
        for file in (
            tiff(tmp_path / "a.tif", COLOR, photometric="rgb"),
            encoded(tmp_path / "a.png", COLOR),
            encoded(tmp_path / "a.jpg", COLOR),
        )
    ]


@row("ND2, CZI or LIF without the extra")
def _(tmp_path, monkeypatch):
    for package in ("nd2", "pylibCZIrw", "liffile"):
        monkeypatch.setitem(sys.modules, package, None)
    cases: Cases = []
    for suffix in ("nd2", "czi", "lif"):
        (tmp_path / f"a.{suffix}").write_bytes(bytes(100))
        pattern = r'pip install "perturbjax\[microscopes\]".*OME-Zarr with bioformats2raw'
        cases.append((Plane(str(tmp_path / f"a.{suffix}")), pattern))
    return cases


@row("C01, DIB, VSI, OIR, OIB, IMS, JPEG XL and others")
def _(tmp_path, _):
    suffixes = ("C01", "dib", "vsi", "oir", "oib", "ims", "jxl", "dv", "stk", "webp")
    for suffix in suffixes:
        (tmp_path / f"a.{suffix}").write_bytes(bytes(100))
    return [
        (Plane(f"{tmp_path}/a.{suffix}"), "is .*, which is not supported; .*bioformats2raw")
        for suffix in suffixes
    ]


@row("TIFF with another compression, such as JPEG XL")
def _(tmp_path, _):
    tifffile.imwrite(tmp_path / "a.tif", DEEP, compression="jpegxl", metadata=None)
    return [(Plane(str(tmp_path / "a.tif")), "has compression JPEGXL")]


@row("truncated files, tiles without data, missing Zarr chunks")
def _(tmp_path, _):
    np.save(tmp_path / "a.npy", DEEP)
    files = [
        tiff(tmp_path / "a.tif", DEEP),
        *(
            encoded(tmp_path / f"a.{suffix}", GRAY)
            for suffix in ("png", "jls", "bmp", "gif", "jp2", "jpg")
        ),
        tmp_path / "a.npy",
        microscope_files.write_nd2(tmp_path / "a.nd2", SCENES, NAMES),
        microscope_files.write_lif(tmp_path / "a.lif", SCENES),
        microscope_files.write_czi(tmp_path / "a.czi", SCENES, NAMES),
    ]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    store = ome_zarr(tmp_path / "a.zarr", SCENES[0, :, 0], "cyx")
    next(store.glob("0/c/0/*/*")).unlink()
    planes = [
        Plane(str(file), "0", series=0 if file.suffix[1:] in ("lif", "nd2", "czi") else None)
        for file in files
    ]
    return [(one, "truncated|decodes to|damaged") for one in planes] + [
        (Plane(str(store), "DNA"), "chunk .* is missing")
    ]


def test_table_lists_the_tested_formats():
    assert list(table_rows()) == list(dict.fromkeys(table_rows())) and set(table_rows()) == set(
        ROWS
    )


@pytest.mark.parametrize(("images", "result"), table_rows().items())
def test_format_has_the_documented_result(tmp_path, monkeypatch, capsys, images, result):
    plane.print_once.cache_clear()
    cases = ROWS[images](tmp_path, monkeypatch)
    if result == "error":
        for one, pattern in cases:
            with pytest.raises(InputError, match=f"^row 2: {re.escape(one.file)}.*({pattern})"):
                read_planes([one], "row 2")
        return
    for one, expected in cases:
        pixels, header = read_planes([one], "row 2")[one], probe_planes([one], "row 2")[one]
        assert header.shape == pixels.shape
        assert pixels.dtype == (header.dtype if header.dtype.kind == "u" else np.uint16)
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.dtype == expected.dtype
    printed = capsys.readouterr().err
    assert re.search("info:|warning:", printed) if result == "converted" else not printed
