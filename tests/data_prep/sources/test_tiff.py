from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.sources import Plane, probe_planes, read_planes
from perturbjax.core.errors import InputError


def spoilt(tmp_path, kind: str) -> Path:
    path = tmp_path / f"{kind}.tiff"
    plane = np.random.default_rng(0).integers(0, 60000, (64, 64), dtype=np.uint16)
    if kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.touch()
    elif kind == "colour":
        tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    elif kind == "float":
        tifffile.imwrite(path, plane.astype(np.float32))
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
        ("truncated", "cut short"),
        ("colour", r"one plane \(height, width\) is needed"),
        ("float", "convert it to integers"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, kind, message, look):
    path = spoilt(tmp_path, kind)
    with pytest.raises(InputError, match=f"load_data.csv, row 9: .*{kind}.tiff.*{message}"):
        look([Plane(str(path))], "load_data.csv, row 9")


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_a_folder_or_a_pipe_is_refused_at_once(tmp_path, look):
    os.mkfifo(tmp_path / "pipe.tiff")
    for path in (tmp_path, tmp_path / "pipe.tiff"):
        with pytest.raises(InputError, match=r"row 9: .*is not a file"):
            look([Plane(str(path))], "row 9")


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_two_pages_written_one_after_the_other_are_refused(tmp_path, look):
    with tifffile.TiffWriter(tmp_path / "two.tiff") as writer:
        for level in (1, 2):
            writer.write(np.full((8, 8), level, np.uint16), contiguous=False, metadata=None)
    with pytest.raises(InputError, match=r"two\.tiff has several pages"):
        look([Plane(str(tmp_path / "two.tiff"))], "row 9")


def claims(path, side: int):
    """A small deflated TIFF whose header claims to be side x side."""
    tifffile.imwrite(
        path, np.zeros((64, 64), np.uint16), compression="zlib", metadata=None, rowsperstrip=64
    )
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(side)
    return path


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_a_header_that_claims_60000_squared_is_refused_before_anything_is_decoded(tmp_path, look):
    path = claims(tmp_path / "huge.tiff", 60_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than any camera's; it was not decoded"):
        look([Plane(str(path))], "row 9")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.fixture
def stack() -> np.ndarray:
    """(channel, z, y, x): nothing in it is the same twice."""
    return np.random.default_rng(1).integers(0, 60_000, (3, 4, 32, 24), dtype=np.uint16)


def one(path: Path, **selection) -> np.ndarray:
    (pixels,) = read_planes([Plane(str(path), **selection)], "row 2").values()
    return pixels


def ome(path: Path, image: np.ndarray, axes: str, names: list[str] | None = None) -> Path:
    metadata = {"axes": axes, **({"Channel": {"Name": names}} if names else {})}
    tifffile.imwrite(path, image, ome=True, metadata=metadata, photometric="minisblack")
    return path


def test_channels_of_an_ome_tiff_are_found_by_their_names(tmp_path, stack):
    path = ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX", ["ER", "DNA", "AGP"])
    planes = [Plane(str(path), channel) for channel in ("DNA", "ER")]
    found = read_planes(planes, "row 2")
    np.testing.assert_array_equal(found[planes[0]], stack[1, 0])
    np.testing.assert_array_equal(found[planes[1]], stack[0, 0])
    assert [probe.shape for probe in probe_planes(planes, "row 2").values()] == [(32, 24)] * 2


def test_a_channel_without_a_name_needs_a_number_and_takes_it(tmp_path, stack):
    path = ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX")
    with pytest.raises(
        InputError, match=r"row 2: .*has no channel DNA; .*without names.*Channel_Orig"
    ):
        one(path, channel="DNA")
    np.testing.assert_array_equal(one(path, channel="2"), stack[2, 0])
    np.testing.assert_array_equal(one(path, frame=1), stack[1, 0])
    with pytest.raises(InputError, match="frame 3 is not in the file, which holds 3 planes"):
        one(path, frame=3)


@pytest.mark.parametrize("axes", ["CZYX", "ZCYX"])
@pytest.mark.parametrize("how", ["max", "mean", "middle", "none"])
def test_a_stack_is_projected_as_it_is_said_and_never_otherwise(tmp_path, stack, axes, how):
    written = stack if axes == "CZYX" else stack.transpose(1, 0, 2, 3)
    path = ome(tmp_path / "site.ome.tiff", written, axes, ["ER", "DNA", "AGP"])
    if how == "none":
        with pytest.raises(
            InputError, match="is a stack of 4 planes; say how they become one with --project"
        ):
            probe_planes([Plane(str(path), "DNA")], "row 2")
        return
    planes = stack[1].astype(float)
    expected = {"max": planes.max(0), "mean": np.rint(planes.mean(0)), "middle": planes[2]}[how]
    found = one(path, channel="DNA", project=how)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, expected)


def test_a_series_is_taken_where_a_row_names_it_and_not_else(tmp_path, stack):
    path = tmp_path / "well.ome.tiff"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for site in range(3):
            writer.write(
                stack[:2, site],
                metadata={"axes": "CYX", "Channel": {"Name": ["ER", "DNA"]}},
                photometric="minisblack",
            )
    np.testing.assert_array_equal(one(path, channel="DNA", series=2), stack[1, 2])
    with pytest.raises(InputError, match=r"as 3 images; .*Series_Orig<CHANNEL>"):
        one(path, channel="DNA")
    with pytest.raises(InputError, match="series 3 is not in the file, which holds 3 images"):
        one(path, channel="DNA", series=3)


def test_a_movie_is_refused_until_a_frame_is_named(tmp_path, stack):
    path = ome(tmp_path / "movie.ome.tiff", stack[0], "TYX")
    with pytest.raises(InputError, match=r"several pages \(4 T\), and nothing says which is meant"):
        one(path, project="max")
    np.testing.assert_array_equal(one(path, frame=3), stack[0, 3])


def test_a_stack_of_imagej_is_known_as_one(tmp_path, stack):
    tifffile.imwrite(tmp_path / "stack.tif", stack[0], imagej=True, metadata={"axes": "ZYX"})
    np.testing.assert_array_equal(
        one(tmp_path / "stack.tif", channel="DNA", project="max"), stack[0].max(0)
    )


def test_pages_that_the_metadata_promise_and_the_file_lacks_are_told(tmp_path, stack):
    path = ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX", ["ER", "DNA", "AGP"])
    path.write_bytes(path.read_bytes().replace(b'SizeC="3"', b'SizeC="5"'))
    with pytest.raises(InputError, match=r"row 2: .*site\.ome\.tiff .*"):
        one(path, channel="DNA")


def test_names_that_are_not_as_many_as_the_channels_contradict_the_pixels(tmp_path, stack):
    path = ome(tmp_path / "site.ome.tiff", stack[:, 0], "CYX", ["ER", "DNA", "AGP"])
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
        InputError, match=r"names 2 channels \(DNA, AGP\) and holds 3; its metadata contradict"
    ):
        one(path, channel="DNA")


def test_a_pyramid_is_one_plane(tmp_path, stack):
    path = tmp_path / "pyramid.tiff"
    with tifffile.TiffWriter(path) as writer:
        writer.write(stack[0, 0], metadata=None)
        writer.write(stack[0, 0, ::2, ::2], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(one(path), stack[0, 0])


@pytest.mark.parametrize("dtype", [">u2", "<u4", "<i2", "|u1"])
def test_other_integers_are_stored_as_sixteen_bits_where_they_fit(tmp_path, dtype):
    image = np.arange(64, dtype=dtype).reshape(8, 8)
    tifffile.imwrite(
        tmp_path / "a.tiff", image, metadata=None, byteorder=">" if dtype == ">u2" else None
    )
    found = one(tmp_path / "a.tiff")
    assert found.dtype == (np.uint8 if dtype == "|u1" else np.uint16) and found.dtype.isnative
    np.testing.assert_array_equal(found, image)
