"""Scale bars: length, drawing, and pictures of a dataset with a pixel size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_dataset import write_dataset

from perturbjax.dataset import open_dataset
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.scale_bar import bar_length, draw_scale_bar


@pytest.mark.parametrize(
    ("width", "length"), [(0, 0), (100, 20), (66, 10), (700, 200), (1.0, 0.2), (34, 10)]
)
def test_bar_length_is_a_round_number_up_to_a_third(width, length):
    assert bar_length(width) == pytest.approx(length)


def test_bar_has_its_length_in_pixels():
    drawn = draw_scale_bar(np.full((96, 128, 3), 100, np.uint8), 25.2)
    rows, columns = np.nonzero((drawn == 255).all(axis=-1))
    assert np.ptp(columns) + 1 == 25 and np.ptp(rows) + 1 == 2 and columns.max() < 128
    small = np.zeros((8, 8, 3), np.uint8)
    assert draw_scale_bar(small, 100) is small and draw_scale_bar(small, 0.4) is small


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Dataset of 30 sites on plates P0 and P1; only P0 has a pixel size."""
    path = write_dataset(
        tmp_path_factory.mktemp("data") / "data", sites=30, size=300, channels=["DNA", "ER"]
    )
    opened = open_dataset(path)
    opened.provenance["pixel_size_um"] = {"P0": 0.5}
    return opened


def test_downsampled_picture_and_enlarged_picture_have_the_same_scale(dataset):
    renderer = pictures.make_renderer(dataset)
    # 300 pixels of 0.5 µm are 150 µm wide.
    assert renderer.bar == 20
    plain = dataclasses.replace(renderer, bar=0.0)
    difference = (renderer.picture(1) != plain.picture(1)).any(axis=-1)
    # Downsampled by 3: 20 µm are 13.3 pixels; the frame adds one on each side.
    assert np.ptp(np.nonzero(difference)[1]) + 1 == 15
    images = renderer.shot_images(1)
    # Downsampled by 2 to 150 pixels of 1 µm.
    assert images.bar == pytest.approx(20 / 150) and images.bar_text == "20 µm"
    assert 'data-bar="0.1333" data-bar-text="20 µm"' in pictures.shot(images, "A01", "cells")


def test_sites_of_unknown_pixel_size_have_no_bar(dataset):
    renderer = pictures.make_renderer(dataset)
    plain = dataclasses.replace(renderer, bar=0.0)
    np.testing.assert_array_equal(renderer.picture(29), plain.picture(29))
    assert "data-bar" not in pictures.shot(renderer.shot_images(29), "A01", "cells")
    assert "White bars are 20 µm long; the pixel size of pictures without one" in renderer.legend()
    assert "White bars" not in plain.legend()
