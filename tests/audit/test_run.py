"""Command `audit --run`: audit of a trained network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_dataset import write_dataset

from perturbjax.cli import main
from perturbjax.evaluation.predictions import read_predictions

pytestmark = pytest.mark.full


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train and evaluate a run of one epoch on two plates of eight wells of three sites."""
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


def test_audit_run_includes_untrained_network(trained, tmp_path, capsys):
    out = tmp_path / "audit"
    assert run("audit", "--run", trained, "--untrained", "--out", out, "--replicates", 100) == 0
    result = json.loads((out / "audit.json").read_text())
    assert list(result["splits"]) == ["well"] and result["model"] == "model"
    by_site = result["splits"]["well"]["levels"]["site"]
    scores = json.loads((trained / "evaluation" / "scores.json").read_text())["levels"]["site"][
        "model"
    ]
    assert by_site["model"]["scores"]["accuracy"]["value"] == pytest.approx(
        scores["accuracy"]["value"]
    )
    assert {"untrained network", "intensity", "cell count", "all technical"} <= set(by_site)
    assert "labels shuffled" not in by_site
    assert "`perturbjax train --split plate`" in result["refused"]["plate"] or "one layout" in str(
        result
    )
    assert "untrained" in capsys.readouterr().out


def test_audit_run_requires_evaluation(trained, tmp_path, capsys):
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
def test_audit_train_trains_every_fold_once(trained, tmp_path, capsys):
    out = tmp_path / "audit"
    bare = tmp_path / "bare"  # without evaluation; only the recipe is needed
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("evaluation"))
    command = ("audit", "--run", bare, "--train", "--out", out, "--folds", 2, "--replicates", 100)
    assert run(*command) == 0
    result = json.loads((out / "audit.json").read_text())
    assert {"site", "well", "plate"} <= set(result["splits"]) and result["model"] == "masked_cnn"
    for policy, split in result["splits"].items():
        assert (split["overlap"]["well"] > 0) == (policy == "site")
        assert {"masked_cnn", "intensity", "all technical"} <= set(split["levels"]["site"])
    assert result["differences"] and (out / "runs" / "plate_1" / "checkpoints").is_dir()
    for fold in (0, 1):
        assert set(
            read_predictions(out / "runs" / f"plate_{fold}.predictions.parquet")["part"]
        ) == {"test"}
    capsys.readouterr()
    assert run(*command) == 0
    assert json.loads((out / "audit.json").read_text()) == result
    assert "train loss" not in capsys.readouterr().err


def test_audit_train_requires_run(tmp_path, capsys):
    assert run("audit", "--data", tmp_path, "--train", "--out", tmp_path / "audit") == 2
    assert "--train True: must be used with --run" in capsys.readouterr().err
