"""The judge writes what it measured, and refuses predictions that do not belong to the test part."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.evaluation import baselines, scores
from perturbjax.evaluation.evaluate import (
    Fold,
    ModelPredictions,
    calibration_parts,
    evaluate_predictions,
)
from perturbjax.evaluation.evaluation_result import read_evaluation, to_json
from perturbjax.evaluation.score_tables import print_evaluation, ranking_table
from perturbjax.evaluation.scores import METRICS, Metric, score
from perturbjax.evaluation.wells import well_ids
from perturbjax.report.run_page import write_report

from .conftest import CLASSES, evaluate_run, make_index, make_predictions

BASELINES = {"majority", "chance", "position", "cell count"}


def judge_screen(screen, *, predictions=None, train=None, test=None, **options):
    own = screen[2] if predictions is None else predictions
    return evaluate_run(
        own, screen[0] if train is None else train, screen[1] if test is None else test, **options
    )


def test_the_model_stands_beside_every_baseline_at_both_levels(screen):
    evaluation = judge_screen(screen)
    assert [level.name for level in evaluation.levels] == ["site", "well"]
    for level in evaluation.levels:
        assert {row.name for row in level.rows} == {"model", *BASELINES}
        assert (
            {row.name for row in level.rows if row.baseline}
            == set(level["model"].leads)
            == BASELINES
        )
        for row in level.rows:
            assert set(row.scores) == set(METRICS)
    n = {"site": 72, "well": 24, "plate": 1, "train_site": 144, "classes": 8, "test_classes": 8}
    assert to_json(evaluation)["n"] == n
    by_site, by_well = (
        evaluation[level]["model"].scores["accuracy"].value for level in ("site", "well")
    )
    assert by_well > by_site


def test_site_scores_are_the_plain_scores_of_the_predictions(screen):
    _, test, predictions = screen
    labels = test["label"].map({name: i for i, name in enumerate(CLASSES)}).to_numpy()
    plain = score(labels, predictions[[f"prob_{name}" for name in CLASSES]].to_numpy())
    found = judge_screen(screen)["site"]["model"].scores
    assert {metric: found[metric].value for metric in METRICS} == pytest.approx(plain)


def test_calibration_is_told_before_and_after_a_temperature_that_saw_other_wells(
    screen, tmp_path, capsys
):
    """Probabilities that say too much: their error falls, and the scores stay."""
    _, test, predictions = screen
    columns = [f"prob_{name}" for name in CLASSES]
    sharp = predictions[columns].to_numpy(float) ** 4
    overdone = predictions.assign(
        **dict(zip(columns, (sharp / sharp.sum(axis=1, keepdims=True)).T, strict=True))
    )
    plain, found = (
        judge_screen(screen, predictions=one, out=tmp_path) for one in (predictions, overdone)
    )
    sure = found.confidence["model"]
    assert sure.temperature > 2 and sure.scaled_error < sure.error - 0.02
    assert found["site"]["model"].scores["accuracy"] == plain["site"]["model"].scores["accuracy"]
    assert read_evaluation(tmp_path / "scores.json").confidence == found.confidence
    assert ranking_table(found)["temperature"].tolist()[0] == pytest.approx(sure.temperature)
    print_evaluation(found)
    assert (
        f"Calibration error {sure.error:.3f} as it is; {sure.scaled_error:.3f} with one"
        in " ".join(capsys.readouterr().out.split())
    )
    wells = well_ids(test)
    halves = calibration_parts([Fold("one", screen[0], test)], wells, seed=0)
    assert len(np.unique(np.stack([wells, halves]), axis=1)[0]) == wells.max() + 1, (
        "no well is in both halves"
    )


def log_loss(labels, probabilities, weights):
    of_truth = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-30))
    return weights @ of_truth / weights.sum(axis=-1)


def test_a_metric_is_one_line_and_is_seen_in_every_view(screen, tmp_path, capsys, monkeypatch):
    """One of probabilities, so that drawn chance has none."""
    monkeypatch.setenv("COLUMNS", "160")
    metric = Metric("log loss", log_loss, made_of="probabilities", bounds=(0.0, np.inf))
    monkeypatch.setitem(scores.METRICS, "log_loss", metric)
    evaluation = judge_screen(screen, out=tmp_path)
    _, test, predictions = screen
    truth = [predictions[f"prob_{label}"][row] for row, label in enumerate(test["label"])]
    found = evaluation["site"]["model"].scores["log_loss"]
    assert found.value == pytest.approx(-np.log(truth).mean())
    assert found.low < found.value < found.high
    assert "log_loss" not in evaluation["site"]["chance"].scores
    print_evaluation(evaluation)
    shown = f"{found.value:.3f} [{found.low:.2f}, {found.high:.2f}]"
    terminal = capsys.readouterr().out
    assert "log loss" in terminal and shown in terminal
    assert (
        json.loads((tmp_path / "scores.json").read_text())["levels"]["site"]["model"]["log_loss"][
            "low"
        ]
        == found.low
    )
    long_scores_table = pd.read_csv(tmp_path / "scores.csv").set_index(["level", "model", "metric"])
    assert long_scores_table.loc[("site", "model", "log_loss"), "value"] == pytest.approx(
        found.value
    )
    assert ranking_table(evaluation).loc[0, ["log_loss", "log_loss_high"]].tolist() == [
        found.value,
        found.high,
    ]
    page = write_report(tmp_path).read_text()
    assert ">log loss</button></th>" in page and shown in page


def test_a_baseline_is_one_line_and_is_fitted_once_a_fold_for_all_subjects(
    screen, tmp_path, monkeypatch
):
    train, test, _ = screen
    asked = []

    def first_class(train, labels, test, classes):
        asked.append((len(train), len(test)))
        return np.eye(classes)[np.zeros(len(test), dtype=int)]

    monkeypatch.setitem(
        baselines.BASELINES,
        "always DMSO",
        baselines.Baseline("the first class", predict=first_class),
    )
    folds = [
        Fold("one", train, test),
        Fold("other", test, train.assign(negcon=train["label"] == "DMSO")),
    ]
    folds[0] = Fold("one", train, test.assign(negcon=test["label"] == "DMSO"))
    names = [f"prob_{name}" for name in CLASSES]
    model_names = [
        ModelPredictions(
            f"skill {skill}",
            tuple(make_predictions(f.test, skill=skill)[names].to_numpy() for f in folds),
        )
        for skill in (0, 1, 3)
    ]
    evaluation = evaluate_predictions(model_names, folds, CLASSES, split="plate", replicates=50)
    assert asked == [(144, 72), (72, 144)]
    assert evaluation.n.site == 216 and evaluation.folds == 2
    for level in evaluation.levels:
        assert level["always DMSO"].scores["balanced_accuracy"].value == pytest.approx(
            {"site": 1 / 8, "treated": 0, "well": 1 / 8}[level.name]
        )
    table = ranking_table(evaluation)
    assert table[(table["level"] == "site") & ~table["baseline"]]["model"].tolist() == [
        "skill 3",
        "skill 1",
        "skill 0",
    ]
    assert to_json(evaluation.for_model("skill 1"))["leads"]["site"]["always DMSO"]["accuracy"][
        "value"
    ] == pytest.approx(evaluation["site"]["skill 1"].scores["accuracy"].value - 1 / 8)


def test_intensity_stands_among_the_baselines_where_the_index_has_it(screen):
    train, test, _ = screen
    bright = {name: 100.0 * 2**i for i, name in enumerate(CLASSES)}
    with_it = [table.assign(mean_DNA=table["label"].map(bright)) for table in (train, test)]
    found = judge_screen(screen, train=with_it[0], test=with_it[1])
    assert found["site"]["intensity"].scores["accuracy"].value > 0.9
    assert "intensity" not in found.skipped
    assert "no columns mean_<channel>" in judge_screen(screen).skipped["intensity"]


def test_resampling_plates_widens_intervals_where_plates_differ():
    """The model knows one of the four test plates by heart and guesses on the others."""
    index = make_index(plates=6)
    test = index[~index["Metadata_Plate"].isin(["P0", "P1"])].reset_index(drop=True)
    guesses, knows = make_predictions(test, skill=0), make_predictions(test, skill=50)
    predictions = guesses.where(test["Metadata_Plate"] != "P2", knows)
    screen = (index[index["Metadata_Plate"].isin(["P0", "P1"])], test, predictions)
    width = {}
    for whole in ("well", "plate"):
        accuracy = judge_screen(screen, whole=whole, replicates=500)["well"]["model"].scores[
            "accuracy"
        ]
        width[whole] = accuracy.high - accuracy.low
    assert width["plate"] > 2 * width["well"]


def test_the_order_of_the_predictions_does_not_matter(screen):
    shuffled = screen[2].sample(frac=1, random_state=0)
    assert judge_screen(screen) == judge_screen(screen, predictions=shuffled)


def test_the_files_hold_what_was_returned(screen, tmp_path):
    evaluation = judge_screen(screen, out=tmp_path)
    assert read_evaluation(tmp_path / "scores.json") == evaluation
    assert json.loads((tmp_path / "scores.json").read_text())["warnings"] == evaluation.warnings()
    long_scores_table = pd.read_csv(tmp_path / "scores.csv").set_index(["level", "model", "metric"])
    row = long_scores_table.loc[("well", "model", "macro_f1")]
    assert row["value"] == pytest.approx(evaluation["well"]["model"].scores["macro_f1"].value)
    assert row["n"] == 24
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="true")
    assert list(confusion.index) == list(confusion.columns) == CLASSES
    assert confusion.to_numpy().sum() == 72
    per_class = pd.read_csv(tmp_path / "per_class.csv").set_index("class")
    assert per_class.loc["DMSO", ["sites", "wells"]].tolist() == [9, 3]


def test_a_file_that_is_no_judgement_is_refused(tmp_path):
    (tmp_path / "scores.json").write_text('{"levels": 3}')
    with pytest.raises(InputError, match=r"scores.json: is no judgement .*perturbjax evaluate"):
        read_evaluation(tmp_path / "scores.json")


def test_predictions_of_training_sites_are_scored_apart(screen):
    train, _, predictions = screen
    both = pd.concat([make_predictions(train, skill=50, part="train"), predictions])
    evaluation = judge_screen(screen, predictions=both)
    assert evaluation.train["model"]["accuracy"] == 1.0
    assert evaluation.levels == judge_screen(screen).levels


def test_wells_of_several_labels_have_no_well_level(screen):
    predictions = screen[2]
    predictions = predictions.assign(label=["DMSO", *predictions["label"].iloc[1:]])
    predictions.loc[1:2, "label"] = "compound A"
    evaluation = judge_screen(screen, predictions=predictions)
    assert [level.name for level in evaluation.levels] == ["site"]
    assert "different labels" in evaluation.skipped["well level"]


def test_a_missing_baseline_says_why(screen):
    evaluation = judge_screen(screen, train=screen[0].drop(columns="n_cells"))
    assert "n_cells" in evaluation.skipped["cell count"]
    assert "cell count" not in {row.name for row in evaluation["site"].rows}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.iloc[1:], "none for test site P2_A01_0"),
        (lambda p: pd.concat([p, p.iloc[:1]]), "P2_A01_0 occurs more than once"),
        (
            lambda p: pd.concat([p, p.iloc[:1].assign(site_id="elsewhere")]),
            "elsewhere is not in the test part",
        ),
        (lambda p: p.assign(label="aspirin"), "label 'aspirin' is not one of the run's 8 classes"),
        (lambda p: p.drop(columns="prob_DMSO"), "no column 'prob_DMSO'"),
        (lambda p: p.assign(prob_DMSO=np.nan), "P2_A01_0: its probabilities are not all finite"),
        (lambda p: p.assign(part="train"), "none for test site"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_in_one_line(screen, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        judge_screen(screen, predictions=change(screen[2]), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_index_without_plates_or_training_labels_is_refused(screen):
    train, test, _ = screen
    with pytest.raises(InputError, match="test_index: no column 'Metadata_Plate'"):
        judge_screen(screen, test=test.drop(columns="Metadata_Plate"))
    with pytest.raises(InputError, match="train_index: no column 'label'"):
        judge_screen(screen, train=train.drop(columns="label"))


def test_the_table_shows_numbers_baselines_and_warnings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    index = make_index()
    held = index["Metadata_Site"] == "0"
    evaluation = evaluate_run(
        make_predictions(index[held], skill=1.0), index[~held], index[held], split="site"
    )
    print_evaluation(evaluation)
    shown = capsys.readouterr().out
    best = evaluation["well"]["model"].scores["balanced_accuracy"]
    assert f"{best.value:.3f} [{best.low:.2f}, {best.high:.2f}]" in shown
    for word in ("majority", "chance", "position", "cell count", "72 sites", "which well, not which treatment",
                 "no intensity: the index has no columns"):  # fmt: skip
        assert word in " ".join(shown.split())
