"""The table of corrections comes from real runs, all judged on one split, whatever their seeds."""

from __future__ import annotations

import dataclasses

import pandas as pd
from tiny_dataset import write_dataset

from experiments import corrections
from perturbjax.splits import fingerprint


def test_seeds_share_their_judged_sites_and_finished_runs_are_kept(tmp_path):
    data = write_dataset(tmp_path / "data", sites=144, size=16, channels=["DNA"])
    out = tmp_path / "out"
    options = corrections.Options(data, out, ("no mask",), seeds=(0, 1), crop=8, epochs=1)
    corrections.main(dataclasses.replace(options, seeds=(0,)))
    judged = out / "no_mask_seed0/evaluation/scores.json"
    before = judged.stat().st_mtime_ns
    corrections.main(options)
    assert judged.stat().st_mtime_ns == before
    table = pd.read_csv(out / "scores.csv")
    assert table["seed"].tolist() == [0, 1] and table["balanced_accuracy"].between(0, 1).all()
    splits = [fingerprint(pd.read_parquet(run / "split.parquet")) for run in sorted(out.glob("*_seed*"))]
    assert len(splits) == 2 and len(set(splits)) == 1
    assert "| no mask | 2 |" in (out / "scores.md").read_text()
