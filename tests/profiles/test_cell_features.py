"""Features of cells and tiles: rows, summaries, formats, and unusual sites."""

from __future__ import annotations

import json
import sys

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pycytominer
import pytest
from published import write_resnet18

from perturbjax.core.config import InputConfig
from perturbjax.core.errors import InputError
from perturbjax.data.batches import Sites
from perturbjax.data.cells import CellReader, CropConfig
from perturbjax.data.tiles import TileReader
from perturbjax.dataset import SitePixels, open_dataset, write_dataset
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.profiles.extractors import Extractor
from perturbjax.profiles.feature_cache import choose_unit
from perturbjax.profiles.image_inputs import AdaptConfig
from perturbjax.profiles.part_features import summarize, summary_names
from perturbjax.profiles.profile_options import SourceConfig
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.window_features import compute_parts, divide_sites
from perturbjax.training.devices import ComputeConfig, open_devices

pytestmark = pytest.mark.full

SHAPES = [(60, 80), (40, 40), (50, 30), (60, 80)]
#: Row and column of the centers of the cells of each site. The first cell touches the border.
CENTERS = [
    [(2, 20), (10, 10), (30, 40), (50, 70), (20, 60), (44, 14)],
    [(20, 20)],
    [],
    [(12, 40), (40, 30), (30, 62)],
]


def write_sites(path, masks, seed=0):
    """Write sites of noise with the given masks: two sites per well."""
    random = np.random.default_rng(seed)
    images = [random.integers(1, 60_000, (*mask.shape, 2), dtype=np.uint16) for mask in masks]
    wells = [f"A{number // 2 + 1:02d}" for number in range(len(masks))]
    sites = [str(number % 2 + 1) for number in range(len(masks))]
    names = [f"P1_{well}_{site}" for well, site in zip(wells, sites, strict=True)]
    table = pd.DataFrame(
        {
            "site_id": names,
            "Metadata_Plate": "P1",
            "Metadata_Well": wells,
            "Metadata_Site": sites,
            "Metadata_pert_iname": ["DMSO", "taxol"] * (len(masks) // 2)
            + ["DMSO"] * (len(masks) % 2),
        }
    )
    return write_dataset(
        path,
        table,
        map(SitePixels, images, masks),
        channel_names=["DNA", "ER"],
        image_dtype=np.uint16,
        label_column="",
    )


def draw_disks(shape, centers, radius=4):
    rows, columns = np.indices(shape)
    mask = np.zeros(shape, np.uint16)
    for number, (row, column) in enumerate(centers, 1):
        mask[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return mask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    masks = [draw_disks(shape, one) for shape, one in zip(SHAPES, CENTERS, strict=True)]
    return write_sites(tmp_path_factory.mktemp("cells") / "data", masks)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.safetensors"))


@pytest.fixture(scope="module")
def cells(data, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "cells.parquet"
    return extract(config(data, weights, out, level="cell"))


def config(data, weights, out, **changes) -> FeaturesConfig:
    settings = {"backbone": "resnet18", "weights": weights, "batch_size": 4, "pool": "stages"}
    return FeaturesConfig(data=(data,), out=out, **{**settings, **changes})


def feature_values(path) -> np.ndarray:
    table = pd.read_parquet(path)
    return table[[name for name in table if not name.startswith("Metadata_")]].to_numpy()


def pixel_means(dataset, reader, config) -> list:
    """Features of each part by a network that averages the stored pixels of a window."""
    zeros, number = np.zeros((len(dataset), 2), np.float32), np.zeros(len(dataset), np.int32)
    sites = Sites((), number, zeros, zeros, number)
    extractor = Extractor(
        dataset,
        sites,
        InputConfig(mask_encoding="binary"),
        lambda batch: np.asarray(batch.image, np.float32).mean((1, 2)),
        reader.size**2,
        ["mean"],
        {},
    )
    parts = divide_sites(dataset, reader, 4)
    placement = open_devices(ComputeConfig(), local=True)
    return list(compute_parts(config, placement, extractor, reader, parts, 0))


def test_rows_are_cells_with_id_coordinates_and_metadata_of_their_site(data, cells):
    table = pd.read_parquet(cells)
    assert list(table["Metadata_cell_id"]) == [
        *(f"P1_A01_1_{number}" for number in (2, 3, 4, 5, 6)),
        "P1_A01_2_1",
        *(f"P1_A02_2_{number}" for number in (1, 2, 3)),
    ]
    assert list(table["Metadata_Well"]) == ["A01"] * 6 + ["A02"] * 3
    first = table.iloc[0]
    assert (first["Metadata_Center_X"], first["Metadata_Center_Y"]) == (10, 10)
    assert first["Metadata_ObjectNumber"] == 2 and first["Metadata_Area"] == 49
    features = [name for name in table if not name.startswith("Metadata_")]
    assert features[0] == "Cells_resnet18_DNA_0001" and len(features) == 2 * 3 * (64 + 128 + 256)
    facts = json.loads(pq.read_schema(cells).metadata[b"perturbjax"])
    assert facts["unit"] == "cell" and facts["window_size"] == 32


def test_features_of_cells_are_those_of_a_dataset_of_their_crops(data, weights, cells, tmp_path):
    """A dataset of the crops, at the intensity range of their site, gives the same features."""
    dataset = open_dataset(data)
    images, masks = CellReader(dataset).read(3).crop()
    masks *= masks == np.array([1, 2, 3])[:, None, None]
    crops = write_dataset(
        tmp_path / "data",
        dataset.index[["site_id", "Metadata_Plate", "Metadata_Well"]].iloc[:3],
        [
            # The range of the first crop is replaced by that of the site, see below.
            SitePixels(image, mask, statistics=site_range(dataset, 3))
            for image, mask in zip(images, masks, strict=True)
        ],
        channel_names=["DNA", "ER"],
        image_dtype=np.uint16,
        label_column="",
    )
    out = extract(config(crops, weights, tmp_path / "f.parquet", adapt=AdaptConfig(size=0)))
    expected = feature_values(out)
    np.testing.assert_allclose(feature_values(cells)[6:], expected, rtol=1e-3, atol=1e-4)


def site_range(dataset, position) -> np.ndarray:
    names = [[f"{name}_{channel}" for name in ("mean", "std", "p01", "p50", "p99")]
             for channel in dataset.channel_names]  # fmt: skip
    return np.array([dataset.index.loc[position, one].to_numpy(float) for one in names])


def test_pycytominer_and_anndata_read_cells(data, weights, cells, tmp_path):
    table = pd.read_parquet(cells)
    wells = pycytominer.aggregate(
        table, strata=["Metadata_Plate", "Metadata_Well"], features="infer", operation="mean"
    )
    features = [name for name in table if not name.startswith("Metadata_")]
    expected = table.groupby("Metadata_Well")[features].mean()
    np.testing.assert_allclose(wells[features], expected, rtol=1e-4, atol=1e-5)
    stored = anndata.read_h5ad(
        extract(config(data, weights, tmp_path / "cells.h5ad", level="cell"))
    )
    np.testing.assert_array_equal(stored.X, table[features])
    assert list(stored.obs_names) == list(table["Metadata_cell_id"])
    np.testing.assert_array_equal(
        stored.obsm["spatial"], table[["Metadata_Center_X", "Metadata_Center_Y"]]
    )


@pytest.mark.filterwarnings("ignore")  # of spatialdata
def test_spatialdata_has_images_labels_and_table(data, weights, cells, tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    out = extract(config(data, weights, tmp_path / "cells.zarr", level="cell"))
    store, dataset = spatialdata.read_zarr(out), open_dataset(data)
    table, (image, mask) = store["cells"], dataset.pixels(3)
    np.testing.assert_array_equal(store["P1_A02_2_image"].to_numpy(), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(store["P1_A02_2_labels"].to_numpy(), mask)
    assert list(table.obs_names) == list(pd.read_parquet(cells)["Metadata_cell_id"])
    own = table.obs[table.obs["region"] == "P1_A02_2_labels"]
    assert set(own["instance_id"]) == set(np.unique(mask)) - {0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.zarr"]


def test_missing_spatialdata_names_the_extra(data, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match=r"pip install 'perturbjax\[spatialdata\]'"):
        extract(config(data, weights, tmp_path / "cells.zarr", level="cell"))
    assert list(tmp_path.iterdir()) == []


def test_sites_are_means_of_their_cells(data, weights, cells, tmp_path, capsys):
    out = tmp_path / "sites.parquet"
    extract(config(data, weights, out, unit="cell", aggregate="mean"))
    sites, by_cell = feature_values(out), feature_values(cells)
    np.testing.assert_allclose(sites[0], by_cell[:5].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sites[1], by_cell[5], rtol=1e-4, atol=1e-5)
    assert np.isnan(sites[2]).all() and not np.isnan(sites[3]).any()
    message = " ".join(capsys.readouterr().err.split())
    assert "9 of 10 cells are used; dropped: 1 at the border of a site, 0 by --max-cells" in message
    assert "Extracting features: 4/4 sites in" in message
    # A site without cells is left out of the mean of its well.
    wells = extract(config(data, weights, tmp_path / "w.parquet", unit="cell", level="well"))
    np.testing.assert_allclose(feature_values(wells)[1], sites[3], rtol=1e-4, atol=1e-5)


def test_profiles_read_cells_as_rows_or_aggregate_them(cells):
    assert len(read_profiles([cells])) == 9
    assert read_profiles([cells]).metadata["site_id"].iloc[0] == "P1_A01_1_2"


def test_batches_cross_sites_without_mixing_them(data):
    dataset = open_dataset(data)
    reader = CellReader(dataset, CropConfig(crop_size=16))
    parts = pixel_means(dataset, reader, config(data, "w", data / "f.parquet", level="cell"))
    assert [len(part.values) for part in parts] == [5, 4]
    values = np.concatenate([part.values for part in parts])
    expected = [reader.read(position).crop()[0].mean((1, 2)) for position in (0, 1, 3)]
    np.testing.assert_allclose(values, np.concatenate(expected), rtol=1e-5)
    assert parts[0].counts.border == 1


def test_tiles_of_sites_of_different_size(data):
    dataset = open_dataset(data)
    reader = TileReader(dataset, 32)
    settings = config(data, "w", data / "f.parquet", unit="tile", aggregate="mean-std")
    parts = pixel_means(dataset, reader, settings)
    values = np.concatenate([part.values for part in parts])
    means = reader.read(0).crop()[0].mean((1, 2))
    np.testing.assert_allclose(values[0], [*means.mean(0), *means.std(0)], rtol=1e-4)
    assert values.shape == (4, 4) and all(part.counts is None for part in parts)


def test_sites_without_cells_and_with_5000_cells(tmp_path):
    mask = np.zeros((360, 360), np.uint16)
    mask[2::5, 2::5] = np.arange(1, 72 * 72 + 1).reshape(72, 72)
    path = write_sites(tmp_path / "data", [np.zeros((20, 20), np.uint16), mask])
    dataset = open_dataset(path)
    reader = CellReader(dataset, CropConfig(crop_size=8))
    settings = config(path, "w", tmp_path / "f.parquet", level="cell", batch_size=512)
    (part,) = pixel_means(dataset, reader, settings)
    assert part.values.shape == (72 * 72, 2) and set(part.cells["position"]) == {1}
    np.testing.assert_allclose(part.values[-1], reader.read(1).crop(5183)[0].mean((0, 1, 2)))
    sites = config(path, "w", tmp_path / "f.parquet", unit="cell")
    (part,) = pixel_means(dataset, CellReader(dataset, CropConfig(8, max_cells=50)), sites)
    assert np.isnan(part.values[0]).all() and part.counts.not_sampled == 72 * 72 - 50


def test_summaries_ignore_missing_values_and_give_nan_without_cells():
    values = np.array([[1, 2], [3, np.nan], [8, np.nan]], np.float32)
    np.testing.assert_array_equal(summarize(values, "median"), [3, 2])
    np.testing.assert_allclose(summarize(values, "mean-std"), [4, 2, 2.944, 0], atol=1e-3)
    np.testing.assert_array_equal(summarize(values[:1], "mean-std"), [1, 2, 0, 0])
    assert np.isnan(summarize(values[:0], "mean-std")).all()
    assert summary_names(["a"], "mean-std") == ["a", "a_std"]


@pytest.mark.parametrize(
    ("size", "cells", "unit"), [(128, 9, "site"), (136, 9, "cell"), (136, 1, "tile")]
)
def test_unit_depends_on_size_and_cells(tmp_path, size, cells, unit):
    mask = np.zeros((size, size), np.uint16)
    mask[5, 5 : 5 + cells] = np.arange(1, cells + 1)
    dataset = open_dataset(write_sites(tmp_path / "data", [mask]))
    assert choose_unit(SourceConfig(unit="auto"), dataset) == unit
    assert choose_unit(SourceConfig(), dataset) == "site"


def test_missing_cells_and_channels_are_reported_before_writing(data, weights, tmp_path):
    empty = write_sites(tmp_path / "empty", [np.zeros((20, 20), np.uint16)])
    border = write_sites(tmp_path / "border", [np.ones((20, 20), np.uint16)])
    for path, changes, message in (
        (empty, {"level": "cell"}, "no site has a cell in its mask. Pass --unit tile"),
        (border, {"level": "cell"}, "every cell touches the border"),
        (data, {"level": "cell", "adapt": AdaptConfig(channels="RNA")}, "'RNA' is not stored"),
        (data, {"level": "cell", "unit": "tile"}, "--unit tile: must be cell with --level cell"),
    ):
        with pytest.raises(InputError, match=message):
            extract(config(path, weights, tmp_path / "f.parquet", **changes))
        assert not (tmp_path / "f.parquet").exists()


def test_cellprofiler_measures_each_cell(data, tmp_path):
    pytest.importorskip("cp_measure")
    out = FeaturesConfig((data,), tmp_path / "f.parquet", "cellprofiler", level="cell", workers=1)
    table = pd.read_parquet(extract(out))
    assert len(table) == 9 and (table["Cells_Area"] == table["Metadata_Area"]).all()
