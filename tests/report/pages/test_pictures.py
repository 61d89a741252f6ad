"""Pictures of cells: contrast, colors, outlines, windows and atlases."""

from __future__ import annotations

import base64

import imagecodecs
import numpy as np
from tiny_dataset import write_dataset

from perturbjax.dataset import open_dataset
from perturbjax.report.pages import cell_images as pictures


def test_composite_maps_low_to_black_and_high_to_full_color():
    image = np.array([[[100.0], [600], [1100], [5000]]])
    shown = pictures.composite(image, np.array([100.0]), np.array([1100.0]))
    assert shown[0, :, 0].tolist() == [0, 128, 255, 255] and (shown[..., 0] == shown[..., 2]).all()


def test_composite_blends_channel_colors():
    bright = np.eye(3)[None] * 1000.0
    both = np.array([[[1000.0, 1000, 0]]])
    low, high = np.zeros(3), np.full(3, 1000.0)
    shown = pictures.composite(bright, low, high)[0]
    assert len({tuple(colour) for colour in shown}) == 3
    assert (pictures.composite(both, low, high)[0, 0] >= shown[:2].max(axis=0)).all()


def test_outlines_follow_cell_edges():
    mask = np.zeros((9, 9), np.uint16)
    mask[2:7, 2:7] = 3
    drawn = pictures.draw_outlines(np.zeros((9, 9, 3), np.uint8), mask)[..., 0] > 0
    assert drawn.sum() == 16 and drawn[2, 2:7].all() and not drawn[4, 4]


def test_window_has_the_largest_cell_area():
    image, mask = np.zeros((500, 700, 1), np.uint16), np.zeros((500, 700), np.uint16)
    mask[400:450, 600:650] = 1
    image[420, 620] = 7
    part = pictures.find_window(mask, 100)
    cut, cells = image[part], mask[part]
    assert cut.shape == (100, 100, 1) and (cells > 0).sum() == 2500 and cut.max() == 7


def test_downsampling_averages_blocks():
    image = np.array([[[2], [4], [9]], [[6], [8], [9]]], np.uint16)
    assert pictures.downsample_pixels(image, 2)[..., 0].tolist() == [[5, 9]]


def test_picture_is_small_and_encoded_in_its_address(tmp_path):
    dataset = open_dataset(
        write_dataset(tmp_path / "data", sites=6, size=300, channels=["DNA", "ER"])
    )
    renderer = pictures.make_renderer(dataset)
    picture = renderer.picture(1)
    assert max(picture.shape) <= pictures.SIDE and picture.std() > 1
    kind, text = pictures.address(picture).split(",")
    assert kind == "data:image/webp;base64"
    assert imagecodecs.webp_decode(base64.b64decode(text)).shape == picture.shape
    assert (
        "DNA (blue)" in renderer.legend().replace("</span>", "")
        and "5th percentile" in renderer.legend()
    )


def test_fewer_large_sites_are_decoded(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "data", sites=2, size=64, channels=["DNA"]))
    renderer = pictures.make_renderer(dataset)
    assert renderer.affordable(1000) == 1000
    dataset.index["height"] = dataset.index["width"] = 5000
    assert 40 < renderer.affordable(1000) < 100


def test_atlas_places_pictures_on_a_grid():
    sheet = pictures.atlas([np.full((4, 3, 3), at, np.uint8) for at in (1, 2, 3)], 4, 2)
    assert sheet.shape == (8, 8, 3)
    assert (
        sheet[0, 0, 0] == 1 and sheet[0, 4, 0] == 2 and sheet[4, 0, 0] == 3 and sheet[0, 3, 0] == 0
    )
