"""`perturbjax audit --run`: a network judged under its own split, beside what it was before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_dataset import write_dataset

from perturbjax.cli import main
from perturbjax.evaluation.predictions import read_predictions


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An evaluated run of one epoch on two plates of eight wells of three sites."""
    folder = tmp_path_factory.mktemp("audited")
    data = write_dataset(folder / "data", sites=48, size=16, channels=["DNA"])
    small = (
        "--model",
        "masked_cnn",
        "--crop",
        16,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--devices",
        "1",
    )
    assert run("train", "--data", data, "--out", folder / "run", "--split", "well", *small) == 0
    assert run("evaluate", "--run", folder / "run", "--batch-size", 16, "--replicates", 50) == 0
    return folder / "run"


def test_a_run_is_judged_under_its_own_split_beside_the_same_network_untrained(
    trained, tmp_path, capsys
):
    out = tmp_path / "audit"
    assert run("audit", "--run", trained, "--untrained", "--out", out, "--replicates", 100) == 0
    found = json.loads((out / "audit.json").read_text())
    assert list(found["splits"]) == ["well"] and found["model"] == "model"
    by_site = found["splits"]["well"]["levels"]["site"]
    scores = json.loads((trained / "evaluation" / "scores.json").read_text())["levels"]["site"][
        "model"
    ]
    assert by_site["model"]["scores"]["accuracy"]["value"] == pytest.approx(
        scores["accuracy"]["value"]
    )
    assert {"untrained network", "intensity", "cell count", "all together"} <= set(by_site)
    assert "labels shuffled" not in by_site
    assert "`perturbjax train --split plate` asks this" in found["refused"][
        "plate"
    ] or "one layout" in str(found)
    assert "untrained" in capsys.readouterr().out


def test_a_run_that_was_not_evaluated_says_what_to_do(trained, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "labels.json", "split.parquet"):
        (bare / name).write_bytes((trained / name).read_bytes())
    assert run("audit", "--run", bare, "--out", tmp_path / "audit") == 2
    assert (
        f"{bare}: was not evaluated; run `perturbjax evaluate --run {bare}` first"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_recipe_is_trained_anew_under_every_split_and_finished_runs_are_not_again(
    trained, tmp_path, capsys
):
    out = tmp_path / "audit"
    bare = tmp_path / "bare"  # only its recipe is asked for, not that it was evaluated
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("evaluation"))
    command = ("audit", "--run", bare, "--train", "--out", out, "--folds", 2, "--replicates", 100)
    assert run(*command) == 0
    found = json.loads((out / "audit.json").read_text())
    assert {"site", "well", "plate"} <= set(found["splits"]) and found["model"] == "masked_cnn"
    for policy, answer in found["splits"].items():
        assert (answer["overlap"]["well"] > 0) == (policy == "site")
        assert {"masked_cnn", "intensity", "all together"} <= set(answer["levels"]["site"])
    assert found["differences"] and (out / "runs" / "plate_1" / "checkpoints").is_dir()
    for fold in (0, 1):
        assert set(
            read_predictions(out / "runs" / f"plate_{fold}.predictions.parquet")["part"]
        ) == {"test"}
    capsys.readouterr()
    assert run(*command) == 0
    assert json.loads((out / "audit.json").read_text()) == found
    assert "train loss" not in capsys.readouterr().err


def test_training_anew_asks_for_a_run(tmp_path, capsys):
    assert run("audit", "--data", tmp_path, "--train", "--out", tmp_path / "audit") == 2
    assert (
        "--train True: must be given with --run, whose recipe it trains" in capsys.readouterr().err
    )
