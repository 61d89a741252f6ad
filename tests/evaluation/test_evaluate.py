"""Evaluation of predictions: scores, baselines, tables, and checks of the input."""

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

BASELINES = {"majority", "chance", "position", "cell count", "all technical"}


def evaluate_screen(screen, *, predictions=None, train=None, test=None, **options):
    own = screen[2] if predictions is None else predictions
    return evaluate_run(
        own, screen[0] if train is None else train, screen[1] if test is None else test, **options
    )


def test_evaluation_contains_model_and_baselines_at_both_levels(screen):
    evaluation = evaluate_screen(screen)
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


def test_site_scores_equal_score(screen):
    _, test, predictions = screen
    labels = test["label"].map({name: i for i, name in enumerate(CLASSES)}).to_numpy()
    plain = score(labels, predictions[[f"prob_{name}" for name in CLASSES]].to_numpy())
    result = evaluate_screen(screen)["site"]["model"].scores
    assert {metric: result[metric].value for metric in METRICS} == pytest.approx(plain)


def test_calibration_improves_with_temperature_of_other_wells(screen, tmp_path, capsys):
    """Temperature scaling corrects overconfident probabilities and keeps the scores."""
    _, test, predictions = screen
    columns = [f"prob_{name}" for name in CLASSES]
    sharp = predictions[columns].to_numpy(float) ** 4
    overconfident = predictions.assign(
        **dict(zip(columns, (sharp / sharp.sum(axis=1, keepdims=True)).T, strict=True))
    )
    plain, result = (
        evaluate_screen(screen, predictions=one, out=tmp_path)
        for one in (predictions, overconfident)
    )
    calibration = result.confidence["model"]
    assert calibration.temperature > 2 and calibration.scaled_error < calibration.error - 0.02
    assert result["site"]["model"].scores["accuracy"] == plain["site"]["model"].scores["accuracy"]
    assert read_evaluation(tmp_path / "scores.json").confidence == result.confidence
    assert ranking_table(result)["temperature"].tolist()[0] == pytest.approx(
        calibration.temperature
    )
    print_evaluation(result)
    assert (
        f"Calibration error {calibration.error:.3f}; {calibration.scaled_error:.3f} after "
        "temperature" in " ".join(capsys.readouterr().out.split())
    )
    wells = well_ids(test)
    halves = calibration_parts([Fold("one", screen[0], test)], wells, seed=0)
    assert len(np.unique(np.stack([wells, halves]), axis=1)[0]) == wells.max() + 1, (
        "halves share no well"
    )


def test_added_metric_appears_in_every_view(screen, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def error_rate(counts):
        return 1 - scores.accuracy(counts)

    metric = Metric("error rate", "Fraction of wrong predictions.", error_rate)
    monkeypatch.setitem(scores.METRICS, "error_rate", metric)
    evaluation = evaluate_screen(screen, out=tmp_path)
    own = evaluation["site"]["model"].scores
    estimate = own["error_rate"]
    assert estimate.value == pytest.approx(1 - own["accuracy"].value)
    assert estimate.low < estimate.value < estimate.high
    print_evaluation(evaluation)
    printed = f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"
    terminal = capsys.readouterr().out
    assert "error rate" in terminal and printed in terminal
    stored = json.loads((tmp_path / "scores.json").read_text())["levels"]["site"]["model"]
    assert stored["error_rate"]["low"] == estimate.low
    table = pd.read_csv(tmp_path / "scores.csv").set_index(["level", "model", "metric"])
    assert table.loc[("site", "model", "error_rate"), "value"] == pytest.approx(estimate.value)
    columns = ["error_rate", "error_rate_high"]
    first = ranking_table(evaluation).set_index("model").loc["model", columns].iloc[0]
    assert first.tolist() == [estimate.value, estimate.high]
    page = write_report(tmp_path).read_text()
    assert ">error rate</button></th>" in page and printed in page


def test_metrics_have_a_description():
    assert all(metric.description.endswith(".") for metric in METRICS.values())


def test_unplaced_wells_are_reported(screen, tmp_path):
    test = screen[1]
    unplaced = test["Metadata_Well"] == "A06"
    test = test.assign(Metadata_Well=test["Metadata_Well"].mask(unplaced, "A06_rescan"))
    evaluation = evaluate_screen(screen, test=test, out=tmp_path)
    assert evaluation.unplaced_wells == ("P2 A06_rescan",)
    assert read_evaluation(tmp_path / "scores.json") == evaluation
    assert any("P2 A06_rescan" in warning for warning in evaluation.warnings())
    former = json.loads((tmp_path / "scores.json").read_text())
    del former["unplaced_wells"]
    (tmp_path / "scores.json").write_text(json.dumps(former))
    assert read_evaluation(tmp_path / "scores.json").unplaced_wells == ()


def test_added_baseline_is_fitted_once_per_fold(screen, tmp_path, monkeypatch):
    train, test, _ = screen
    sizes = []

    def first_class(train, labels, test, classes):
        sizes.append((len(train), len(test)))
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
    models = [
        ModelPredictions(
            f"skill {skill}",
            tuple(make_predictions(f.test, skill=skill)[names].to_numpy() for f in folds),
        )
        for skill in (0, 1, 3)
    ]
    evaluation = evaluate_predictions(models, folds, CLASSES, split="plate", replicates=50)
    assert sizes == [(144, 72), (72, 144)]
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


def test_intensity_baseline_requires_channel_statistics(screen):
    train, test, _ = screen
    bright = {name: 100.0 * 2**i for i, name in enumerate(CLASSES)}
    tables = [table.assign(mean_DNA=table["label"].map(bright)) for table in (train, test)]
    result = evaluate_screen(screen, train=tables[0], test=tables[1])
    assert result["site"]["intensity"].scores["accuracy"].value > 0.9
    assert "intensity" not in result.skipped
    assert "no columns mean_<channel>" in evaluate_screen(screen).skipped["intensity"]


def test_resampling_plates_widens_intervals():
    """The model is perfect on one of four test plates and at chance on the others."""
    index = make_index(plates=6)
    test = index[~index["Metadata_Plate"].isin(["P0", "P1"])].reset_index(drop=True)
    random, perfect = make_predictions(test, skill=0), make_predictions(test, skill=50)
    predictions = random.where(test["Metadata_Plate"] != "P2", perfect)
    screen = (index[index["Metadata_Plate"].isin(["P0", "P1"])], test, predictions)
    width = {}
    for whole in ("well", "plate"):
        accuracy = evaluate_screen(screen, whole=whole, replicates=500)["well"]["model"].scores[
            "accuracy"
        ]
        width[whole] = accuracy.high - accuracy.low
    assert width["plate"] > 2 * width["well"]


def test_evaluation_is_independent_of_row_order(screen):
    shuffled = screen[2].sample(frac=1, random_state=0)
    assert evaluate_screen(screen) == evaluate_screen(screen, predictions=shuffled)


def test_written_files_equal_result(screen, tmp_path):
    evaluation = evaluate_screen(screen, out=tmp_path)
    assert read_evaluation(tmp_path / "scores.json") == evaluation
    assert json.loads((tmp_path / "scores.json").read_text())["warnings"] == evaluation.warnings()
    table = pd.read_csv(tmp_path / "scores.csv").set_index(["level", "model", "metric"])
    row = table.loc[("well", "model", "macro_f1")]
    assert row["value"] == pytest.approx(evaluation["well"]["model"].scores["macro_f1"].value)
    assert row["n"] == 24
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="true")
    assert list(confusion.index) == list(confusion.columns) == CLASSES
    assert confusion.to_numpy().sum() == 72
    per_class = pd.read_csv(tmp_path / "per_class.csv").set_index("class")
    assert per_class.loc["DMSO", ["sites", "wells"]].tolist() == [9, 3]


def test_read_evaluation_rejects_other_json(tmp_path):
    (tmp_path / "scores.json").write_text('{"levels": 3}')
    with pytest.raises(
        InputError, match=r"scores.json: not an evaluation result .*perturbjax evaluate"
    ):
        read_evaluation(tmp_path / "scores.json")


def test_training_scores_are_separate(screen):
    train, _, predictions = screen
    both = pd.concat([make_predictions(train, skill=50, part="train"), predictions])
    evaluation = evaluate_screen(screen, predictions=both)
    assert evaluation.train["model"]["accuracy"] == 1.0
    assert evaluation.levels == evaluate_screen(screen).levels


def test_no_well_level_if_labels_differ_within_wells(screen):
    predictions = screen[2]
    predictions = predictions.assign(label=["DMSO", *predictions["label"].iloc[1:]])
    predictions.loc[1:2, "label"] = "compound A"
    evaluation = evaluate_screen(screen, predictions=predictions)
    assert [level.name for level in evaluation.levels] == ["site"]
    assert "different labels" in evaluation.skipped["well level"]


def test_skipped_baseline_has_reason(screen):
    evaluation = evaluate_screen(screen, train=screen[0].drop(columns="n_cells"))
    assert "n_cells" in evaluation.skipped["cell count"]
    assert "cell count" not in {row.name for row in evaluation["site"].rows}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.iloc[1:], "1 test sites are missing .first: P2_A01_0"),
        (lambda p: pd.concat([p, p.iloc[:1]]), "P2_A01_0 occurs more than once"),
        (
            lambda p: pd.concat([p, p.iloc[:1].assign(site_id="elsewhere")]),
            "1 sites are not in the test set .first: elsewhere",
        ),
        (lambda p: p.assign(label="aspirin"), "label 'aspirin' is not one of the 8 classes"),
        (lambda p: p.drop(columns="prob_DMSO"), "no column 'prob_DMSO'"),
        (lambda p: p.assign(prob_DMSO=np.nan), "P2_A01_0: probabilities are not all finite"),
        (lambda p: p.assign(part="train"), "72 test sites are missing"),
    ],
)
def test_evaluation_rejects_mismatched_predictions(screen, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate_screen(screen, predictions=change(screen[2]), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_evaluation_requires_plates_and_labels(screen):
    train, test, _ = screen
    with pytest.raises(InputError, match="test_index: no column 'Metadata_Plate'"):
        evaluate_screen(screen, test=test.drop(columns="Metadata_Plate"))
    with pytest.raises(InputError, match="train_index: no column 'label'"):
        evaluate_screen(screen, train=train.drop(columns="label"))


def test_print_evaluation_shows_scores_baselines_and_warnings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    index = make_index()
    test = index["Metadata_Site"] == "0"
    evaluation = evaluate_run(
        make_predictions(index[test], skill=1.0), index[~test], index[test], split="site"
    )
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    best = evaluation["well"]["model"].scores["balanced_accuracy"]
    assert f"{best.value:.3f} [{best.low:.2f}, {best.high:.2f}]" in printed
    for word in (
        "majority",
        "chance",
        "position",
        "cell count",
        "72 sites",
        "recognition of wells, not of treatments",
        "info: intensity not available: the index has no columns",
    ):
        assert word in " ".join(printed.split())
