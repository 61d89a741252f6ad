"""Cells of a site: list, sample, crop; crop size of a dataset; tiles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.data.cells import (
    CellCounts,
    CellReader,
    CropConfig,
    SiteCells,
    crop_windows,
    list_cells,
    sample_cells,
)
from perturbjax.data.tiles import TileReader, place_tiles
from perturbjax.dataset import SitePixels, open_dataset, write_dataset

SHAPES = [(60, 80), (40, 40), (50, 30)]


def draw_disks(shape, centers, radius=4):
    rows, columns = np.indices(shape)
    mask = np.zeros(shape, np.uint16)
    for number, (row, column) in enumerate(centers, 3):  # labels need not begin at 1
        mask[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return mask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three sites of different size: six cells of which one is at the border, one cell, none."""
    random = np.random.default_rng(0)
    centers = [[(2, 20), (10, 10), (30, 40), (50, 70), (20, 60), (44, 14)], [(20, 20)], []]
    masks = [draw_disks(shape, one) for shape, one in zip(SHAPES, centers, strict=True)]
    images = [random.integers(1, 60_000, (*shape, 2), dtype=np.uint16) for shape in SHAPES]
    table = pd.DataFrame(
        {
            "site_id": [f"P1_A01_{site}" for site in (1, 2, 3)],
            "Metadata_Plate": "P1",
            "Metadata_Well": "A01",
            "Metadata_Site": ["1", "2", "3"],
        }
    )
    path = write_dataset(
        tmp_path_factory.mktemp("cells") / "data",
        table,
        map(SitePixels, images, masks),
        channel_names=["DNA", "ER"],
        image_dtype=np.uint16,
        label_column="",
    )
    return open_dataset(path)


def test_list_cells_measures_each_object():
    mask = draw_disks((30, 40), [(10, 12), (0, 30)], radius=3)
    cells = list_cells(mask)
    assert cells.objects.tolist() == [3, 4]
    np.testing.assert_allclose(cells.centroids[0], (10, 12))
    assert cells.areas.tolist() == [29, 18] and cells.extents.tolist() == [7, 7]
    assert cells.at_border.tolist() == [False, True]
    np.testing.assert_allclose(cells.diameters[0], 6.08, atol=0.01)


def test_reader_crops_pixels_of_the_site_and_counts_dropped_cells(dataset):
    cells = CellReader(dataset, CropConfig(crop_size=16)).read(0)
    image, mask = dataset.pixels(0)
    assert cells.ids[0] == "P1_A01_1_4" and len(cells) == 5
    assert cells.counts == CellCounts(total=6, border=1)
    images, masks = cells.crop()
    assert images.shape == (5, 16, 16, 2) and masks.shape == (5, 16, 16)
    np.testing.assert_array_equal(images[1], image[22:38, 32:48])
    np.testing.assert_array_equal(masks[1], mask[22:38, 32:48])
    np.testing.assert_array_equal(cells.crop(1, 3)[0], images[1:3])


def test_crop_beyond_the_image_is_reflected_with_empty_mask():
    image = np.arange(9 * 9, dtype=np.uint16).reshape(9, 9, 1)
    mask = np.full((9, 9), 7, np.uint16)
    images, masks = crop_windows(image, mask, np.array([[-2, -30]]), 40)
    np.testing.assert_array_equal(images[0, 2:11, 30:39], image)
    np.testing.assert_array_equal(images[0, 1, 30:39], image[1])
    np.testing.assert_array_equal(images[0, 2:11, 29], image[:, 1])
    assert (masks[0] == 7).sum() == 81
    one_pixel, _ = crop_windows(image[:1, :1] + 5, mask[:1, :1], np.array([[-1, -1]]), 4)
    assert (one_pixel == 5).all()


def test_masked_background_keeps_only_the_cell():
    mask = draw_disks((40, 40), [(20, 16), (20, 26)])
    image = np.full((40, 40, 1), 9, np.uint16)
    site = SiteCells(["a", "b"], list_cells(mask), CellCounts(), image, mask, 24)
    keep, neighbors = site.crop()
    masked, single = dataclasses.replace(site, background="mask").crop()
    assert image.all()  # the site itself is not changed
    assert set(np.unique(neighbors[0])) == {0, 3, 4} and (keep == 9).all()
    assert set(np.unique(single[0])) == {0, 3}
    np.testing.assert_array_equal(masked[..., 0] == 9, single > 0)


def test_cells_larger_than_the_crop_are_counted_and_give_their_center(dataset):
    cells = CellReader(dataset, CropConfig(crop_size=8)).read(1)
    assert cells.counts.larger == 1
    np.testing.assert_array_equal(cells.crop()[0][0], dataset.pixels(1)[0][16:24, 16:24])


def test_sites_without_cells_and_with_one_cell(dataset):
    reader = CellReader(dataset)
    # Disks of 49 pixels: 2.5 times 7.9 is 19.7, rounded up to 32.
    assert reader.size == 32
    assert reader.read(1).crop()[0].shape == (1, 32, 32, 2)
    none = reader.read(2)
    assert none.crop()[0].shape == (0, 32, 32, 2) and none.ids == []
    assert none.counts == CellCounts()


def test_sample_depends_on_seed_and_site_only(dataset):
    mask = np.zeros((400, 400), np.uint16)
    mask[2::5, 2::5] = np.arange(1, 6401).reshape(80, 80)
    cells = list_cells(mask)
    one, again, seed, site = (
        sample_cells(cells, 50, *choice).objects.tolist()
        for choice in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert len(one) == len(set(one)) == 50 and one == sorted(one) == again
    assert one != seed and one != site and seed != site
    assert len(sample_cells(cells, 0, 0, "a")) == 6400
    counts = CellReader(dataset, CropConfig(crop_size=16, max_cells=2)).read(0).counts
    assert counts == CellCounts(total=6, border=1, not_sampled=3)


def test_crop_size_of_a_dataset_without_cells_is_refused(dataset, tmp_path):
    empty = write_dataset(
        tmp_path / "data",
        dataset.index[["site_id", "Metadata_Plate", "Metadata_Well"]].iloc[:1],
        [SitePixels(np.ones((8, 8, 1), np.uint16), np.zeros((8, 8), np.uint16))],
        channel_names=["DNA"],
        image_dtype=np.uint16,
        label_column="",
    )
    with pytest.raises(InputError, match=r"none of 1 sites has a cell.*Pass --crop-size"):
        CellReader(open_dataset(empty))


@pytest.mark.parametrize(("shape", "count"), [((512, 672), 12), ((100, 672), 4), ((224, 224), 1)])
def test_tiles_cover_the_site_and_overlap(shape, count):
    corners = place_tiles(*shape, size=224)
    assert len(corners) == count
    covered = np.zeros(shape, int)
    for top, left in corners:
        covered[max(top, 0) : top + 224, max(left, 0) : left + 224] += 1
    assert covered.min() >= 1 and (corners.max(axis=0) + 224 >= shape).all()
    steps = np.diff(np.unique(corners[:, 1]))
    assert (steps <= 168).all()


def test_tile_reader_crops_native_pixels(dataset):
    reader = TileReader(dataset)
    tiles = reader.read(1)
    assert reader.size == 80 and len(tiles) == reader.count(1) == 1
    images, masks = tiles.crop()
    np.testing.assert_array_equal(images[0, 20:60, 20:60], dataset.pixels(1)[0])
    assert (masks[0] > 0).sum() == (dataset.pixels(1)[1] > 0).sum()
    assert TileReader(dataset, 24).count(0) == 3 * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": 4}, "--crop-size 4: must be 0, 8 to 4096 pixels, or a length such as 20um"),
        ({"crop_size": "20 px"}, "--crop-size 20 px: must be 0"),
        ({"max_cells": -1}, "--max-cells -1"),
    ],
)
def test_crop_options_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        CropConfig(**change)


@pytest.mark.parametrize(("size", "pixels"), [("20um", 31), ("20.8 µm", 32), ("16", 16), (16, 16)])
def test_crop_size_in_micrometers(dataset, monkeypatch, size, pixels):
    plates = dataset.index["Metadata_Plate"].unique()
    monkeypatch.setitem(dataset.provenance, "pixel_size_um", dict.fromkeys(plates, 0.65))
    assert CellReader(dataset, CropConfig(crop_size=size)).size == pixels


def test_crop_size_in_micrometers_needs_one_pixel_size(dataset, monkeypatch):
    with pytest.raises(InputError, match=r"--crop-size 20um: the pixel size of .* is unknown"):
        CellReader(dataset, CropConfig(crop_size="20um"))
    sizes = {"P1": 0.65, "P2": 1.3}
    monkeypatch.setattr(type(dataset), "pixel_sizes", sizes)
    with pytest.raises(InputError, match=r"pixels of 0.65 to 1.3 µm, and crops need one"):
        CellReader(dataset, CropConfig(crop_size="20um"))
    monkeypatch.setattr(type(dataset), "pixel_sizes", {"P1": 0.65})
    with pytest.raises(InputError, match=r"--crop-size 2um: must be 8 to 4096 pixels of 0.65 µm"):
        CellReader(dataset, CropConfig(crop_size="2um"))
