from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pytest
import tifffile

from data_prep.images import (
    aggregate_channels,
    probe_plane,
    read_plane,
    resize_image,
    resize_mask,
    stack_planes,
)
from perturbjax.console import InputError


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65535, (40, 30, 4), dtype=np.uint16, endpoint=True)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("how", ["median", "mean", "max"])
def test_aggregation_is_numpys_rounded_to_the_stored_type(image, how, channels):
    expected = np.rint(getattr(np, how)(image[..., :channels].astype(float), axis=-1))
    result = aggregate_channels(image[..., :channels], how)
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result[..., 0], expected)


def test_no_aggregation_keeps_every_channel(image):
    assert aggregate_channels(image, "none") is image


def test_resizing_keeps_the_mean_and_the_type(image):
    small = resize_image(image, 10)
    assert small.shape == (10, 10, 4) and small.dtype == np.uint16
    np.testing.assert_allclose(small.mean((0, 1)), image.mean((0, 1)), rtol=0.001)


def test_resizing_a_mask_mixes_no_labels():
    mask = np.zeros((20, 20), np.uint16)
    mask[:10], mask[10:, 10:] = 7, 300
    small = resize_mask(mask, 10)
    assert small.dtype == np.uint16 and set(np.unique(small)) == {0, 7, 300}
    np.testing.assert_array_equal(small, mask[1::2, 1::2])


def test_eight_bits_stay_eight_and_mixed_channels_become_sixteen(tmp_path):
    a, b = tmp_path / "a.tiff", tmp_path / "b.tiff"
    tifffile.imwrite(a, np.full((8, 8), 200, np.uint8))
    tifffile.imwrite(b, np.full((8, 8), 4000, np.uint16))
    planes = {path: read_plane(path, "row 2") for path in (a, b)}
    assert stack_planes(planes, [a], "row 2").dtype == np.uint8
    assert stack_planes(planes, [a, b], "row 2").dtype == np.uint16


def spoilt(tmp_path, kind: str):
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


@pytest.mark.parametrize("read", [read_plane, probe_plane])
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
def test_a_bad_file_is_named_with_its_row(tmp_path, kind, message, read):
    path = spoilt(tmp_path, kind)
    with pytest.raises(InputError, match=f"load_data.csv, row 9: .*{kind}.tiff.*{message}"):
        read(path, "load_data.csv, row 9")


@pytest.mark.parametrize("read", [read_plane, probe_plane])
def test_a_folder_or_a_pipe_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.tiff")
    for path in (tmp_path, tmp_path / "pipe.tiff"):
        with pytest.raises(InputError, match=r"row 9: .*is not a file"):
            read(path, "row 9")


@pytest.mark.parametrize("read", [read_plane, probe_plane])
def test_two_pages_written_one_after_the_other_are_refused(tmp_path, read):
    with tifffile.TiffWriter(tmp_path / "two.tiff") as writer:
        for level in (1, 2):
            writer.write(np.full((8, 8), level, np.uint16), contiguous=False, metadata=None)
    with pytest.raises(InputError, match=r"two\.tiff has several pages"):
        read(tmp_path / "two.tiff", "row 9")


def claims(path, side: int):
    """A small deflated TIFF whose header claims to be side x side."""
    tifffile.imwrite(path, np.zeros((64, 64), np.uint16), compression="zlib", metadata=None, rowsperstrip=64)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(side)
    return path


@pytest.mark.parametrize("read", [read_plane, probe_plane])
def test_a_header_that_claims_60000_squared_is_refused_before_anything_is_decoded(tmp_path, read):
    path = claims(tmp_path / "huge.tiff", 60_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than any camera's; it was not decoded"):
        read(path, "row 9")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
