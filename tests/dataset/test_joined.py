"""Several datasets can be opened as one for training, evaluation and features."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from published import write_resnet18

from perturbjax.cli import actions, parse_command
from perturbjax.core.config import AugmentConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.dataset import SitePixels, open_dataset, write_dataset

pytestmark = pytest.mark.full


def plate(
    path: Path,
    name: str,
    channels: tuple[str, ...] = ("DNA",),
    dtype=np.uint16,
    more: str = "",
    **facts,
) -> Path:
    """One plate of eight wells with two sites each; plates share one class."""
    rng = np.random.default_rng(len(name))
    labels = ["DMSO", "taxol"] if name == "P1" else ["AZ", "DMSO"]
    table = pd.DataFrame(
        {
            "site_id": [f"{name}_{k}" for k in range(16)],
            "Metadata_Plate": name,
            "Metadata_Well": [f"A{k // 2 + 1:02d}" for k in range(16)],
            "Metadata_Site": [str(k % 2) for k in range(16)],
            "Metadata_pert_iname": [labels[k // 2 % 2] for k in range(16)],
        }
    )
    if more:
        table[more] = "x"
    images = rng.integers(0, 250, (16, 16, 16, len(channels))).astype(dtype)
    sites = (SitePixels(image, np.ones((16, 16), np.uint16)) for image in images)
    facts = {
        "channel_names": channels,
        "image_dtype": dtype,
        "label_column": "Metadata_pert_iname",
        **facts,
    }
    return write_dataset(path / name, table, sites, **facts)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    return plate(folder, "P1"), plate(folder, "P2", more="Metadata_more")


def test_joined_dataset_concatenates_records(two):
    joined = open_dataset(two)
    parts = [open_dataset(path) for path in two]
    assert len(joined) == 32 and joined.image_size == (16, 16) and joined.channel_names == ["DNA"]
    images, _ = joined.read([0, 15, 16, 31])
    for image, (part, position) in zip(images, ((0, 0), (0, 15), (1, 0), (1, 15)), strict=True):
        np.testing.assert_array_equal(image, parts[part].pixels(position)[0])
    assert joined.record(16)["site_id"] == b"P2_0" and joined[-1]["site_id"] == "P2_15"
    assert "Metadata_more" not in joined.index.columns
    classes = joined.index.groupby("Metadata_pert_iname")["label"].unique().map(list).to_dict()
    assert classes == {"AZ": [0], "DMSO": [1], "taxol": [2]}
    again = pickle.loads(pickle.dumps(joined))
    np.testing.assert_array_equal(again.pixels(17)[0], joined.pixels(17)[0])


def test_joined_fingerprint_depends_on_order(two):
    first, reversed_order = open_dataset(two), open_dataset(two[::-1])
    assert (
        first.fingerprint != reversed_order.fingerprint
        and first.index_sha256 != reversed_order.index_sha256
    )
    assert open_dataset(two[:1]).fingerprint == open_dataset(two[0]).fingerprint


def test_incompatible_datasets_are_rejected(two, tmp_path):
    with pytest.raises(
        InputError,
        match=r"has channels DNA, .* has DNA, Actin\. Pass datasets with the same channels",
    ):
        open_dataset([two[0], plate(tmp_path, "P3", ("DNA", "Actin"))])
    with pytest.raises(InputError, match=r"has pixel type uint16, .* has uint8"):
        open_dataset([two[0], plate(tmp_path, "P4", dtype=np.uint8)])
    with pytest.raises(InputError, match="site 'P1_0' occurs in two of"):
        open_dataset([two[0], plate(tmp_path, "P1")])
    with pytest.raises(InputError, match="no such dataset directory"):
        open_dataset([two[0], tmp_path / "nowhere"])


def test_training_evaluation_and_features_use_joined_datasets(two, tmp_path):
    from perturbjax.cli.evaluate import (
        ApplyConfig,
        EvaluateConfig,
        PredictConfig,
        evaluate,
        predict,
    )
    from perturbjax.profiles.extract import FeaturesConfig, extract
    from perturbjax.training.checkpoint import CheckpointConfig
    from perturbjax.training.fit import TrainConfig, fit
    from perturbjax.training.run_directory import open_run

    recipe = Recipe(
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=8),
        split=SplitConfig(split="well", folds=3),
    )
    run = fit(TrainConfig(out=tmp_path / "run", data=two, recipe=recipe)).path
    assert open_run(run).data == tuple(path.absolute() for path in two)
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run), batch_size=8), replicates=20))
    predictions = pd.read_parquet(run / "evaluation" / "predictions.parquet")
    assert len(predictions) == 32 and "prob_AZ" in predictions
    table = extract(FeaturesConfig(data=two, out=tmp_path / "f.parquet", run=run, batch_size=8))
    assert set(pd.read_parquet(table)["Metadata_Plate"]) == {"P1", "P2"}
    both = predict(
        PredictConfig(
            ApplyConfig(CheckpointConfig(run), batch_size=8), two, tmp_path / "both.parquet"
        )
    )
    single = predict(
        PredictConfig(
            ApplyConfig(CheckpointConfig(run), batch_size=8), two[1:], tmp_path / "p2.parquet"
        )
    )
    predicted = pd.read_parquet(both)
    assert predicted["site_id"].tolist() == open_dataset(two).index["site_id"].tolist()
    pd.testing.assert_frame_equal(
        predicted[16:].filter(like="prob_").reset_index(drop=True),
        pd.read_parquet(single).filter(like="prob_"),
    )
    with pytest.raises(InputError, match="already contains another run"):
        fit(TrainConfig(out=run, data=two[:1], recipe=recipe))


def test_classify_pools_joined_datasets(two, tmp_path):
    weights = write_resnet18(tmp_path / "resnet18.safetensors")
    words = ["--preset", "linear", "--split", "well", "--folds", "3"]

    def run(*more: object) -> None:
        flags = [*words, "--out", str(tmp_path / "out"), *map(str, more)]
        options = parse_command("classify", flags)
        source = dataclasses.replace(
            options.profiles.source,
            backbone="resnet18",
            weights=str(weights),
            feature_cache=str(tmp_path / "cache"),
        )
        profiles = dataclasses.replace(options.profiles, source=source)
        actions.classify(dataclasses.replace(options, profiles=profiles, replicates=20))

    run("--data", *two)
    manifest = pd.read_parquet(tmp_path / "out" / "split.parquet")
    assert manifest["site_id"].str[:2].nunique() == 2 and len(manifest) == 32
    other = plate(tmp_path, "P3", label_column="")
    with pytest.raises(InputError, match="--label-column: is required"):
        run("--data", two[0], other)


@pytest.mark.slow
def test_cells_of_both_are_measured_by_several_processes(two, tmp_path):
    pytest.importorskip("cp_measure")
    from perturbjax.profiles.extract import FeaturesConfig, extract

    out = extract(
        FeaturesConfig(two, tmp_path / "cells.parquet", backbone="cellprofiler", workers=2)
    )
    assert (
        pd.read_parquet(out)["Metadata_site_id"].tolist()
        == open_dataset(two).index["site_id"].tolist()
    )
