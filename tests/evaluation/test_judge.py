"""The judge writes what it measured, and refuses predictions that do not belong to the test part."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from perturbjax.console import InputError
from perturbjax.evaluation.judge import evaluate_predictions, print_table
from perturbjax.evaluation.scores import METRICS, score

from .conftest import CLASSES, make_index, make_predictions


def judge(screen, tmp_path, **changes):
    train, test, predictions = screen
    options = {"train_index": train, "test_index": test, "class_names": CLASSES, "split_policy": "plate",
               "out": tmp_path, "replicates": 200, **changes}  # fmt: skip
    return evaluate_predictions(options.pop("predictions", predictions), **options)


def test_the_model_stands_beside_every_baseline_at_both_levels(screen, tmp_path):
    result = judge(screen, tmp_path)
    for level in ("site", "well"):
        assert set(result["levels"][level]) == {"model", "majority", "position", "cell count", "chance"}
        assert set(result["leads"][level]) == {"majority", "position", "cell count", "chance"}
        for scores in result["levels"][level].values():
            assert set(scores) == set(METRICS)
    assert result["n"] == {"site": 72, "well": 24, "plate": 1, "train_site": 144, "classes": 8, "test_classes": 8}
    assert (
        result["levels"]["well"]["model"]["accuracy"]["value"] > result["levels"]["site"]["model"]["accuracy"]["value"]
    )


def test_site_scores_are_the_plain_scores_of_the_predictions(screen, tmp_path):
    _, test, predictions = screen
    labels = test["label"].map({name: i for i, name in enumerate(CLASSES)}).to_numpy()
    plain = score(labels, predictions[[f"prob_{name}" for name in CLASSES]].to_numpy())
    found = judge(screen, tmp_path)["levels"]["site"]["model"]
    assert {metric: found[metric]["value"] for metric in METRICS} == pytest.approx(plain)


def test_resampling_plates_widens_intervals_where_plates_differ(tmp_path):
    """The model knows one of the four test plates by heart and guesses on the others."""
    index = make_index(plates=6)
    test = index[~index["Metadata_Plate"].isin(["P0", "P1"])].reset_index(drop=True)
    guesses, knows = make_predictions(test, skill=0), make_predictions(test, skill=50)
    predictions = guesses.where(test["Metadata_Plate"] != "P2", knows)
    screen = (index[index["Metadata_Plate"].isin(["P0", "P1"])], test, predictions)
    width = {}
    for resample in ("well", "plate"):
        result = judge(screen, tmp_path, resample=resample, replicates=500)
        accuracy = result["levels"]["well"]["model"]["accuracy"]
        width[resample] = accuracy["high"] - accuracy["low"]
    assert width["plate"] > 2 * width["well"]


def test_the_order_of_the_predictions_does_not_matter(screen, tmp_path):
    _, _, predictions = screen
    shuffled = predictions.sample(frac=1, random_state=0)
    assert judge(screen, tmp_path) == judge(screen, tmp_path, predictions=shuffled)


def test_the_files_hold_what_was_returned(screen, tmp_path):
    result = judge(screen, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    tidy = pd.read_csv(tmp_path / "scores.csv").set_index(["level", "subject", "metric"])
    row = tidy.loc[("well", "model", "macro_f1")]
    assert row["value"] == pytest.approx(result["levels"]["well"]["model"]["macro_f1"]["value"])
    assert row["n"] == 24
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="true")
    assert list(confusion.index) == list(confusion.columns) == CLASSES
    assert confusion.to_numpy().sum() == 72
    per_class = pd.read_csv(tmp_path / "per_class.csv").set_index("class")
    assert per_class.loc["DMSO", ["sites", "wells"]].tolist() == [9, 3]


def test_predictions_of_training_sites_are_scored_apart(screen, tmp_path):
    train, _, predictions = screen
    both = pd.concat([make_predictions(train, skill=50, part="train"), predictions])
    result = judge(screen, tmp_path, predictions=both)
    assert result["train"]["accuracy"] == 1.0
    assert result["levels"] == judge(screen, tmp_path)["levels"]


def test_wells_of_several_labels_have_no_well_level(screen, tmp_path):
    predictions = screen[2]
    predictions = predictions.assign(label=["DMSO", *predictions["label"].iloc[1:]])
    predictions.loc[1:2, "label"] = "compound A"
    result = judge(screen, tmp_path, predictions=predictions)
    assert set(result["levels"]) == {"site"}
    assert "different labels" in result["skipped"]["well level"]


def test_a_missing_baseline_says_why(screen, tmp_path):
    result = judge(screen, tmp_path, train_index=screen[0].drop(columns="n_cells"))
    assert "n_cells" in result["skipped"]["cell count"]
    assert "cell count" not in result["levels"]["site"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.iloc[1:], "none for test site P2_A01_0"),
        (lambda p: pd.concat([p, p.iloc[:1]]), "P2_A01_0 occurs more than once"),
        (lambda p: pd.concat([p, p.iloc[:1].assign(site_id="elsewhere")]), "elsewhere is not in the test part"),
        (lambda p: p.assign(label="aspirin"), "label 'aspirin' is not one of the run's 8 classes"),
        (lambda p: p.drop(columns="prob_DMSO"), "no column 'prob_DMSO'"),
        (lambda p: p.assign(prob_DMSO=np.nan), "P2_A01_0: its probabilities are not all finite"),
        (lambda p: p.assign(part="train"), "none for test site"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_in_one_line(screen, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        judge(screen, tmp_path, predictions=change(screen[2]))
    assert not list(tmp_path.iterdir())


def test_an_index_without_plates_or_training_labels_is_refused(screen, tmp_path):
    train, test, _ = screen
    with pytest.raises(InputError, match="test_index: no column 'Metadata_Plate'"):
        judge(screen, tmp_path, test_index=test.drop(columns="Metadata_Plate"))
    with pytest.raises(InputError, match="train_index: no column 'label'"):
        judge(screen, tmp_path, train_index=train.drop(columns="label"))


def test_the_table_shows_numbers_baselines_and_warnings(screen, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    index = make_index()
    held = index["Metadata_Site"] == "0"
    train, test = index[~held], index[held]
    result = judge(screen, tmp_path, train_index=train, test_index=test, split_policy="site",
                   predictions=make_predictions(test, skill=1.0))  # fmt: skip
    print_table(result)
    shown = capsys.readouterr().out
    best = result["levels"]["well"]["model"]["balanced_accuracy"]
    assert f"{best['value']:.3f} [{best['low']:.2f}, {best['high']:.2f}]" in shown
    for word in ("majority", "chance", "position", "cell count", "72 sites", "which well, not which treatment"):
        assert word in " ".join(shown.split())
