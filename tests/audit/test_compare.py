"""`perturbjax compare`: the same sites side by side, differences paired, and runs that judged other sites refused."""

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
    """Three runs on the same sites: one guesses, two know, and differ in their seed."""
    index = make_index(plates=1)
    return [
        write(tmp_path / name, make_predictions(index, skill=skill, seed=seed), seed)
        for name, skill, seed in (("guesses", 0.0, None), ("knows_0", 4.0, 0), ("knows_1", 4.0, 1))
    ]


def test_runs_stand_side_by_side_with_paired_differences(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert run("compare", *runs, "--out", out) == 0
    found = json.loads((out / "compare.json").read_text())
    assert (
        found["sites"] == 72 and found["wells"] == 24 and set(found["levels"]) == {"site", "well"}
    )
    first, second, _, mean = found["levels"]["site"]
    lead = second["leads"]["accuracy"]
    assert first["leads"] == {} and lead["low"] > 0.5
    assert lead["value"] == pytest.approx(
        second["scores"]["accuracy"]["value"] - first["scores"]["accuracy"]["value"]
    )
    assert (
        mean["name"] == "mean of knows_0, knows_1"
        and mean["seeds"] == 2
        and mean["spread"] is not None
    )
    csv = pd.read_csv(out / "compare.csv").set_index(["level", "run", "quantity", "metric"])
    assert csv.loc[("site", "knows_0", "minus the first", "accuracy"), "low"] == pytest.approx(
        lead["low"]
    )
    for shown in (capsys.readouterr().out, (out / "compare.html").read_text()):
        assert (
            "knows_1" in shown
            and "2 seeds" in shown
            and "minus guesses" in shown.replace("\n", " ")
        )
        assert "top-5" not in shown, "of eight classes it says nothing"
    assert (
        '<p class="verdict">knows_' in shown
        and "is clearly better than guesses: balanced accuracy by well, +0." in shown
    )


def test_a_run_beside_itself_differs_by_nothing_whatever_the_order_of_rows_and_classes(
    runs, tmp_path
):
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.iloc[3:],
            "judged 69 sites, 69 of them among the 72 of the first run; train both with one --split-file",
        ),
        (
            lambda t: t.assign(label=np.where(np.arange(72) == 5, "DMSO", "compound A")),
            "has another label",
        ),
        (lambda t: t.rename(columns={"prob_DMSO": "prob_other"}), "knows other classes"),
        (lambda t: t.assign(part="train"), "has no site that judges"),
    ],
)
def test_runs_that_judged_something_else_are_refused_in_one_line(
    runs, tmp_path, capsys, change, named
):
    other = write(
        tmp_path / "other", change(pd.read_parquet(runs[0] / "evaluation" / "predictions.parquet"))
    )
    assert run("compare", runs[0], other, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert named in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "named"),
    [(("guesses",), "needs two or more"), (("guesses", "no"), "was not evaluated")],
)
def test_one_run_or_none_is_refused(runs, tmp_path, capsys, names, named):
    assert run("compare", *(tmp_path / name for name in names), "--out", tmp_path / "out") == 2
    assert named in capsys.readouterr().err
