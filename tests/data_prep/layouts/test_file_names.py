"""Patterns of file names."""

from __future__ import annotations

import pytest

from data_prep.layouts import recognize
from data_prep.layouts.file_names import compile_pattern, match_path
from perturbjax.core.errors import InputError


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{plate}_{well}_s{site}_w{channel}.tif", "x/P_1_a1_s02_w3.TIF", ("P_1", "A01", "2", "3")),
        ("{plate}/{well}_{channel}.tif", "x/P1/r01c02_DNA.tif", ("P1", "A02", "1", "DNA")),
        ("{plate}_{well}_{channel}.tif", "a_1_B - 2_x_y.tif", ("a_1", "B02", "1", "x_y")),
        ("{plate}/{plate}_{well}.tif", "P1/P1_A01.tif", ("P1", "A01", "1", "1")),
        ("{row}-{column}-{site}*.tif", "B-12-3-abc.tif", ("", "B12", "3", "1")),
        ("{row}/{well}.tif", "B/B03.tif", ("", "B03", "1", "1")),
        ("{row}{column}f{site}.tif", "0203f1.tif", ("", "B03", "1", "1")),
        (
            "Well {well}/{channel} - n{site}.tif",
            "Well B02/DAPI - n000001.tif",
            ("", "B02", "1", "DAPI"),
        ),
    ],
)
def test_patterns_read_fields(pattern, path, expected):
    image = match_path(compile_pattern(pattern), path)
    assert image is not None
    assert (image.plate, image.well, image.site, image.channel) == expected


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("{plate}_{well}.tif", "P_Z1x.tif"),
        ("{plate}/{plate}_{well}.tif", "P1/P2_A01.tif"),
        ("a.{well}.tif", "ab.A01.tif"),  # a point is no wildcard
        ("sub/{well}.tif", "A01.tif"),
    ],
)
def test_patterns_refuse_other_paths(pattern, path):
    assert match_path(compile_pattern(pattern), path) is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{plate}_{position}.tif", r"\{position\} is not a field; use \{plate\}"),
        ("{plate}_{site}.tif", r"has no well; add \{well\}"),
        ("{row}_{site}.tif", r"has no well"),
    ],
)
def test_patterns_without_a_well_are_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        compile_pattern(pattern)


def test_plates_without_a_name_are_named_by_their_folders(folder):
    root = folder(["P1/A01.tif", "P2/A01.tif"])
    found = recognize(root, pattern="{well}.tif")
    assert [image.plate for image in found.images] == ["P1", "P2"]


def test_unknown_names_are_refused_with_examples(folder):
    with pytest.raises(InputError, match=r"follow no layout of phenix, .*example picture1\.tif"):
        recognize(folder(["picture1.tif"]))


def test_folders_without_images_are_refused(folder):
    with pytest.raises(InputError, match="has no image among 2 files"):
        recognize(folder(["notes.txt", "a.pdf"]))


def test_links_are_followed_once_and_stores_are_skipped(folder):
    root = folder(["P1/A01.tif", "P2.zarr/A02.tif", ".hidden/A03.tif", "P1/._A04.tif"])
    (root / "P1/loop").symlink_to(root)
    (root / "P3").symlink_to(root / "P1")
    assert [image.path for image in recognize(root, pattern="{well}.tif").images] == ["P1/A01.tif"]


def test_zarr_stores_need_no_table(tmp_path):
    (tmp_path / "plate.zarr").mkdir()
    with pytest.raises(InputError, match="is a Zarr store, which lists its sites"):
        recognize(tmp_path / "plate.zarr")


def test_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"--images .*none: no such folder"):
        recognize(tmp_path / "none")
