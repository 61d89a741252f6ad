"""Pixel sizes of a build: from the table or the images, one per plate, scaled by --resize."""

from __future__ import annotations

import pytest
import tifffile
from data_prep_builds import options

from data_prep.build import build
from data_prep.pixel_sizes import COLUMN, plate_pixel_sizes
from data_prep.site_table import read_sites
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset

SHAPE = (64, 64)


@pytest.fixture
def sizes_of(plate, edit):
    """Pixel sizes of the plate with a column of the table."""

    def compute(column=COLUMN, values=lambda table: "0.65", headers=0.0, shape=SHAPE, resize=0):
        edit(lambda table: table.assign(**{column: values(table)}))
        table = read_sites(plate / "load_data.csv", plate)
        return plate_pixel_sizes(table, [shape] * len(table), [headers] * len(table), resize)

    return compute


def test_column_takes_precedence_over_images(sizes_of):
    assert sizes_of(headers=1.3) == {"SIM001": 0.65, "SIM002": 0.65}


def test_jump_columns_are_in_meters(sizes_of):
    sizes_of("Metadata_ImageResolutionY", lambda table: "5.98e-07")
    sizes = sizes_of("Metadata_ImageResolutionX", lambda table: "5.98e-07")
    assert sizes == {"SIM001": 0.598, "SIM002": 0.598}


def test_resize_changes_the_pixel_size(sizes_of, capsys):
    assert sizes_of(resize=32)["SIM001"] == 1.3
    assert sizes_of(shape=(64, 128), resize=32) == {}
    assert "--resize 32 changes the ratio of height and width" in capsys.readouterr().err


def test_plate_with_different_sizes_is_left_out(sizes_of, capsys):
    values = ["0.65", "1.3"]
    sizes = sizes_of(
        values=lambda t: [
            values[(p == "SIM001") * i % 2] for i, p in enumerate(t["Metadata_Plate"])
        ]
    )
    assert sizes == {"SIM002": 0.65}
    error = capsys.readouterr().err
    assert "plate SIM001: its pixel size is left out" in " ".join(error.split())
    assert "0.65 µm, 1.3 µm" in " ".join(error.split())


@pytest.mark.parametrize("text", ["0.65 um", "-1", "0"])
def test_column_without_a_number_is_refused(sizes_of, text):
    with pytest.raises(InputError, match=rf"row 2: {COLUMN} is '{text}'; it must be a number"):
        sizes_of(values=lambda table: text)


def test_build_stores_the_size_of_the_images(plate, tmp_path):
    for path in (plate / "images/SIM001").glob("*.tiff"):
        tags = {"resolution": (2.0, 2.0), "metadata": {"unit": "micron"}}
        tifffile.imwrite(path, tifffile.imread(path), imagej=True, **tags)
    build(options(plate, tmp_path / "data", resize=32))
    dataset = open_dataset(tmp_path / "data")
    assert dataset.pixel_sizes == {"SIM001": 1.0, "SIM002": 0.0}
    position = int((dataset.column("Metadata_Plate") == "SIM001").argmax())
    assert dataset.pixel_size(position) == 1.0
    assert "pixel size: <b>1 µm (unknown for 1 of 2 plates)</b>" in dataset._repr_html_()
    assert "1 µm (unknown for 1 of 2 plates)" in (tmp_path / "data/preview.html").read_text()
    joined = open_dataset([tmp_path / "data"])
    assert joined.pixel_sizes == dataset.pixel_sizes
