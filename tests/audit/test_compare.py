"""Command `compare`: paired differences on equal test sites, and refused input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation.conftest import make_index, make_predictions

from perturbjax.cli import main


def write(folder: Path, predictions: pd.DataFrame, seed: int | None = None) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    predictions.to_parquet(folder / "evaluation" / "predictions.parquet", index=False)
    if seed is not None:
        (folder / "config.json").write_text(
            json.dumps({"recipe": {"seed": seed, "optim": {"epochs": 3}}})
        )
    return folder


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Simulate three runs: one at chance, two accurate runs with different seeds."""
    index = make_index(plates=1)
    return [
        write(tmp_path / name, make_predictions(index, skill=skill, seed=seed), seed)
        for name, skill, seed in (
            ("random", 0.0, None),
            ("accurate_0", 4.0, 0),
            ("accurate_1", 4.0, 1),
        )
    ]


def test_compare_writes_paired_differences(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert run("compare", *runs, "--out", out) == 0
    result = json.loads((out / "compare.json").read_text())
    assert (
        result["sites"] == 72
        and result["wells"] == 24
        and set(result["levels"]) == {"site", "well"}
    )
    first, second, _, mean = result["levels"]["site"]
    lead = second["leads"]["accuracy"]
    assert first["leads"] == {} and lead["low"] > 0.5
    assert lead["value"] == pytest.approx(
        second["scores"]["accuracy"]["value"] - first["scores"]["accuracy"]["value"]
    )
    assert (
        mean["name"] == "mean of accurate_0, accurate_1"
        and mean["seeds"] == 2
        and mean["spread"] is not None
    )
    csv = pd.read_csv(out / "compare.csv").set_index(["level", "run", "quantity", "metric"])
    assert csv.loc[("site", "accurate_0", "minus the first", "accuracy"), "low"] == pytest.approx(
        lead["low"]
    )
    for output in (capsys.readouterr().out, (out / "compare.html").read_text()):
        assert (
            "accurate_1" in output
            and "2 seeds" in output
            and "minus random" in output.replace("\n", " ")
        )
        assert "top-5" not in output, "not informative for eight classes"
    assert (
        '<p class="verdict">accurate_' in output
        and "is clearly better than random: balanced accuracy by well, +0." in output
    )


def test_compare_is_independent_of_row_and_class_order(runs, tmp_path):
    table = pd.read_parquet(runs[1] / "evaluation" / "predictions.parquet")
    columns = sorted(table.columns, reverse=True)
    other = write(tmp_path / "again", table.sample(frac=1, random_state=0)[columns])
    assert (
        run(
            "compare",
            runs[1],
            other / "evaluation" / "predictions.parquet",
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    row = json.loads((tmp_path / "out" / "compare.json").read_text())["levels"]["site"][1]
    assert {(one["value"], one["low"], one["high"]) for one in row["leads"].values()} == {
        (0.0, 0.0, 0.0)
    }


def test_predictions_of_other_models_form_no_series_of_seeds(runs, tmp_path):
    for folder in runs[:2]:
        (folder / "config.json").write_text('{"predictions": "theirs.csv"}')
    assert run("compare", *runs[:2], "--out", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["levels"]["site"]
    assert [row["name"] for row in rows] == ["random", "accurate_0"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.iloc[3:],
            "has 69 test sites, 69 of the 72 of the first run; train both runs with one "
            "--split-file",
        ),
        (
            lambda t: t.assign(label=np.where(np.arange(72) == 5, "DMSO", "compound A")),
            "differs from the first run",
        ),
        (
            lambda t: t.rename(columns={"prob_DMSO": "prob_other"}),
            "classes differ from the first run",
        ),
        (lambda t: t.assign(part="train"), "has no test sites"),
    ],
)
def test_compare_rejects_other_sites_in_one_line(runs, tmp_path, capsys, change, named):
    other = write(
        tmp_path / "other", change(pd.read_parquet(runs[0] / "evaluation" / "predictions.parquet"))
    )
    assert run("compare", runs[0], other, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert named in message and len(message.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "named"),
    [(("random",), "two or more are needed"), (("random", "no"), "was not evaluated")],
)
def test_compare_requires_two_evaluated_runs(runs, tmp_path, capsys, names, named):
    assert run("compare", *(tmp_path / name for name in names), "--out", tmp_path / "out") == 2
    assert named in capsys.readouterr().err
