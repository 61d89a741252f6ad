"""Classical classifiers: they learn what is there, nothing leaks, and bad input is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_profiles import COMPOUNDS, make_table, write

from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.evaluation.evaluation_result import EvaluationResult
from perturbjax.evaluation.score_tables import print_evaluation, ranking_table
from perturbjax.profiles.classify import classify
from perturbjax.profiles.profile_options import ClassifyConfig, Preparation, ProfileConfig

QUICK = "ridge,gaussian_nb,bernoulli_nb,knn,logistic,lda,plda"


def config_for(table: pd.DataFrame, folder: Path, **changes) -> ClassifyConfig:
    path = write(table, folder / "screen.parquet")
    return ClassifyConfig(
        **{
            "profiles": ProfileConfig((path,)),
            "out": folder / "out",
            "models": "lda",
            "hold_out": "P3",
            "replicates": 50,
            **changes,
        }
    )


def scores(evaluation: EvaluationResult, level: str = "site") -> pd.DataFrame:
    table = ranking_table(evaluation)
    return table[table["level"] == level].set_index("model")


def test_every_classifier_learns_what_separates_classes_and_all_is_written(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path, models="all", tune=True)
    evaluation = classify(config)
    found = scores(evaluation)
    models = found[~found["baseline"]]
    assert len(models) == 10
    assert (models["accuracy"] > 0.75).all(), models["accuracy"]
    assert (models["train_accuracy"] > 0.75).all()
    assert (found.loc[["majority", "chance"], "accuracy"] < 0.5).all()
    assert models["balanced_accuracy"].is_monotonic_decreasing
    assert [level.name for level in evaluation.displayed_levels] == ["site", "treated"]
    for name in ("table.csv", "scores.png", "split.parquet", "labels.json", "config.json"):
        assert (config.out / name).stat().st_size > 0
    assert (config.out / "evaluation" / "lda" / "scores.json").is_file()


def test_predictions_are_written_as_the_networks_write_theirs(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path, models="ridge,random_forest")
    classify(config)
    for name in ("ridge", "random_forest"):
        predictions = pd.read_parquet(config.out / "predictions" / f"{name}.parquet")
        columns = list(predictions.columns)
        first = [c for c in columns if c.startswith("Metadata_")]
        classes = [f"prob_{c}" for c in sorted(COMPOUNDS)]
        assert columns == [*first, "site_id", "part", "label", "predicted", *classes]
        assert predictions["part"].value_counts().to_dict() == {"train": 72, "test": 24}
        probabilities = predictions[classes].to_numpy()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
        said = np.asarray(sorted(COMPOUNDS))[probabilities.argmax(axis=1)]
        assert (predictions["predicted"] == said).all()


def test_shuffled_labels_give_chance(tmp_path: Path) -> None:
    """Train scores may be high; test scores may not, whatever is fitted on the way."""
    table = make_table(plates=4, wells=96, signal=3.0)
    labels = table["Metadata_pert_iname"].to_numpy(copy=True)
    table["Metadata_pert_iname"] = np.random.default_rng(0).permutation(labels)
    preparation = Preparation(normalize="robustize", select=True, sphere="negcon")
    found = scores(
        classify(
            config_for(
                table, tmp_path, models=QUICK, hold_out="each", preparation=preparation, tune=True
            )
        )
    )
    models = found[~found["baseline"]]
    assert ((models["accuracy"] - 1 / 6).abs() < 0.08).all(), models["accuracy"]


def test_what_is_predicted_for_one_test_row_does_not_depend_on_the_labels_of_test_rows(
    tmp_path: Path,
) -> None:
    table = make_table()
    held = table["Metadata_Plate"] == "P3"
    other = table.copy()
    other.loc[held, "Metadata_pert_iname"] = (
        other.loc[held, "Metadata_pert_iname"].sample(frac=1, random_state=0).values
    )
    (tmp_path / "b").mkdir()
    got = []
    for folder, one in ((tmp_path, table), (tmp_path / "b", other)):
        config = config_for(one, folder, models=QUICK, tune=True)
        classify(config)
        got.append(
            [
                pd.read_parquet(config.out / "predictions" / f"{name}.parquet")
                for name in QUICK.split(",")
            ]
        )
    for a, b in zip(*got, strict=True):
        pd.testing.assert_frame_equal(a.filter(like="prob_"), b.filter(like="prob_"))


def test_every_plate_in_turn_judges_every_row_once(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path, hold_out="each")
    found = scores(classify(config))
    assert found.loc["lda", "n"] == 96
    predictions = pd.read_parquet(config.out / "predictions" / "lda.parquet")
    assert len(predictions) == 96 and predictions["site_id"].is_unique
    right = (predictions["predicted"] == predictions["label"]).mean()
    assert found.loc["lda", "accuracy"] == pytest.approx(right)
    assert sorted(p.name for p in config.out.glob("split_*")) == [
        f"split_P{i}.parquet" for i in range(4)
    ]


def test_all_folds_of_a_well_split_judge_every_row_once(tmp_path: Path) -> None:
    config = config_for(
        make_table(), tmp_path, hold_out="", split=SplitConfig("well", folds=3), all_folds=True
    )
    assert scores(classify(config)).loc["lda", "n"] == 96


def test_a_split_file_decides_who_judges(tmp_path: Path) -> None:
    first = config_for(make_table(), tmp_path, hold_out="", split=SplitConfig("well"))
    a = classify(first)
    second = replace(
        first,
        out=tmp_path / "again",
        split=SplitConfig(split_file=str(first.out / "split.parquet")),
    )
    assert scores(classify(second)).loc["lda", "accuracy"] == scores(a).loc["lda", "accuracy"]


def test_sites_are_judged_alone_and_as_wells(tmp_path: Path) -> None:
    sites = pd.concat(
        [make_table(seed=0, signal=0.6).assign(Metadata_Site=s) for s in range(4)],
        ignore_index=True,
    )
    features = [c for c in sites if c.startswith("Cells")]
    sites[features] += np.random.default_rng(0).normal(size=(len(sites), len(features))) * 3
    evaluation = classify(config_for(sites, tmp_path))
    assert scores(evaluation, "site").loc["lda", "n"] == 96
    assert scores(evaluation, "well").loc["lda", "n"] == 24
    assert (
        scores(evaluation, "well").loc["lda", "accuracy"]
        > scores(evaluation, "site").loc["lda", "accuracy"]
    )


def test_treated_rows_are_those_that_are_not_negative_controls(tmp_path: Path) -> None:
    config = config_for(make_table(signal=1.0), tmp_path)
    treated = scores(classify(config), "treated").loc["lda"]
    predictions = pd.read_parquet(config.out / "predictions" / "lda.parquet")
    rows = predictions[(predictions["part"] == "test") & (predictions["label"] != "DMSO")]
    assert treated["n"] == len(rows) == 20
    assert treated["accuracy"] == pytest.approx((rows["predicted"] == rows["label"]).mean())


def test_a_class_in_the_test_part_only_is_judged_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_table()
    table.loc[table.index[-3:], "Metadata_pert_iname"] = "newcomer"
    config = config_for(table, tmp_path, models="lda,ridge")
    found = scores(classify(config))
    assert (
        "1 classes stand in the test part only (first: newcomer); their 3 rows are judged and never right"
        in (capsys.readouterr().err)
    )
    predictions = pd.read_parquet(config.out / "predictions" / "lda.parquet")
    assert (predictions["prob_newcomer"] == 0).all()
    assert found.loc["lda", "accuracy"] <= 21 / 24


def test_a_model_that_cannot_be_fitted_is_left_out_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One row a class: LDA and PLDA know nothing of the noise."""
    table = make_table(plates=2, wells=12, classes=6)
    table["Metadata_pert_iname"] = [f"compound {i % 12}" for i in range(24)]
    config = config_for(table, tmp_path, hold_out="P1", models="lda,plda,knn")
    found = scores(classify(config))
    assert list(found.index[~found["baseline"]]) == ["knn"]
    assert "lda: left out (" in capsys.readouterr().err
    with pytest.raises(InputError, match="--models lda,plda: none could be fitted"):
        classify(replace(config, models="lda,plda"))


def test_rows_without_a_label_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_table()
    table.loc[:4, "Metadata_pert_iname"] = None
    classify(config_for(table, tmp_path))
    assert "5 rows without Metadata_pert_iname left out" in capsys.readouterr().err


def test_missing_and_constant_features_are_said_and_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_table()
    table["Cells_constant"], table["Cells_hollow"] = 1.0, np.nan
    table.loc[5, "Cells_f1"] = np.inf
    found = scores(classify(config_for(table, tmp_path)))
    said = capsys.readouterr().err
    assert found.loc["lda", "accuracy"] > 0.75
    assert "dropped, constant in the training rows: Cells_constant" in said
    assert "dropped, missing in more than 5% of the training rows: Cells_hollow" in said
    assert "1 missing training values filled" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": "lda,forest"}, "--models forest: unknown; choose from all, ridge"),
        ({"models": ","}, "--models ',': names none"),
        ({"hold_out": "P9"}, "--hold-out P9: no such plate; choose each or one of P0, P1, P2, P3"),
        ({"all_folds": True}, "--hold-out P3: must be without --all-folds"),
        ({"hold_out": "", "split": SplitConfig("plate", folds=5)}, "there are only 4 groups"),
        ({"hold_out": "", "split": SplitConfig("layout")}, "fold|groups"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        classify(config_for(make_table(), tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_one_class_in_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has one class \(DMSO\) in training"):
        classify(config_for(make_table().assign(Metadata_pert_iname="DMSO"), tmp_path))


def test_a_label_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path)
    with pytest.raises(
        InputError, match="no column 'Metadata_moa'; there are site_id, Metadata_Plate"
    ):
        classify(replace(config, profiles=replace(config.profiles, label_column="Metadata_moa")))


def test_the_table_shows_training_and_test_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    print_evaluation(classify(config_for(make_table(), tmp_path, models="lda,ridge")))
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for part in (
        "train",
        "test",
        "balanced",
        "lda",
        "position",
        "rows that are not negative controls (n = 20)",
    ):
        assert part in words


def test_a_plate_map_that_answers_everything_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """All plates with one layout, features of noise: only position knows."""
    table = make_table(signal=0.0)
    table["Metadata_pert_iname"] = np.tile(table["Metadata_pert_iname"][:24].to_numpy(), 4)
    board = classify(config_for(table, tmp_path))
    found = scores(board)
    assert found.loc["position", "accuracy"] == 1 and found.loc["lda", "accuracy"] < 0.5
    print_evaluation(board)
    said = " ".join(capsys.readouterr().out.split())
    assert "100% of the test sites have their label at the same place of a training plate" in said
    assert "by site, the lda's balanced accuracy is below position (1.000)" in said


def test_the_command_ends_with_one_line_and_status_two_on_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from perturbjax.cli import main

    path = write(make_table(), tmp_path / "screen.csv")
    good = [
        "classify",
        "--features",
        str(path),
        "--hold-out",
        "P3",
        "--models",
        "knn",
        "--replicates",
        "20",
    ]
    with pytest.raises(SystemExit, match="0"):
        main([*good, "--out", str(tmp_path / "out")])
    assert "knn" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*good, "--out", str(tmp_path / "out"), "--label-column", "Metadata_nothing"])
    said = capsys.readouterr().err
    assert (
        said.startswith("error: features: no column 'Metadata_nothing'") and said.count("\n") == 1
    )


@pytest.mark.parametrize(
    "dealt",
    [
        {"hold_out": "P3"},
        {"hold_out": "each"},
        {"hold_out": "", "split": SplitConfig(split="site", folds=3)},
        {"hold_out": "", "split": SplitConfig(split="well", folds=3)},
    ],
)
def test_labels_that_are_all_different_are_refused(tmp_path: Path, dealt) -> None:
    table = make_table()
    table["Metadata_pert_iname"] = [f"compound {number}" for number in range(len(table))]
    with pytest.raises(InputError, match="Metadata_pert_iname"):
        classify(config_for(table, tmp_path, **dealt))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ridge_takes_seconds_on_three_thousand_profiles_of_two_thousand_features() -> None:
    import time

    from perturbjax.profiles.classifiers import CLASSIFIERS

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 2048)).astype(np.float32)
    model = CLASSIFIERS["ridge"].make(3000, 60, 0)
    start = time.process_time()
    model.fit(x, rng.integers(60, size=3000))
    assert time.process_time() - start < 60
