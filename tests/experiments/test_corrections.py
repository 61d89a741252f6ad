"""The table of corrections comes from real runs, all judged on one split, whatever their seeds."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
from tiny_dataset import write_dataset

from experiments import bbbc021_cells, corrections, two_phase
from perturbjax.core.errors import InputError
from perturbjax.data.splits import fingerprint


@pytest.mark.parametrize(
    ("experiment", "flags"),
    [
        (corrections, {"data": "d", "variants": ("no such",)}),
        (bbbc021_cells, {"images": "i", "weights": "w", "recipes": ("no such",)}),
        (two_phase, {"data": "d", "ways": ("no such",)}),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(tmp_path, experiment, flags):
    with pytest.raises(InputError, match=r"no such: unknown; choose among \w+"):
        experiment.main(experiment.Config(out=tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_seeds_share_their_judged_sites_and_finished_runs_are_kept(tmp_path):
    data = write_dataset(tmp_path / "data", sites=144, size=16, channels=["DNA"])
    out = tmp_path / "out"
    options = corrections.Config(data, out, ("no mask",), seeds=(0, 1), crop=8, epochs=1)
    corrections.main(dataclasses.replace(options, seeds=(0,)))
    judged = out / "no_mask_seed0/evaluation/scores.json"
    before = judged.stat().st_mtime_ns
    corrections.main(options)
    assert judged.stat().st_mtime_ns == before
    table = pd.read_csv(out / "scores.csv")
    assert table["seed"].tolist() == [0, 1] and table["balanced_accuracy"].between(0, 1).all()
    splits = [
        fingerprint(pd.read_parquet(run / "split.parquet")) for run in sorted(out.glob("*_seed*"))
    ]
    assert len(splits) == 2 and len(set(splits)) == 1
    assert "| no mask | 2 |" in (out / "scores.md").read_text()
