"""The benchmark of whole plates, on one that is small."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile

from experiments.bench import mosaic, plates
from experiments.bench.commands import measured, seconds_of
from experiments.bench.limits import run as limits
from experiments.bench.plates import Case
from perturbjax.core.files import write_json
from perturbjax.dataset import open_dataset


@pytest.mark.slow
def test_a_build_is_measured_by_its_stages_and_one_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        plates, "CASES", (Case("part", "TIFF", 1, 1), Case("part", "OME-Zarr", 1, 2))
    )
    write_json(
        tmp_path / "rows.json", [{"what": "part", "kept as": "TIFF", "plates": 1, "workers": 1}]
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
    assert len(open_dataset(plates.dataset_of(tmp_path, "part"))) == 4


def test_fields_are_put_together_of_tiles_and_no_two_are_alike(tmp_path):
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


def test_what_disk_and_codec_do_is_measured(tmp_path):
    rows = {row["what"]: row for row in limits(quick=True, folder=tmp_path)}
    assert all(row["MB/s"] > 0 for row in rows.values())
    assert 0.1 < rows["deflate"]["deflated to"] < 1.1
    assert rows["deflate"]["MB"] == pytest.approx(4 * 2 * 3 * 64 * 64 * 2 / 1e6, rel=0.1)
    assert np.isfinite(rows["write, to the disk"]["MB/s"])


def test_seconds_are_read_however_long_they_are():
    assert seconds_of("writing: 3/3 sites in 1:02:03\n", "writing") == 3723
    assert seconds_of("x\nwriting: 3/3 sites in 2.5 s", "writing") == 2.5
    with pytest.raises(RuntimeError, match="checking is not in what was said"):
        seconds_of("writing: 3/3 sites in 2.5 s", "checking")


def test_a_command_that_fails_is_told_with_what_it_said(tmp_path):
    with pytest.raises(RuntimeError, match="unknown"):
        measured(["nothing"], tmp_path / "log")
