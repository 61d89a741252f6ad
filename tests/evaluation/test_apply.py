"""Commands evaluate and predict: outputs, and checks before computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from perturbjax.cli import evaluate as commands
from perturbjax.cli.evaluate import (
    ApplyConfig,
    EvaluateConfig,
    PredictConfig,
    evaluate,
    predict,
)
from perturbjax.core.config import AugmentConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.evaluation.evaluate import evaluate_predictions
from perturbjax.evaluation.external_predictions import match_external_predictions
from perturbjax.evaluation.prediction_sets import Calibration
from perturbjax.evaluation.run_sets import (
    RunCalibration,
    read_calibration,
    write_calibration,
)
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import open_run

SITES = 30
#: All training sites, with and without excluded ones, so that both trainings have one program.
BATCH = 24


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
def evaluated(folder, data) -> Path:
    """Train and evaluate a run of one epoch."""
    recipe = Recipe(
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=BATCH),
        split=SplitConfig(split="well", folds=3),
    )
    path = fit(TrainConfig(out=folder / "run", data=(data,), recipe=recipe)).path
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(path), batch_size=8), replicates=20))
    return path


@pytest.fixture
def run(evaluated, tmp_path) -> Path:
    """Copy that run without its evaluation."""
    copy = shutil.copytree(evaluated, tmp_path / "run")
    shutil.rmtree(copy / "evaluation")
    return Path(copy)


@pytest.fixture
def no_forward_pass(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was applied")

    monkeypatch.setattr(commands, "open_network", refuse)


def predicted(run: Path, data: Path, out: Path) -> pd.DataFrame:
    predict(PredictConfig(ApplyConfig(CheckpointConfig(run), batch_size=8), (data,), out))
    return pd.read_parquet(out) if out.suffix == ".parquet" else pd.read_csv(out)


def test_predict_writes_format_of_suffix(evaluated, data, tmp_path):
    binary, text = (
        predicted(evaluated, data, tmp_path / f"p{suffix}") for suffix in (".parquet", ".csv")
    )
    assert (tmp_path / "p.csv").read_text().startswith("Metadata_Plate,")
    pd.testing.assert_frame_equal(
        text.astype({"Metadata_Site": str}), binary, check_dtype=False, rtol=1e-6
    )


def test_predict_by_well_averages_sites_and_can_be_evaluated(evaluated, data, tmp_path):
    sites, wells = tmp_path / "sites.parquet", tmp_path / "wells.csv"
    by_site, config = predicted(evaluated, data, sites), ApplyConfig(CheckpointConfig(evaluated))
    predict(PredictConfig(config, (data,), wells, "well"))
    by_well = pd.read_csv(wells)
    assert "site_id" not in by_well and (by_well["Metadata_Site_Count"] == 3).all()
    keys = ["Metadata_Plate", "Metadata_Well"]
    means = by_site.groupby(keys)["prob_taxol"].mean()
    np.testing.assert_allclose(by_well.set_index(keys)["prob_taxol"], means, rtol=1e-5)
    levels = []
    for path in (sites, wells):
        matched = match_external_predictions(path, open_dataset(data))
        scores = evaluate_predictions(
            [matched.model], matched.folds, matched.class_names, split="well", replicates=20
        )
        levels.append({row.name: row.scores["accuracy"].value for row in scores["well"].rows})
    assert levels[0] == levels[1]


def test_predict_works_without_labels(evaluated, data, unlabelled, tmp_path):
    assert "Metadata_pert_iname" not in open_dataset(unlabelled).index
    labelled, without_labels = (
        predicted(evaluated, path, tmp_path / "p.parquet") for path in (data, unlabelled)
    )
    assert set(without_labels["label"]) == {""} and set(labelled["label"]) == {"DMSO", "taxol"}
    probabilities = [name for name in labelled if name.startswith("prob_")]
    assert np.array_equal(without_labels[probabilities], labelled[probabilities])


def test_train_and_evaluate_require_labels(run, unlabelled, tmp_path, no_forward_pass):
    with pytest.raises(InputError, match="was built without labels"):
        fit(TrainConfig(out=tmp_path / "other", data=(unlabelled,)))
    with pytest.raises(InputError, match="no column 'Metadata_pert_iname'"):
        evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run)), data=(unlabelled,)))
    assert not (tmp_path / "other").exists() and not (run / "evaluation").exists()


def test_evaluate_rejects_unknown_labels_before_computation(run, folder, no_forward_pass):
    others = folder / "others"
    if not others.is_dir():
        write_dataset(others, sites=SITES, size=24, channels=["DNA"], compounds=("DMSO", "ALLN"))
    with pytest.raises(InputError, match=r"others: label 'ALLN' is not one of the 2 classes"):
        evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run)), data=(others,)))
    assert not (run / "evaluation").exists()


def test_failed_evaluation_writes_nothing(run, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise InputError("cannot be evaluated")

    monkeypatch.setattr(commands, "evaluate_predictions", fail)
    with pytest.raises(InputError, match="cannot be evaluated"):
        evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run), batch_size=8), replicates=20))
    assert not (run / "evaluation").exists()


def test_evaluate_without_attribution_removes_attribution(folder, evaluated):
    run = folder / "again"
    shutil.copytree(evaluated, run)
    for attribution in (True, False):
        evaluate(
            EvaluateConfig(
                ApplyConfig(CheckpointConfig(run), batch_size=8),
                replicates=20,
                attribution=attribution,
            )
        )
        files = {file.name for file in (run / "evaluation").iterdir()}
        maps = files & {"attribution.json", "attention.parquet"}
        assert len(maps) == 2 * attribution and "scores.json" in files


def test_evaluate_without_training_sites_has_same_test_scores(run, evaluated):
    evaluate(
        EvaluateConfig(
            ApplyConfig(CheckpointConfig(run), batch_size=8),
            replicates=20,
            training_sites=False,
            attribution=False,
        )
    )
    test_only, complete = (
        pd.read_parquet(path / "evaluation" / "predictions.parquet") for path in (run, evaluated)
    )
    assert set(complete["part"]) == {"train", "test"} and 0 < len(test_only) < len(complete)
    pd.testing.assert_frame_equal(
        test_only, complete.query("part == 'test'").reset_index(drop=True)
    )
    assert set(pd.read_parquet(run / "evaluation" / "features.parquet")["Metadata_part"]) == {
        "test"
    }
    scores, all_scores = (
        json.loads((path / "evaluation" / "scores.json").read_text()) for path in (run, evaluated)
    )
    assert scores["levels"] == all_scores["levels"] and all_scores["train"] and not scores["train"]


def test_features_and_evaluate_write_same_feature_names(evaluated, data, tmp_path):
    """The CSV file has the same values."""
    tables = [
        extract(FeaturesConfig(data=(data,), out=tmp_path / name, run=evaluated, batch_size=8))
        for name in ("f.parquet", "f.csv")
    ]
    ours = pd.read_parquet(tables[0])
    text = pd.read_csv(tables[1], dtype=ours.dtypes.to_dict())
    pd.testing.assert_frame_equal(text, ours)
    ours = ours.set_index("Metadata_site_id")
    theirs = pd.read_parquet(evaluated / "evaluation" / "features.parquet").set_index(
        "Metadata_site_id"
    )
    names = [name for name in theirs if not name.startswith("Metadata_")]
    assert (
        names == [name for name in ours if not name.startswith("Metadata_")]
        and names[0] == "attention_0001"
    )
    np.testing.assert_allclose(ours.loc[theirs.index, names], theirs[names], rtol=1e-5, atol=1e-6)


def test_evaluate_excludes_sites_by_rule(folder, data, capsys):
    rules = folder / "rules.txt"
    rules.write_text("std_DNA<1  # flat\n")
    recipe = Recipe(
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=BATCH),
        split=SplitConfig(split="well", folds=3, exclude=(str(rules),)),
    )
    path = fit(TrainConfig(out=folder / "excluding", data=(data,), recipe=recipe)).path
    assert f"excluded by std_DNA<1: {-(-SITES // 4)} of {SITES} sites" in capsys.readouterr().err
    rules.unlink()  # the run stores the rule
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(path), batch_size=8), replicates=20))
    flat = open_dataset(data).index.query("std_DNA < 1")["site_id"]
    used = pd.read_parquet(path / "evaluation" / "predictions.parquet")["site_id"]
    assert len(used) == SITES - len(flat) and not set(used) & set(flat)
    assert open_run(path).recipe.split.exclude == ("std_DNA<1",)


def test_few_wells_give_no_prediction_sets(evaluated, data, tmp_path, capsys):
    scores = json.loads((evaluated / "evaluation" / "scores.json").read_text())
    assert "need 9 calibration wells, there are" in scores["skipped"]["prediction sets"]
    table = predicted(evaluated, data, tmp_path / "p.parquet")
    assert "prediction_set" not in table
    assert "no prediction sets, because the run has too few" in capsys.readouterr().err


def test_predict_uses_the_stored_calibration(run, evaluated, data, folder, tmp_path, capsys):
    """Sets and distances of the run's sites; warnings for images of another size and intensity."""
    out = run / "evaluation"
    out.mkdir()
    reference = read_calibration(open_run(evaluated), epoch=1).reference
    calibration = Calibration(0.6, 1e6, 20, "well")
    write_calibration(out, RunCalibration(1, calibration, reference))
    table = predicted(run, data, tmp_path / "p.parquet")
    assert set(table["prediction_set"]) <= {"DMSO", "taxol", "DMSO | taxol"}
    assert [
        one in members
        for one, members in zip(table["predicted"], table["prediction_set"], strict=True)
    ]
    assert (table["set_size"] == table["prediction_set"].str.count(r"\|") + 1).all()
    assert "warning" not in capsys.readouterr().err

    other = write_dataset(folder / "large", sites=SITES, size=40, channels=["DNA"], maximum=200)
    write_calibration(out, RunCalibration(1, Calibration(0.6, 0.0, 20, "well"), reference))
    table = predicted(run, other, tmp_path / "p.parquet")
    assert set(table["prediction_set"]) == {"none of the known treatments"}
    printed = " ".join(capsys.readouterr().err.split())
    assert "sites of 40 × 40 pixels, but the run was trained on 24 × 24" in printed
    assert "mean intensity of DNA: 73% of the sites are outside the training range" in printed
    assert "100% of the sites are unlike the training images" in printed

    write_calibration(out, RunCalibration(7, calibration, reference))
    assert "prediction_set" not in predicted(run, data, tmp_path / "p.parquet")
    assert "this checkpoint was not evaluated" in capsys.readouterr().err
    (out / "prediction_sets.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"prediction_sets.npz: is damaged"):
        predicted(run, data, tmp_path / "p.parquet")
