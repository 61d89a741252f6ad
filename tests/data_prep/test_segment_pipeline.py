"""Segmenting the sites of a build: one diameter per plate, sites that fail, empty wells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile
from data_prep_builds import options

from data_prep.build import build
from data_prep.segment import ENGINES, EngineRecord, Failure, SegmenterConfig
from data_prep.segment.network import NetworkSegmenter
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


@pytest.fixture
def half_empty(plate):
    """A plate in which every second DNA image shows only camera noise."""
    rng = np.random.default_rng(0)
    table = pd.read_csv(plate / "load_data.csv", dtype=str)
    empty = []
    for row in table.to_dict("records")[::2]:
        path = plate / row["PathName_OrigDNA"] / row["FileName_OrigDNA"]
        noise = rng.poisson(300, tifffile.imread(path).shape) + rng.normal(0, 10)
        tifffile.imwrite(path, noise.astype(np.uint16), metadata=None)
        empty.append((row["Metadata_Plate"], row["Metadata_Well"], row["Metadata_Site"]))
    return plate, empty


@pytest.mark.parametrize("engine", ["watershed", "nuclei"])
def test_build_finds_no_objects_in_empty_wells(half_empty, tmp_path, capsys, engine):
    plate, empty = half_empty
    build(options(plate, tmp_path / "dataset", segmenter=engine, mask_cache="none"))
    index = open_dataset(tmp_path / "dataset").index
    keys = zip(index["Metadata_Plate"], index["Metadata_Well"], index["Metadata_Site"], strict=True)
    is_empty = np.array([key in empty for key in keys])
    assert is_empty.sum() == 12
    assert (index["n_cells"][is_empty] == 0).all() and (index["n_cells"][~is_empty] > 0).all()
    assert not index["segmentation_failed"].any()
    assert "warning: no objects in 12 of 24 newly segmented sites" in capsys.readouterr().err


def test_build_stores_one_diameter_per_plate(simulated, tmp_path, capsys):
    build(options(simulated, tmp_path / "one", mask_cache="none"))
    diameters = open_dataset(tmp_path / "one").provenance["diameters"]
    assert set(diameters) == {"SIM001", "SIM002"} and min(diameters.values()) > 3
    assert "info: plate SIM001: diameter" in capsys.readouterr().err
    build(options(simulated, tmp_path / "two", mask_cache="none", diameter="per-site"))
    dataset = open_dataset(tmp_path / "two")
    assert dataset.provenance["diameters"] == {}
    assert dataset.provenance["segmenter"]["parameters"]["diameter"] == "per-site"


class _FailsOnce(NetworkSegmenter):
    """Fail on the third image."""

    def segment_all(self, images):
        for number, mask in enumerate(super().segment_all(images)):
            yield Failure("89635 objects in one site") if number == 2 else mask


def test_build_continues_after_a_site_that_fails(simulated, tmp_path, capsys, monkeypatch):
    record = ENGINES["nuclei"]
    load = lambda config: _FailsOnce(config, "nuclei_small")  # noqa: E731
    monkeypatch.setitem(
        ENGINES, "nuclei", EngineRecord(record.help, load, "per-plate", network=True)
    )
    monkeypatch.setattr("data_prep.segment.pipeline._load_once", lambda config: load(config))
    build(options(simulated, tmp_path / "dataset", segmenter="nuclei", mask_cache="none"))
    index = open_dataset(tmp_path / "dataset").index
    assert index["segmentation_failed"].sum() == 1
    assert (index["n_cells"][index["segmentation_failed"] == 1] == 0).all()
    printed = capsys.readouterr().err
    assert "row 4: segmentation failed: 89635 objects in one site" in printed
    assert "warning: 1 of 24 sites could not be segmented" in printed


def test_build_refuses_if_every_site_fails(simulated, tmp_path, monkeypatch):
    class Broken(NetworkSegmenter):
        def segment_all(self, images):
            yield from (Failure("out of memory") for _ in images)

    monkeypatch.setattr(
        "data_prep.segment.pipeline._load_once", lambda config: Broken(config, "nuclei_small")
    )
    with pytest.raises(InputError, match="segmentation failed: out of memory"):
        build(options(simulated, tmp_path / "dataset", segmenter="nuclei", diameter=20.0))


def test_segment_all_continues_after_an_exception(monkeypatch):
    """An exception in the network costs the image at the head of the queue only."""
    engine = NetworkSegmenter(SegmenterConfig("nuclei", diameter=20.0), "nuclei_small")
    real = engine.network.masks
    calls = []

    def masks(images):
        calls.append(1)
        if len(calls) == 1:
            next(images)
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(images)

    monkeypatch.setattr(engine.network, "masks", masks)
    images = [(np.zeros((32, 32, 1), np.uint16), 0.0)] * 3
    results = list(engine.segment_all(images))
    assert isinstance(results[0], Failure) and "RESOURCE_EXHAUSTED" in results[0].reason
    assert [np.asarray(each).shape for each in results[1:]] == [(32, 32)] * 2


def test_engine_choices_are_the_records():
    from typing import get_args

    from data_prep import segment

    assert get_args(segment.Engine) == tuple(ENGINES)
    assert all(record.help for record in ENGINES.values())
    with pytest.raises(InputError, match="--engine"):
        SegmenterConfig("no-such-engine")
