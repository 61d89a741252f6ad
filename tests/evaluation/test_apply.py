"""A run applied to data: what is known of the sites is asked for before anything is computed, and only if needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from perturbjax.core.config import AugmentConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.evaluation import apply
from perturbjax.evaluation.apply import (
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

SITES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("apply")


@pytest.fixture(scope="module")
def data(folder) -> Path:
    return write_dataset(folder / "data", sites=SITES, size=24, channels=["DNA"])


@pytest.fixture(scope="module")
def unlabelled(folder) -> Path:
    return write_dataset(
        folder / "unlabelled", sites=SITES, size=24, channels=["DNA"], label_column=""
    )


@pytest.fixture(scope="module")
def judged(folder, data) -> Path:
    """A run of one epoch that was evaluated."""
    recipe = Recipe(
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=8),
        split=SplitConfig(split="well", folds=3),
    )
    path = fit(TrainConfig(out=folder / "run", data=(data,), recipe=recipe)).path
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(path), batch_size=8), replicates=20))
    return path


@pytest.fixture
def run(judged, tmp_path) -> Path:
    """That run before it was evaluated."""
    copy = shutil.copytree(judged, tmp_path / "run")
    shutil.rmtree(copy / "evaluation")
    return Path(copy)


@pytest.fixture
def no_forward_pass(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was applied")

    monkeypatch.setattr(apply, "network_of", refuse)


def predicted(run: Path, data: Path, out: Path) -> pd.DataFrame:
    predict(PredictConfig(ApplyConfig(CheckpointConfig(run), batch_size=8), (data,), out))
    return pd.read_parquet(out) if out.suffix == ".parquet" else pd.read_csv(out)


def test_the_suffix_says_how_predictions_are_written(judged, data, tmp_path):
    binary, text = (
        predicted(judged, data, tmp_path / f"p{suffix}") for suffix in (".parquet", ".csv")
    )
    assert (tmp_path / "p.csv").read_text().startswith("Metadata_Plate,")
    pd.testing.assert_frame_equal(
        text.astype({"Metadata_Site": str}), binary, check_dtype=False, rtol=1e-6
    )


def test_sites_without_labels_are_predicted_like_others(judged, data, unlabelled, tmp_path):
    assert "Metadata_pert_iname" not in open_dataset(unlabelled).index
    known, unknown = (
        predicted(judged, path, tmp_path / "p.parquet") for path in (data, unlabelled)
    )
    assert set(unknown["label"]) == {""} and set(known["label"]) == {"DMSO", "taxol"}
    probabilities = [name for name in known if name.startswith("prob_")]
    assert np.array_equal(unknown[probabilities], known[probabilities])


def test_nothing_is_trained_on_or_judged_by_sites_without_labels(
    run, unlabelled, tmp_path, no_forward_pass
):
    with pytest.raises(InputError, match="was built without labels"):
        fit(TrainConfig(out=tmp_path / "other", data=(unlabelled,)))
    with pytest.raises(InputError, match="no column 'Metadata_pert_iname'"):
        evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run)), data=(unlabelled,)))
    assert not (tmp_path / "other").exists() and not (run / "evaluation").exists()


def test_labels_that_a_run_does_not_know_are_refused_before_it_is_applied(
    run, folder, no_forward_pass
):
    others = folder / "others"
    if not others.is_dir():
        write_dataset(others, sites=SITES, size=24, channels=["DNA"], compounds=("DMSO", "ALLN"))
    with pytest.raises(InputError, match=r"others: label 'ALLN' is not one of the run's 2 classes"):
        evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run)), data=(others,)))
    assert not (run / "evaluation").exists()


def test_an_evaluation_that_fails_leaves_nothing_half_made(run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("cannot be judged")

    monkeypatch.setattr(apply, "judge", fail)
    with pytest.raises(InputError, match="cannot be judged"):
        evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run), batch_size=8), replicates=20))
    assert not (run / "evaluation").exists()


def test_without_a_look_nothing_of_an_earlier_one_stays(folder, judged):
    run = folder / "again"
    shutil.copytree(judged, run)
    for look in (True, False):
        evaluate(
            EvaluateConfig(
                ApplyConfig(CheckpointConfig(run), batch_size=8), replicates=20, attribution=look
            )
        )
        files = {file.name for file in (run / "evaluation").iterdir()}
        of_look = {"looked.json", "attention.parquet"}
        assert files & of_look == (of_look if look else set()) and "scores.json" in files


def test_without_training_sites_the_judging_ones_are_judged_the_same(run, judged):
    evaluate(
        EvaluateConfig(
            ApplyConfig(CheckpointConfig(run), batch_size=8),
            replicates=20,
            training_sites=False,
            attribution=False,
        )
    )
    asked, all_asked = (
        pd.read_parquet(path / "evaluation" / "predictions.parquet") for path in (run, judged)
    )
    assert set(all_asked["part"]) == {"train", "test"} and 0 < len(asked) < len(all_asked)
    pd.testing.assert_frame_equal(asked, all_asked.query("part == 'test'").reset_index(drop=True))
    assert set(pd.read_parquet(run / "evaluation" / "features.parquet")["Metadata_part"]) == {
        "test"
    }
    scores, all_scores = (
        json.loads((path / "evaluation" / "scores.json").read_text()) for path in (run, judged)
    )
    assert scores["levels"] == all_scores["levels"] and all_scores["train"] and not scores["train"]


def test_a_feature_has_one_name_whichever_command_writes_it(judged, data, tmp_path):
    out = extract(
        FeaturesConfig(data=(data,), out=tmp_path / "f.parquet", run=judged, batch_size=8)
    )
    ours = pd.read_parquet(out).set_index("Metadata_site_id")
    theirs = pd.read_parquet(judged / "evaluation" / "features.parquet").set_index(
        "Metadata_site_id"
    )
    names = [name for name in theirs if not name.startswith("Metadata_")]
    assert (
        names == [name for name in ours if not name.startswith("Metadata_")]
        and names[0] == "attention_0001"
    )
    np.testing.assert_allclose(ours.loc[theirs.index, names], theirs[names], rtol=1e-5, atol=1e-6)


def test_excluded_sites_are_neither_trained_on_nor_judged_and_the_run_says_the_rule(
    folder, data, capsys
):
    rules = folder / "rules.txt"
    rules.write_text("std_DNA<1  # flat\n")
    recipe = Recipe(
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=8),
        split=SplitConfig(split="well", folds=3, exclude=(str(rules),)),
    )
    path = fit(TrainConfig(out=folder / "excluding", data=(data,), recipe=recipe)).path
    assert f"excluded by std_DNA<1: {-(-SITES // 4)} of {SITES} sites" in capsys.readouterr().err
    rules.unlink()  # the run knows the rule, not the file
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(path), batch_size=8), replicates=20))
    flat = open_dataset(data).index.query("std_DNA < 1")["site_id"]
    judged = pd.read_parquet(path / "evaluation" / "predictions.parquet")["site_id"]
    assert len(judged) == SITES - len(flat) and not set(judged) & set(flat)
    assert open_run(path).recipe.split.exclude == ("std_DNA<1",)
