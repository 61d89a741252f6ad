from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.sources import Plane, probe_planes, read_planes
from perturbjax.core.errors import InputError


def write_invalid(tmp_path, kind: str) -> Path:
    path = tmp_path / f"{kind}.tiff"
    plane = np.random.default_rng(0).integers(0, 60000, (64, 64), dtype=np.uint16)
    if kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.touch()
    elif kind == "color":
        image = np.random.default_rng(0).integers(1, 250, (64, 64, 3), dtype=np.uint8)
        tifffile.imwrite(path, image, photometric="rgb")
    elif kind == "complex":
        tifffile.imwrite(path, plane.astype(np.complex64))
    else:
        tifffile.imwrite(path, plane)
        path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.mark.parametrize("look", [read_planes, probe_planes])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not a readable TIFF"),
        ("empty", "not a readable TIFF"),
        ("truncated", "is truncated"),
        ("color", r"is a color image .*Channel_Orig<CHANNEL> \(R, G or B\)"),
        ("complex", "convert it to integers"),
    ],
)
def test_invalid_file_is_named_with_its_row(tmp_path, kind, message, look):
    path = write_invalid(tmp_path, kind)
    with pytest.raises(InputError, match=f"load_data.csv, row 9: .*{kind}.tiff.*{message}"):
        look([Plane(str(path))], "load_data.csv, row 9")


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_folder_or_pipe_is_refused(tmp_path, look):
    os.mkfifo(tmp_path / "pipe.tiff")
    for path in (tmp_path, tmp_path / "pipe.tiff"):
        with pytest.raises(InputError, match=r"row 9: .*is not a file"):
            look([Plane(str(path))], "row 9")


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_two_unrelated_pages_are_refused(tmp_path, look):
    with tifffile.TiffWriter(tmp_path / "two.tiff") as writer:
        for level in (1, 2):
            writer.write(np.full((8, 8), level, np.uint16), contiguous=False, metadata=None)
    with pytest.raises(InputError, match=r"two\.tiff has several pages"):
        look([Plane(str(tmp_path / "two.tiff"))], "row 9")


def write_huge_header(path, size: int):
    """Write a small deflated TIFF whose header declares size x size pixels."""
    tifffile.imwrite(
        path, np.zeros((64, 64), np.uint16), compression="zlib", metadata=None, rowsperstrip=64
    )
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(size)
    return path


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_huge_header_is_refused_before_decoding(tmp_path, look):
    path = write_huge_header(tmp_path / "huge.tiff", 60_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than any camera image; it was not decoded"):
        look([Plane(str(path))], "row 9")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.fixture
def stack() -> np.ndarray:
    """Random pixels (channel, depth, height, width)."""
    return np.random.default_rng(1).integers(0, 60_000, (3, 4, 32, 24), dtype=np.uint16)


def read_one(path: Path, **selection) -> np.ndarray:
    (pixels,) = read_planes([Plane(str(path), **selection)], "row 2").values()
    return pixels


def write_ome(path: Path, image: np.ndarray, axes: str, names: list[str] | None = None) -> Path:
    metadata = {"axes": axes, **({"Channel": {"Name": names}} if names else {})}
    tifffile.imwrite(path, image, ome=True, metadata=metadata, photometric="minisblack")
    return path


def test_ome_channels_are_identified_by_name(tmp_path, stack):
    path = write_ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX", ["ER", "DNA", "AGP"])
    planes = [Plane(str(path), channel) for channel in ("DNA", "ER")]
    pixels = read_planes(planes, "row 2")
    np.testing.assert_array_equal(pixels[planes[0]], stack[1, 0])
    np.testing.assert_array_equal(pixels[planes[1]], stack[0, 0])
    assert [probe.shape for probe in probe_planes(planes, "row 2").values()] == [(32, 24)] * 2


def test_unnamed_channels_are_selected_by_number(tmp_path, stack):
    path = write_ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX")
    with pytest.raises(
        InputError, match=r"row 2: .*has no channel DNA .*without names.*Channel_Orig"
    ):
        read_one(path, channel="DNA")
    np.testing.assert_array_equal(read_one(path, channel="2"), stack[2, 0])
    np.testing.assert_array_equal(read_one(path, frame=1), stack[1, 0])
    with pytest.raises(InputError, match="frame 3 is not in the file, which contains 3 planes"):
        read_one(path, frame=3)


@pytest.mark.parametrize("axes", ["CZYX", "ZCYX"])
@pytest.mark.parametrize("how", ["max", "mean", "middle", "none"])
def test_stack_is_projected_by_the_chosen_method(tmp_path, stack, axes, how):
    written = stack if axes == "CZYX" else stack.transpose(1, 0, 2, 3)
    path = write_ome(tmp_path / "site.ome.tiff", written, axes, ["ER", "DNA", "AGP"])
    if how == "none":
        with pytest.raises(
            InputError, match="is a stack of 4 planes; choose a projection with --project"
        ):
            probe_planes([Plane(str(path), "DNA")], "row 2")
        return
    planes = stack[1].astype(float)
    expected = {"max": planes.max(0), "mean": np.rint(planes.mean(0)), "middle": planes[2]}[how]
    pixels = read_one(path, channel="DNA", project=how)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels, expected)


def test_series_must_be_selected_by_the_table(tmp_path, stack):
    path = tmp_path / "well.ome.tiff"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for site in range(3):
            writer.write(
                stack[:2, site],
                metadata={"axes": "CYX", "Channel": {"Name": ["ER", "DNA"]}},
                photometric="minisblack",
            )
    np.testing.assert_array_equal(read_one(path, channel="DNA", series=2), stack[1, 2])
    with pytest.raises(InputError, match=r"as 3 images; .*Series_Orig<CHANNEL>"):
        read_one(path, channel="DNA")
    with pytest.raises(InputError, match="series 3 is not in the file, which contains 3 images"):
        read_one(path, channel="DNA", series=3)


def test_movie_requires_a_frame(tmp_path, stack):
    path = write_ome(tmp_path / "movie.ome.tiff", stack[0], "TYX")
    with pytest.raises(InputError, match=r"several pages \(4 T\); one plane"):
        read_one(path, project="max")
    np.testing.assert_array_equal(read_one(path, frame=3), stack[0, 3])


def test_imagej_stack_is_recognized(tmp_path, stack):
    tifffile.imwrite(tmp_path / "stack.tif", stack[0], imagej=True, metadata={"axes": "ZYX"})
    np.testing.assert_array_equal(
        read_one(tmp_path / "stack.tif", channel="DNA", project="max"), stack[0].max(0)
    )


def test_missing_pages_are_reported(tmp_path, stack):
    path = write_ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX", ["ER", "DNA", "AGP"])
    path.write_bytes(path.read_bytes().replace(b'SizeC="3"', b'SizeC="5"'))
    with pytest.raises(InputError, match=r"row 2: .*site\.ome\.tiff .*"):
        read_one(path, channel="DNA")


def test_number_of_channel_names_must_match(tmp_path, stack):
    path = write_ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX", ["ER", "DNA", "AGP"])
    description = tifffile.tiffcomment(path)
    start = description.index("<Channel ")
    end = (
        description.index("</Channel>", start) + len("</Channel>")
        if "</Channel>" in description
        else 0
    )
    end = end or description.index("/>", start) + 2
    tifffile.tiffcomment(path, (description[:start] + description[end:]).encode())
    with pytest.raises(
        InputError, match=r"names 2 channels \(DNA, AGP\) but has 3; its metadata contradict"
    ):
        read_one(path, channel="DNA")


def test_pyramid_is_one_plane(tmp_path, stack):
    path = tmp_path / "pyramid.tiff"
    with tifffile.TiffWriter(path) as writer:
        writer.write(stack[0, 0], metadata=None)
        writer.write(stack[0, 0, ::2, ::2], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_one(path), stack[0, 0])


@pytest.mark.parametrize("dtype", [">u2", "<u4", "<i2", "|u1"])
def test_other_integers_are_stored_as_uint16(tmp_path, dtype):
    image = np.arange(64, dtype=dtype).reshape(8, 8)
    tifffile.imwrite(
        tmp_path / "a.tiff", image, metadata=None, byteorder=">" if dtype == ">u2" else None
    )
    pixels = read_one(tmp_path / "a.tiff")
    assert pixels.dtype == (np.uint8 if dtype == "|u1" else np.uint16) and pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, image)


def test_int16_with_offset_is_converted(tmp_path):
    image = np.random.default_rng(0).integers(100, 4000, (8, 8))
    tifffile.imwrite(tmp_path / "a.tiff", (image - 32768).astype(np.int16), metadata=None)
    np.testing.assert_array_equal(read_one(tmp_path / "a.tiff"), image)


def test_negative_values_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tiff", np.arange(-9, 55, dtype=np.int16).reshape(8, 8))
    with pytest.raises(InputError, match="contains int16 with values from -9 to 54; convert it"):
        read_one(tmp_path / "a.tiff")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_inverted(tmp_path, dtype):
    image = np.arange(64, dtype=dtype).reshape(8, 8)
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, np.iinfo(dtype).max - image, photometric="miniswhite", metadata=None)
    pixels = read_one(path)
    assert pixels.dtype == dtype
    np.testing.assert_array_equal(pixels, image)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rgb_with_one_color_is_read(tmp_path, planar):
    image = np.zeros((3, 8, 8), np.uint8)
    image[1] = np.arange(64).reshape(8, 8)
    pixels = image if planar == "separate" else np.moveaxis(image, 0, -1)
    tifffile.imwrite(tmp_path / "a.tiff", pixels, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read_one(tmp_path / "a.tiff", channel="DNA"), image[1])
    assert not read_one(tmp_path / "a.tiff", channel="R").any()


@pytest.mark.parametrize("look", [read_planes, probe_planes])
@pytest.mark.parametrize("tag", ["TileOffsets", "TileByteCounts"])
def test_absent_tiles_are_an_error(tmp_path, tag, look):
    path = tmp_path / "a.tiff"
    image = np.random.default_rng(0).integers(1, 60_000, (64, 64), dtype=np.uint16)
    tifffile.imwrite(path, image, tile=(32, 32), compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        values = list(tiff.pages[0].tags[tag].value)
        tiff.pages[0].tags[tag].overwrite([*values[:-1], 0])
    with pytest.raises(InputError, match=r"incomplete: 1 of 4 tiles or strips have no data"):
        look([Plane(str(path))], "row 2")


@pytest.mark.parametrize("look", [read_planes, probe_planes])
@pytest.mark.parametrize(("suffix", "name"), [("vsi", "Olympus VSI"), ("C01", "Cellomics")])
def test_foreign_format_is_named_with_the_conversion(tmp_path, suffix, name, look):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(bytes(500))
    with pytest.raises(InputError, match=f"is {name}.*, which is not supported; .*bioformats2raw"):
        look([Plane(str(path))], "row 2")
