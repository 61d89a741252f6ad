"""CellProfiler measurements: values and names, and the same result with several processes."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tiny_dataset import write_dataset

from perturbjax import dataset
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.profiles.extract import FeaturesConfig, extract


def config(data, out, **changes) -> FeaturesConfig:
    return FeaturesConfig(
        data=(data,), out=out, backbone="cellprofiler", **{"workers": 1, **changes}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("data"), sites=6, size=40, channels=["DNA", "Actin"]
    )


def test_measurements_are_medians_over_cells(data, tmp_path):
    pytest.importorskip("cp_measure")
    table = pd.read_parquet(extract(config(data, tmp_path / "cells.parquet")))
    dataset = open_dataset(data)
    for position in range(len(dataset)):
        image, mask = dataset.pixels(position)
        if not mask.any():
            assert table.filter(like="Cells_").iloc[position].isna().all()
            continue
        labels = np.unique(mask[mask > 0])
        areas = [int((mask == label).sum()) for label in labels]
        means = [image[mask == label, 1].mean() / np.iinfo(image.dtype).max for label in labels]
        assert table["Cells_Area"][position] == pytest.approx(np.median(areas))
        assert table["Cells_Intensity_MeanIntensity_Actin"][position] == pytest.approx(
            np.median(means), rel=1e-4
        )
    assert table["Metadata_site_id"].tolist() == dataset.index["site_id"].tolist()
    facts = json.loads(pq.read_schema(tmp_path / "cells.parquet").metadata[b"perturbjax"])
    assert facts["backbone"] == "cellprofiler" and facts["cp_measure"]


@pytest.mark.slow
def test_measurements_do_not_depend_on_number_of_processes(data, tmp_path):
    pytest.importorskip("cp_measure")
    one, two = (extract(config(data, tmp_path / f"{n}.parquet", workers=n)) for n in (1, 2))
    pd.testing.assert_frame_equal(pd.read_parquet(one), pd.read_parquet(two))


def test_missing_cp_measure_names_the_extra(data, tmp_path, monkeypatch):
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("cp_measure"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        InputError,
        match=r"needs cp_measure, which is not installed. Run `pip install "
        r"'perturbjax\[cellprofiler\]'`",
    ):
        extract(config(data, tmp_path / "cells.parquet"))
    assert list(tmp_path.iterdir()) == []


def test_nuclei_and_cytoplasm_are_measured_if_the_dataset_has_nuclei(tmp_path):
    pytest.importorskip("cp_measure")
    mask = np.zeros((40, 40), np.uint16)
    mask[5:35, 5:35] = 7
    nucleus = np.zeros_like(mask)
    nucleus[15:25, 15:23] = 7
    image = np.random.default_rng(0).integers(100, 200, (40, 40, 1)).astype(np.uint16)
    image[nucleus > 0] += 5000
    dataset.write_dataset(
        tmp_path / "data",
        pd.DataFrame({"site_id": ["a", "b"], "Metadata_Plate": "P", "Metadata_Well": "A01"}),
        # The cell of the second site has no nucleus.
        [dataset.SitePixels(image, mask, nuclei=one) for one in (nucleus, nucleus * 0)],
        channel_names=["DNA"],
        image_dtype=np.uint16,
        label_column="",
        has_nuclei=True,
    )
    table = pd.read_parquet(extract(config(tmp_path / "data", tmp_path / "parts.parquet")))
    kinds = {name.split("_")[0] for name in table if not name.startswith("Metadata_")}
    assert kinds == {"Cells", "Nuclei", "Cytoplasm"}
    assert table.loc[0, ["Cells_Area", "Nuclei_Area", "Cytoplasm_Area"]].tolist() == [900, 80, 820]
    mean = "Intensity_MeanIntensity_DNA"
    assert table[f"Nuclei_{mean}"][0] > 5 * table[f"Cytoplasm_{mean}"][0]
    assert table.filter(like="Nuclei_").iloc[1].isna().all()
    assert table["Cytoplasm_Area"][1] == 900
