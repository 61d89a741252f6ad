"""The grid runner: tables from finished runs, pages, and real runs on a small dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from tiny_dataset import write_dataset

from experiments import grid
from experiments.grid import (
    GRIDS,
    MARKS,
    Config,
    Training,
    evaluate_run,
    gather,
    load_grid,
    summary,
    write_page,
)
from perturbjax.core.errors import InputError
from perturbjax.data.splits import fingerprint


def write_run(run: Path, file: str, accuracy: float) -> None:
    """Write the files of an evaluated run that the tables are computed from."""
    estimate = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    metrics = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"), estimate)
    models = dict.fromkeys(("model", "majority", "position", "cell count"), metrics)
    (run / file).parent.mkdir(parents=True)
    (run / file).write_text(json.dumps({"levels": {"site": models, "well": models}}))
    if "logistic" in file:
        pd.DataFrame({"seconds": [30.0]}).to_csv(run / "table.csv")
    else:
        rows = ({"split": "train", "seconds": 90}, {"split": "test", "seconds": 90})
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for fold, linear, cells in ((0, 0.6, 0.7), (1, 0.5, 0.45), (2, 0.4, None)):
        folder = tmp_path / "out" / "screen" / "plate" / f"fold{fold}"
        write_run(folder / "linear_seed0", "evaluation/logistic_balanced/scores.json", linear)
        if cells is not None:
            write_run(folder / "cells_seed0", "evaluation/scores.json", cells)
    return tmp_path / "out"


def test_summary_averages_folds_and_compares_shared_folds(out: Path) -> None:
    table = summary(gather(out), ("linear", "cells")).set_index("recipe")
    assert list(table.index) == ["majority", "position", "linear", "cells"]
    assert table.loc["linear", "folds"] == 3
    assert table.loc["linear", "accuracy"] == pytest.approx(0.5)
    assert table.loc["linear", ["lowest", "highest"]].tolist() == pytest.approx([0.4, 0.6])
    assert table.loc["cells", "folds"] == 2
    assert table.loc["cells", "lead"] == pytest.approx((0.1 - 0.05) / 2)
    assert table.loc["cells", "min_lead"] == pytest.approx(-0.05)
    assert table.loc["cells", "minutes"] == pytest.approx(1.5)


def test_write_page_replaces_the_table_only(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\na stale table\n{MARKS[1]}\nafter\n")
    for _ in range(2):
        write_page(page, gather(out))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert text.count("| screen | plate | cells | 2 | 1 | 0.575 |") == 1


def test_main_refuses_a_page_without_marks_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(grid, "command", lambda *words: pytest.fail("ran"))
    with pytest.raises(InputError, match=r"--page .*has no lines"):
        grid.main(Config("presets", ("screen=there",), tmp_path, page=tmp_path / "none.md"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "none"}, "--grid none: must be one of presets"),
        ({"data": ("there",)}, "--data there: must be NAME=DIRECTORY"),
        ({"folds": (5,)}, "--folds 5"),
        ({"seeds": (-1,)}, "--seeds -1"),
    ],
)
def test_config_names_the_wrong_flag(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**{"grid": "presets", "data": ("a=b",), "out": tmp_path, **changes})


@pytest.mark.parametrize("name", GRIDS)
def test_unknown_recipe_is_refused_with_a_list(tmp_path: Path, name: str) -> None:
    options = Config(name, ("screen=there",), tmp_path / "out", recipes=("no such",))
    with pytest.raises(InputError, match=r"no such: unknown; choose among \w+"):
        grid.main(options)
    assert not (tmp_path / "out").exists() and load_grid(name).recipes


def test_evaluate_run_keeps_finished_runs(out: Path, monkeypatch) -> None:
    monkeypatch.setattr(grid, "command", lambda *words: pytest.fail("ran"))
    monkeypatch.setattr(grid, "train_and_evaluate", lambda *words: pytest.fail("ran"))
    for recipe in ("linear", "cells"):
        evaluate_run(out / f"screen/plate/fold0/{recipe}_seed0", Training(), (), ())


def test_recipes_that_shrink_sites_are_left_out_for_small_ones(tmp_path: Path, monkeypatch) -> None:
    data = [
        f"{size}={write_dataset(tmp_path / str(size), sites=24, size=size, channels=['DNA'])}"
        for size in (128, 129)
    ]
    runs: list[str] = []
    monkeypatch.setattr(grid, "command", lambda *_: None)
    monkeypatch.setattr(grid, "evaluate_run", lambda run, *_: runs.append(run.name))
    monkeypatch.setattr(grid, "_write_tables", lambda *_: (tmp_path / "scores.md").touch())
    recipes = ("linear", "linear, resized", "pretrained, resized")
    grid.main(
        Config("presets", tuple(data), tmp_path, recipes=recipes, splits=("well",), folds=(0,))
    )
    assert runs == [
        f"{name}_seed0" for name in ("linear", "linear", "linear-resized", "pretrained-resized")
    ]


@pytest.mark.parametrize(("plates", "split", "folds"), [(1, "well", 5), (3, "plate", 3)])
def test_automatic_split_has_at_most_one_fold_per_plate(
    tmp_path: Path, monkeypatch, plates: int, split: str, folds: int
) -> None:
    data = write_dataset(tmp_path / "data", sites=24 * plates, size=16, channels=["DNA"])
    words = []
    monkeypatch.setattr(grid, "command", lambda *all_words: words.append(all_words))
    monkeypatch.setattr(grid, "evaluate_run", lambda *_: None)
    monkeypatch.setattr(grid, "_write_tables", lambda *_: (tmp_path / "scores.md").touch())
    grid.main(Config("presets", (f"tiny={data}",), tmp_path, splits=("auto",), recipes=("linear",)))
    assert [word[word.index("--split") + 1] for word in words] == [split] * folds
    assert {word[word.index("--folds") + 1] for word in words} == {folds}


@pytest.mark.slow
def test_seeds_share_one_split_and_changes_reach_the_recipe(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", sites=144, size=16, channels=["DNA"])
    options = Config(
        "corrections",
        (f"tiny={data}",),
        tmp_path / "out",
        recipes=("augmentation",),
        seeds=(0, 1),
        flags="--crop 8 --epochs 1",
    )
    grid.main(options)
    table = pd.read_csv(tmp_path / "out/scores.csv")
    assert table["seed"].tolist() == [0, 1] and table["balanced_accuracy"].between(0, 1).all()
    runs = sorted((tmp_path / "out/tiny/plate/fold0").glob("*_seed?"))
    prints = {fingerprint(pd.read_parquet(run / "split.parquet")) for run in runs}
    assert len(runs) == 2 and len(prints) == 1
    recipe = json.loads((runs[0] / "config.json").read_text())["recipe"]
    assert recipe["augment"]["legacy_augmentation"] is False
