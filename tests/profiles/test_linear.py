"""Linear baseline on a dataset: cached features, and the same evaluation as networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from published import write_resnet18
from tiny_dataset import write_dataset

from perturbjax.cli import evaluate as apply
from perturbjax.cli.evaluate import ApplyConfig, EvaluateConfig
from perturbjax.core.config import Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.data.splits import fingerprint, make_split, write_split
from perturbjax.dataset import open_dataset
from perturbjax.profiles import feature_cache
from perturbjax.profiles.classify import classify
from perturbjax.profiles.profile_options import (
    CLASSIFY_PRESETS,
    ClassifyConfig,
    ProfileConfig,
    SourceConfig,
)
from perturbjax.training import run_directory as runs
from perturbjax.training.checkpoint import CheckpointConfig

Config = Callable[[Path], ClassifyConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("data") / "cells", sites=48, size=24, channels=["DNA", "Actin"]
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def linear(data: Path, cache: Path, tmp_path_factory) -> Config:
    """Return the settings of `--preset linear`, with a small network, for an output folder."""
    weights = write_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.safetensors")
    preset = dict(CLASSIFY_PRESETS["linear"])
    source = SourceConfig(
        (data,),
        backbone="resnet18",
        weights=str(weights),
        feature_cache=str(cache),
        **preset.pop("source"),
    )
    return lambda out: ClassifyConfig(ProfileConfig(source=source), out, replicates=20, **preset)


@pytest.fixture(scope="module")
def evaluated(linear: Config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "linear"
    classify(linear(out))
    return out


def test_linear_baseline_is_compared_with_every_baseline(evaluated: Path) -> None:
    table = pd.read_csv(evaluated / "table.csv")
    assert set(table.loc[~table["baseline"], "model"]) == {"logistic_balanced"}
    assert {"majority", "position", "cell count", "intensity"} <= set(table["model"])
    config = json.loads((evaluated / "config.json").read_text())
    assert config["preparation"]["pca"] == 256 and config["profiles"]["source"]["statistics"]


def test_features_are_cached_and_damaged_files_replaced(
    linear: Config,
    cache: Path,
    evaluated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (file,) = cache.glob("*.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "extract", lambda config: pytest.fail("not cached"))
        classify(linear(tmp_path / "second"))
    messages = capsys.readouterr().err
    assert "from the cache" in messages
    assert "relative to the plate's negative controls: added" in messages
    predictions = (
        pd.read_parquet(next(out.glob("predictions/*.parquet")))
        for out in (evaluated, tmp_path / "second")
    )
    pd.testing.assert_frame_equal(*predictions)
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:1000])
    classify(linear(tmp_path / "third"))
    assert file.stat().st_size == whole


@pytest.mark.parametrize(
    ("source", "profiles", "message"),
    [
        ({"backbone": "vgg"}, {}, r"--backbone vgg: unknown \(available: resnet18"),
        ({"weights": "package:vgg"}, {}, "--weights package:vgg: unknown"),
        ({}, {"label_column": "Metadata_week"}, "no column 'Metadata_week'"),
    ],
)
def test_bad_input_is_reported_before_writing(
    linear: Config, tmp_path: Path, source: dict, profiles: dict, message: str
) -> None:
    config = linear(tmp_path / "out")
    changed = replace(config.profiles, source=replace(config.profiles.source, **source), **profiles)
    with pytest.raises(InputError, match=message):
        classify(replace(config, profiles=changed))
    assert not (tmp_path / "out").exists()


def test_find_weights_defaults_to_published_weights() -> None:
    assert feature_cache.find_weights(SourceConfig()) == "package:efficientnet_lite0"
    assert feature_cache.find_weights(SourceConfig(backbone="efficientnet_b0")).startswith("hf:")
    assert feature_cache.find_weights(SourceConfig(backbone="resnet50", weights="w.pth")) == "w.pth"


def test_profile_config_requires_features_or_data() -> None:
    with pytest.raises(InputError, match="--features, --data: "):
        ProfileConfig()


def test_evaluate_names_the_linear_baseline(
    data: Path, linear: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the baseline is fitted, `evaluate` prints its command; afterwards, its scores."""
    out = tmp_path / "run"
    manifest = make_split(open_dataset(data).index, "well", label="Metadata_pert_iname")
    write_split(manifest, out / "split.parquet")
    facts = {"label_column": "Metadata_pert_iname", "split_fingerprint": fingerprint(manifest)}
    monkeypatch.setattr(
        apply, "open_run", lambda path: runs.Run(path, Recipe(), (data,), ["DMSO", "taxol"], facts)
    )
    config = EvaluateConfig(ApplyConfig(CheckpointConfig(out)))
    command = apply.describe_linear_baseline(config).partition(": ")[2].split()[1:]
    assert command[:3] == ["classify", "--preset", "linear"]
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    split = SplitConfig(split_file=flags["--split-file"])
    classify(replace(linear(Path(flags["--out"])), split=split))
    assert "accuracy 0." in apply.describe_linear_baseline(config)
