"""`build --cells-channel` stores whole cells and their nuclei."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_prep_builds import options
from test_append import plate_options

from data_prep.build import build
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.dataset.checksums import verify_dataset

pytestmark = pytest.mark.full

CELLS = {"cells_channel": "Actin"}


@pytest.fixture(scope="module")
def built(simulated, tmp_path_factory):
    """Dataset with cells and nuclei, and the cache of its masks."""
    folder = tmp_path_factory.mktemp("cells")
    build(options(simulated, folder / "data", mask_cache=str(folder / "masks"), **CELLS))
    return folder


def test_nuclei_equal_the_masks_of_a_build_without_cells(built, simulated, tmp_path):
    build(options(simulated, tmp_path / "plain", mask_cache=str(built / "masks")))
    plain, dataset = open_dataset(tmp_path / "plain"), open_dataset(built / "data")
    assert dataset.has_nuclei and not plain.has_nuclei
    for position in (0, 5, 23):
        nuclei, mask = dataset.nuclei(position), dataset.pixels(position)[1]
        np.testing.assert_array_equal(nuclei, plain.pixels(position)[1])
        assert set(np.unique(nuclei)) == set(np.unique(mask))
        assert (mask[nuclei > 0] == nuclei[nuclei > 0]).all()
        assert (mask > 0).sum() > 1.5 * (nuclei > 0).sum()
        np.testing.assert_array_equal(dataset[position]["nuclei"], nuclei)
    areas = dataset.index[["nuclei_area", "mask_area"]].sum()
    assert areas["nuclei_area"] == plain.index["mask_area"].sum() < areas["mask_area"]
    assert dataset.provenance["segmenter"]["cells"]["channel"] == "Actin"
    with pytest.raises(InputError, match="plain: has no nuclei; build it with --cells-channel"):
        plain.nuclei(0)


def test_dataset_with_nuclei_is_verified_and_read_by_tfds(built):
    assert "24 sites" in verify_dataset(built / "data")
    source = tfds.builder_from_directory(built / "data").as_data_source(split="sites")
    np.testing.assert_array_equal(source[3]["nuclei"], open_dataset(built / "data").nuclei(3))
    page = (built / "data" / "preview.html").read_text()
    assert "White lines are outlines of cells, yellow lines those of nuclei." in page


def test_cells_are_computed_once(built, simulated, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.site_tasks.propagate", None)
    cache = {"mask_cache": str(built / "masks")}
    build(options(simulated, tmp_path / "again", resize=32, **cache, **CELLS))
    dataset = open_dataset(tmp_path / "again")
    assert dataset.nuclei(0).shape == (32, 32) and "24 sites" in verify_dataset(dataset.path)


def test_append_and_joined_datasets_keep_nuclei(built, plate, tmp_path):
    for name in ("SIM001", "SIM002"):
        build(plate_options(plate, name, tmp_path / name, **CELLS))
    with pytest.raises(InputError, match=r"segmenter .* use the same .*--cells-channel"):
        build(plate_options(plate, "SIM002", tmp_path / "SIM001", append=True))
    build(plate_options(plate, "SIM002", tmp_path / "plain"))
    mixed = open_dataset([tmp_path / "SIM001", tmp_path / "plain"])
    assert not mixed.has_nuclei
    with pytest.raises(InputError, match="plain: has no nuclei"):
        mixed.nuclei(0)
    whole = open_dataset(built / "data")
    joined = open_dataset([tmp_path / "SIM001", tmp_path / "SIM002"])
    np.testing.assert_array_equal(joined.nuclei(20), whole.nuclei(20))
    build(plate_options(plate, "SIM002", tmp_path / "SIM001", append=True, **CELLS))
    np.testing.assert_array_equal(open_dataset(tmp_path / "SIM001").nuclei(20), whole.nuclei(20))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cells-channel", "ER"], "ER"),
        (["--cells-channel", "DNA"], "--cells-channel DNA: is the channel of the nuclei"),
        (["--cells-channel", "Actin,Tubulin"], "must be one channel"),
    ],
)
def test_build_refuses_an_unusable_cells_channel(
    refused, build_arguments, tmp_path, flags, message
):
    assert message in refused(*build_arguments("--segment-channels", "DNA", *flags))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]


def test_build_refuses_cells_without_a_nuclear_channel(refused, build_arguments):
    line = refused(*build_arguments("--cells-channel", "Actin"))
    assert "Pass the nuclear stain with --segment-channels (available: DNA" in line
