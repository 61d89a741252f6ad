"""`evaluate --predictions`: keys, training sites, true classes, files and messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import LABEL, write_dataset

from perturbjax import cli
from perturbjax.cli import actions
from perturbjax.cli.evaluate import evaluate_table
from perturbjax.data.splits import make_split, write_split
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.conclusions import advice, verdict
from perturbjax.evaluation.evaluate import evaluate_predictions, match_run_predictions
from perturbjax.evaluation.evaluation_result import (
    UNKNOWN_TRAINING,
    describe_test_set,
    read_evaluation,
    to_json,
)
from perturbjax.evaluation.external_predictions import match_external_predictions
from perturbjax.evaluation.predictions import predictions_table

CLASSES = ["DMSO", "taxol"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """90 sites, 30 wells, four plates."""
    path = tmp_path_factory.mktemp("external") / "data"
    return open_dataset(write_dataset(path, sites=90, size=16, channels=["DNA"]))


@pytest.fixture(scope="module")
def table(dataset) -> pd.DataFrame:
    """Predictions of all sites as `predict` writes them, split by plate."""
    rng = np.random.default_rng(0)
    taxol = (dataset.index[LABEL] == "taxol").to_numpy()
    first = np.clip(rng.uniform(0.2, 1, len(dataset)), 0, 1).astype(np.float32)
    probabilities = np.where(taxol[:, None], np.stack([1 - first, first], 1), 0)
    probabilities += np.where(~taxol[:, None], np.stack([first, 1 - first], 1), 0)
    part = np.where(dataset.index["Metadata_Plate"] == "P3", "test", "train")
    return predictions_table(
        dataset.index, probabilities, CLASSES, part=part, label=dataset.index[LABEL]
    )


@pytest.fixture
def error_line(capsys) -> Callable[..., str]:
    """Return a function that runs a command and returns its error line."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert end.value.code == 2 and len(errors) == 1
        return errors[0]

    return run


def evaluate(path: Path, dataset: Dataset, table: pd.DataFrame, split: Path | None = None):
    """Write a table and match it with the dataset."""
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return match_external_predictions(path, dataset, split)


def test_table_of_a_run_gives_the_scores_of_the_run(dataset, table, tmp_path, error_line):
    """The page and all tables are written; wrong labels in the table have no effect."""
    rows = dataset.index.assign(label=dataset.index[LABEL])
    part = table["part"].to_numpy()
    train, test = (rows[part == one].reset_index(drop=True) for one in ("train", "test"))
    model, fold = match_run_predictions(table, train, test, CLASSES)
    expected = to_json(evaluate_predictions([model], [fold], CLASSES, split="plate", replicates=50))

    table.assign(label="taxol").to_csv(tmp_path / "p.csv", index=False)
    out = tmp_path / "out"
    words = ["evaluate", "--predictions", str(tmp_path / "p.csv"), "--data", str(dataset.path)]
    words += ["--out", str(out), "--replicates", "50"]
    options = cli.parse_command("evaluate", words[1:])
    evaluate_table(options)
    actions.evaluate(options)  # replaces results of predictions
    scores = json.loads((out / "evaluation" / "scores.json").read_text())
    assert scores == json.loads(json.dumps(expected))
    page = (out / "report.html").read_text()
    assert "on held-out plates" in page and "training sites from column part" in page
    assert set(pd.read_parquet(out / "evaluation" / "predictions.parquet")["label"]) == {*CLASSES}
    line = error_line(*words[:5], "--out", str(dataset.path))
    assert "is a dataset directory" in line and "choose a new folder" in line


def test_keys_are_site_ids_positions_or_wells(dataset, table, tmp_path):
    by_id = evaluate(tmp_path / "a.parquet", dataset, table.sample(frac=1, random_state=0))
    positions = table.drop(columns=["site_id"]).rename(
        columns={"Metadata_Plate": "Plate", "Metadata_Well": "well", "Metadata_Site": "site"}
    )
    positions["well"] = positions["well"].str.replace("A0", "a")
    positions["site"] = "0" + positions["site"]
    by_position = evaluate(tmp_path / "b.csv", dataset, positions)
    for one, other in zip(by_id.model.test, by_position.model.test, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    pd.testing.assert_frame_equal(by_id.folds[0].test, by_position.folds[0].test)

    wells = table.groupby(["Metadata_Plate", "Metadata_Well", "part"], as_index=False)[
        ["prob_DMSO", "prob_taxol"]
    ].mean()
    by_well = evaluate(tmp_path / "c.csv", dataset, wells)
    (values,) = by_well.model.test
    assert len(values) == len(by_id.model.test[0])
    assert (values.reshape(-1, 3, 2) == values.reshape(-1, 3, 2)[:, :1]).all()


def test_training_sites_follow_the_documented_rules(dataset, table, tmp_path):
    sites = table.drop(columns="part")
    manifest = make_split(dataset.index, "well", label=LABEL, folds=3)
    write_split(manifest, tmp_path / "split.parquet")
    split = evaluate(tmp_path / "p.csv", dataset, sites, tmp_path / "split.parquet")
    assert split.split == "well" and len(split.model.train[0]) == 60

    few = sites[sites["Metadata_Plate"].isin(["P0", "P1"])].iloc[1:]
    rest = evaluate(tmp_path / "p.csv", dataset, few)
    assert rest.split == UNKNOWN_TRAINING and len(rest.folds) == 1
    # Two plates without predictions; site 0 is in a predicted well.
    assert len(rest.folds[0].train) == 42 and "42 labelled sites of wells" in rest.note

    crossed = evaluate(tmp_path / "p.csv", dataset, sites)
    assert crossed.split == UNKNOWN_TRAINING and len(crossed.folds) == 5
    tested = pd.concat([fold.test for fold in crossed.folds])["site_id"]
    assert sorted(tested) == sorted(dataset.index["site_id"])
    for fold in crossed.folds:
        assert not set(fold.train["site_id"]) & set(fold.test["site_id"])


def test_unknown_training_sites_are_reported(dataset, table, tmp_path):
    table.drop(columns="part").to_parquet(tmp_path / "p.parquet")
    words = ["--predictions", str(tmp_path / "p.parquet"), "--data", str(dataset.path)]
    words += ["--out", str(tmp_path / "out"), "--replicates", "20"]
    evaluate_table(cli.parse_command("evaluate", words))
    scores = read_evaluation(tmp_path / "out" / "evaluation" / "scores.json")
    assert "Training sites of the model are unknown" in describe_test_set(scores)
    assert "trained on none of these wells" in scores.warnings()[0]
    assert "on the predicted sites" in verdict(scores) and "`part`" in advice(scores, None)


def double_row(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table.iloc[:1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace({"site_id": {"site3": "site_x"}}), "site 'site_x' is not in"),
        (double_row, "site 'site0' occurs twice"),
        (lambda t: t.drop(columns="prob_taxol"), "no column 'prob_taxol', although 'taxol' is"),
        (lambda t: t.drop(columns=["prob_taxol", "prob_DMSO"]), "add prob_<class>"),
        (lambda t: t.assign(prob_taxol=t["prob_taxol"] + 0.1), "do not sum to 1; correct"),
        (lambda t: t.assign(prob_taxol="high"), "are not all finite"),
        (lambda t: t.assign(prob_taxol=np.nan), "are not all finite"),
        (lambda t: t.assign(part="held out"), "part 'held out' is unknown"),
        (lambda t: t.assign(part="train"), "no sites to evaluate"),
        (lambda t: t.drop(columns=["site_id", "Metadata_Well"]), "no column Metadata_Well"),
    ],
)
def test_invalid_tables_give_one_line(dataset, table, tmp_path, change, message, error_line):
    path = tmp_path / "p.csv"
    change(table).to_csv(path, index=False)
    words = ["evaluate", "--predictions", str(path), "--data", str(dataset.path)]
    line = error_line(*words, "--out", str(tmp_path / "out"))
    assert message in line and str(path) in line
    assert not (tmp_path / "out").exists()


def test_split_file_must_agree_with_the_table(dataset, table, tmp_path, error_line):
    manifest = make_split(dataset.index, "well", label=LABEL, folds=3)
    write_split(manifest, tmp_path / "split.parquet")
    table.to_csv(tmp_path / "p.csv", index=False)
    words = ["evaluate", "--data", str(dataset.path), "--out", str(tmp_path / "out")]
    words += ["--predictions", str(tmp_path / "p.csv"), str(tmp_path / "split.parquet")]
    assert "are training sites in the table" in error_line(*words)
    test = table["site_id"].isin(manifest["site_id"][manifest["part"] == "test"])
    table[~test].to_csv(tmp_path / "p.csv", index=False)
    assert "30 test sites" in (line := error_line(*words)) and "no prediction" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--run is missing: pass a run directory, or --predictions"),
        ("--run r --predictions p.csv --data d --out o", "used in place of --run"),
        ("--predictions p.csv --out o", "--predictions: needs --data DATASET and --out DIR"),
        ("--run r --out o", "--out: is used with --predictions"),
        ("--predictions p s t --data d --out o", "a table, or a table and a split file"),
    ],
)
def test_flags_of_runs_and_tables_are_not_mixed(error_line, words, message):
    assert message in error_line("evaluate", *words.split())
