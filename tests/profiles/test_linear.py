"""The linear baseline from a dataset directory: features extracted once, and judged as networks are."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from published import write_resnet18
from tiny_dataset import write_dataset

from perturbjax.cli import main
from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.data.splits import fingerprint, make_split, write_split
from perturbjax.dataset import open_dataset
from perturbjax.evaluation import apply
from perturbjax.evaluation.apply import ApplyConfig, EvaluateConfig
from perturbjax.profiles import feature_cache as kept
from perturbjax.profiles.profile_options import ProfileConfig, SourceConfig
from perturbjax.training import run_directory as runs
from perturbjax.training.checkpoint import CheckpointConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("data") / "cells", sites=48, size=24, channels=["DNA", "Actin"]
    )


@pytest.fixture(scope="module")
def words(data: Path, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    weights = write_resnet18(folder / "resnet18.safetensors")
    source = [
        "--data",
        data,
        "--backbone",
        "resnet18",
        "--weights",
        weights,
        "--feature-cache",
        folder / "cache",
    ]
    return ["classify", "--preset", "linear", *map(str, source), "--replicates", "20"]


def run(*words: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(word) for word in words])


@pytest.fixture(scope="module")
def judged(words: list[str], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "linear"
    run(*words, "--out", out)
    return out


def test_it_is_judged_beside_every_baseline(judged: Path) -> None:
    table = pd.read_csv(judged / "table.csv")
    assert set(table.loc[~table["baseline"], "model"]) == {"logistic_balanced"}
    assert {"majority", "position", "cell count", "intensity"} <= set(table["model"])
    config = json.loads((judged / "config.json").read_text())
    assert config["preparation"]["pca"] == 256 and config["profiles"]["source"]["statistics"]


def test_features_are_extracted_once_and_damaged_ones_again(
    words: list[str],
    judged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    cache = Path(words[words.index("--feature-cache") + 1])
    (file,) = cache.glob("*.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(kept, "extract", lambda config: pytest.fail("extracted again"))
        run(*words, "--out", tmp_path / "again")
    assert "as kept in" in capsys.readouterr().err
    said = (
        pd.read_parquet(next(out.glob("predictions/*.parquet")))
        for out in (judged, tmp_path / "again")
    )
    pd.testing.assert_frame_equal(*said)
    file.write_bytes(file.read_bytes()[:1000])
    run(*words, "--out", tmp_path / "anew")
    assert kept._holds(file, 48)


def test_what_may_be_relative_to_what_is_said(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(*words, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "relative to the plate" in said and "holds 0 negative controls, fewer than 4" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--features", "f.parquet"], "--features, --data: give one of the two"),
        (["--backbone", "vgg"], "--backbone vgg: unknown; choose one of resnet18"),
        (["--weights", "package:vgg"], "--weights package:vgg: unknown"),
        (["--preset", "quadratic"], "--preset"),
        (["--relative", "week"], "--relative"),
        (["--label-column", "Metadata_week"], "no column 'Metadata_week'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], says: str
) -> None:
    rest = words[:1] + words[3:] if "--preset" in flags else words
    with pytest.raises(SystemExit, match="2"):
        main([*rest, "--out", str(tmp_path / "out"), *flags])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and says in said
    assert not (tmp_path / "out").exists()


def test_weights_that_are_known_for_a_backbone_need_no_flag() -> None:
    assert kept.weights_of(SourceConfig()) == "package:efficientnet_lite0"
    assert kept.weights_of(SourceConfig(backbone="efficientnet_b0")).startswith("hf:")
    assert kept.weights_of(SourceConfig(backbone="resnet50", weights="w.pth")) == "w.pth"


def test_neither_tables_nor_a_dataset_is_one_line() -> None:
    with pytest.raises(InputError, match="--features, --data: give one of the two"):
        ProfileConfig()


def test_evaluate_names_the_baseline_until_it_was_tried_on_the_run_s_split(
    data: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    manifest = make_split(open_dataset(data).index, "well", label="Metadata_pert_iname")
    write_split(manifest, out / "split.parquet")
    facts = {"label_column": "Metadata_pert_iname", "split_fingerprint": fingerprint(manifest)}
    monkeypatch.setattr(
        apply, "open_run", lambda path: runs.Run(path, Recipe(), (data,), ["DMSO", "taxol"], facts)
    )
    config = EvaluateConfig(ApplyConfig(CheckpointConfig(out)))
    said = apply.describe_linear_baseline(config)
    command = said.partition(": ")[2].split()[1:]
    assert command[:3] == ["classify", "--preset", "linear"]
    run(*command, *words[words.index("--backbone") :])
    assert (
        "the linear baseline on this split, by site: accuracy 0."
        in apply.describe_linear_baseline(config)
    )
