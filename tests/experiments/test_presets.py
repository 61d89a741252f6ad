"""The table of presets: read from what runs left, and put where the page has its marks."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from experiments import presets
from experiments.presets import MARKS, Config, gather, summary, write_page
from perturbjax.core.errors import InputError


def leave(run: Path, file: str, accuracy: float) -> None:
    """What a judged run leaves: its scores, and how long it took."""
    estimate = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    every = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"), estimate)
    levels = {
        level: dict.fromkeys(("model", "majority", "position", "cell count"), every)
        for level in ("site", "well")
    }
    (run / file).parent.mkdir(parents=True)
    (run / file).write_text(json.dumps({"levels": levels}))
    if "logistic" in file:
        pd.DataFrame({"seconds": [30.0]}).to_csv(run / "table.csv")
    else:
        (run / "metrics.jsonl").write_text(
            '{"split": "train", "seconds": 90}\n{"split": "test", "seconds": 90}\n'
        )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for fold, linear, cells in ((0, 0.6, 0.7), (1, 0.5, 0.45), (2, 0.4, None)):
        place = tmp_path / "out" / "screen" / "plate" / f"fold{fold}"
        leave(place / "linear_seed0", "evaluation/logistic_balanced/scores.json", linear)
        if cells is not None:
            leave(place / "cells_seed0", "evaluation/scores.json", cells)
    return tmp_path / "out"


def test_means_are_over_the_folds_judged_and_leads_over_those_both_have(out: Path) -> None:
    rows = {row["recipe"]: row for row in summary(gather(out))}
    assert list(rows) == ["majority", "position", "linear", "cells"]
    assert rows["linear"]["folds"] == 3 and rows["linear"]["accuracy"] == pytest.approx(0.5)
    assert rows["cells"]["folds"] == 2 and rows["cells"]["lead"] == pytest.approx((0.1 - 0.05) / 2)
    assert rows["cells"]["worst"] == pytest.approx(-0.05) and rows["cells"][
        "minutes"
    ] == pytest.approx(1.5)


def test_the_table_comes_between_the_marks_and_nothing_else_changes(
    out: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\na stale table\n{MARKS[1]}\nafter\n")
    for _ in range(2):
        write_page(page, gather(out))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert text.count("| screen | plate | cells | 2 | 1 | 0.575 |") == 1


def test_a_page_without_marks_is_refused_before_anything_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(presets, "command", lambda *words: pytest.fail("ran"))
    with pytest.raises(InputError, match=r"--page .*has no lines"):
        presets.main(Config(("screen=there",), tmp_path, page=tmp_path / "none.md"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": ("there",)}, "--data there: must be NAME=DIRECTORY"),
        ({"folds": (5,)}, "--folds 5"),
        ({"seeds": ()}, "--seeds"),
    ],
)
def test_flags_that_make_no_sense_are_named(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Config(**{"data": ("screen=there",), "out": tmp_path, **changes})


def test_what_was_judged_is_not_judged_again(out: Path, monkeypatch) -> None:
    monkeypatch.setattr(presets, "command", lambda *words: pytest.fail("ran"))
    monkeypatch.setattr(presets, "train_and_judge", lambda *words: pytest.fail("ran"))
    options = Config(("screen=there",), out)
    for preset in ("linear", "cells"):
        presets.judged(
            out / "screen/plate/fold0" / f"{preset}_seed0",
            "there",
            out / "m.parquet",
            preset,
            options,
        )
