"""The benchmark of whole plates, on a small plate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile

from experiments.bench import mosaic, plates
from experiments.bench.commands import run_measured, stage_seconds
from experiments.bench.limits import run as limits
from experiments.bench.plates import Case
from perturbjax.core.files import write_json
from perturbjax.dataset import open_dataset


@pytest.mark.slow
def test_run_continues_and_measures_the_stages_of_a_build(tmp_path, monkeypatch):
    monkeypatch.setattr(
        plates, "CASES", (Case("part", "TIFF", 1, 1), Case("part", "OME-Zarr", 1, 2))
    )
    write_json(
        tmp_path / "rows.json", [{"data": "part", "format": "TIFF", "plates": 1, "workers": 1}]
    )
    *_, rows = plates.run(quick=True, folder=tmp_path)
    assert len(rows) == 2
    row = rows[1]
    assert (
        row["sites"] == 4
        and row["processor s"] > 0
        and row["dataset MB"] > 0
        and row["images MB"] > 0
    )
    assert row["checking s"] + row["segmenting s"] + row["writing s"] <= row["build s"] + 0.3
    assert 0 < row["worker MB"] <= row["all MB"] and 0 < row["main MB"] <= row["all MB"]
    assert len(open_dataset(plates.dataset_path(tmp_path, "part"))) == 4


def test_write_plates_makes_different_fields(tmp_path):
    plate = mosaic.write_plates(tmp_path / "plate", plates=1, wells=3, sites=1, size=300)
    table = pd.read_csv(plate / "load_data.csv")
    files = [
        plate / "images" / table.loc[k, "PathName_OrigDNA"] / table.loc[k, "FileName_OrigDNA"]
        for k in range(3)
    ]
    fields = [tifffile.imread(file) for file in files]
    assert {field.shape for field in fields} == {(300, 300)}
    assert len({field.tobytes() for field in fields}) == 3
    assert all(field.std() > 100 for field in fields)


def test_limits_measures_disk_and_codec(tmp_path):
    rows = {row["operation"]: row for row in limits(quick=True, folder=tmp_path)}
    assert all(row["MB/s"] > 0 for row in rows.values())
    assert 0.1 < rows["deflate"]["deflated to"] < 1.1
    assert rows["deflate"]["MB"] == pytest.approx(4 * 2 * 3 * 64 * 64 * 2 / 1e6, rel=0.1)
    assert np.isfinite(rows["write, to the disk"]["MB/s"])


def test_stage_seconds_reads_hours_and_seconds():
    assert stage_seconds("Writing: 3/3 sites in 1:02:03\n", "Writing") == 3723
    assert stage_seconds("x\nTraining head: 3/3 epochs in 2.5 s", "Training") == 2.5
    with pytest.raises(RuntimeError, match="no line of stage Checking"):
        stage_seconds("Writing: 3/3 sites in 2.5 s", "Checking")


def test_run_measured_raises_with_the_messages_of_the_command(tmp_path):
    with pytest.raises(RuntimeError, match="unknown"):
        run_measured(["absent"], tmp_path / "log")
