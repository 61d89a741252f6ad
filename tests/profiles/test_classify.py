"""Classical classifiers: scores, no leakage, written files, and messages about bad input."""

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
from perturbjax.profiles.classifiers import CLASSIFIERS
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


def test_classify_fits_every_classifier_and_writes_files(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path, models="all", tune=True)
    evaluation = classify(config)
    table_scores = scores(evaluation)
    models = table_scores[~table_scores["baseline"]]
    assert set(models.index) == set(CLASSIFIERS)
    assert (models["accuracy"] > 0.75).all(), models["accuracy"]
    assert (models["train_accuracy"] > 0.75).all()
    assert (table_scores.loc[["majority", "chance"], "accuracy"] < 0.5).all()
    assert models["balanced_accuracy"].is_monotonic_decreasing
    assert [level.name for level in evaluation.displayed_levels] == ["site", "treated"]
    for name in ("table.csv", "scores.png", "split.parquet", "labels.json", "config.json"):
        assert (config.out / name).stat().st_size > 0
    assert (config.out / "evaluation" / "lda" / "scores.json").is_file()


def test_classify_writes_predictions_like_networks(tmp_path: Path) -> None:
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
        likely = np.asarray(sorted(COMPOUNDS))[probabilities.argmax(axis=1)]
        assert (predictions["predicted"] == likely).all()


def test_shuffled_labels_give_chance_accuracy(tmp_path: Path) -> None:
    """Training scores may be high; test scores must be at chance level."""
    table = make_table(plates=4, wells=96, signal=3.0)
    labels = table["Metadata_pert_iname"].to_numpy(copy=True)
    table["Metadata_pert_iname"] = np.random.default_rng(0).permutation(labels)
    preparation = Preparation(normalize="robustize", select=True, sphere="negcon")
    table_scores = scores(
        classify(
            config_for(
                table, tmp_path, models=QUICK, hold_out="each", preparation=preparation, tune=True
            )
        )
    )
    models = table_scores[~table_scores["baseline"]]
    assert ((models["accuracy"] - 1 / 6).abs() < 0.08).all(), models["accuracy"]


def test_predictions_do_not_depend_on_labels_of_test_rows(
    tmp_path: Path,
) -> None:
    table = make_table()
    test_rows = table["Metadata_Plate"] == "P3"
    other = table.copy()
    other.loc[test_rows, "Metadata_pert_iname"] = (
        other.loc[test_rows, "Metadata_pert_iname"].sample(frac=1, random_state=0).values
    )
    (tmp_path / "b").mkdir()
    outputs = []
    for folder, one in ((tmp_path, table), (tmp_path / "b", other)):
        config = config_for(one, folder, models=QUICK, tune=True)
        classify(config)
        outputs.append(
            [
                pd.read_parquet(config.out / "predictions" / f"{name}.parquet")
                for name in QUICK.split(",")
            ]
        )
    for a, b in zip(*outputs, strict=True):
        pd.testing.assert_frame_equal(a.filter(like="prob_"), b.filter(like="prob_"))


def test_hold_out_each_tests_every_row_once(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path, hold_out="each")
    table_scores = scores(classify(config))
    assert table_scores.loc["lda", "n"] == 96
    predictions = pd.read_parquet(config.out / "predictions" / "lda.parquet")
    assert len(predictions) == 96 and predictions["site_id"].is_unique
    right = (predictions["predicted"] == predictions["label"]).mean()
    assert table_scores.loc["lda", "accuracy"] == pytest.approx(right)
    assert sorted(p.name for p in config.out.glob("split_*")) == [
        f"split_P{i}.parquet" for i in range(4)
    ]


def test_all_folds_test_every_row_once(tmp_path: Path) -> None:
    config = config_for(
        make_table(), tmp_path, hold_out="", split=SplitConfig("well", folds=3), all_folds=True
    )
    assert scores(classify(config)).loc["lda", "n"] == 96


def test_split_file_reproduces_scores(tmp_path: Path) -> None:
    first = config_for(make_table(), tmp_path, hold_out="", split=SplitConfig("well"))
    a = classify(first)
    second = replace(
        first,
        out=tmp_path / "repeated",
        split=SplitConfig(split_file=str(first.out / "split.parquet")),
    )
    assert scores(classify(second)).loc["lda", "accuracy"] == scores(a).loc["lda", "accuracy"]


def test_classify_scores_sites_and_wells(tmp_path: Path) -> None:
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


def test_treated_level_excludes_negative_controls(tmp_path: Path) -> None:
    config = config_for(make_table(signal=1.0), tmp_path)
    treated = scores(classify(config), "treated").loc["lda"]
    predictions = pd.read_parquet(config.out / "predictions" / "lda.parquet")
    rows = predictions[(predictions["part"] == "test") & (predictions["label"] != "DMSO")]
    assert treated["n"] == len(rows) == 20
    assert treated["accuracy"] == pytest.approx((rows["predicted"] == rows["label"]).mean())


def test_class_without_training_rows_counts_as_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_table()
    table.loc[table.index[-3:], "Metadata_pert_iname"] = "newcomer"
    config = config_for(table, tmp_path, models="lda,ridge")
    table_scores = scores(classify(config))
    assert (
        "1 classes occur in the test set only (first: newcomer). Their 3 rows count as wrong."
        in (capsys.readouterr().err)
    )
    predictions = pd.read_parquet(config.out / "predictions" / "lda.parquet")
    assert (predictions["prob_newcomer"] == 0).all()
    assert table_scores.loc["lda", "accuracy"] <= 21 / 24


def test_classifier_that_cannot_be_fitted_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With one row per class, LDA and PLDA cannot estimate the noise."""
    table = make_table(plates=2, wells=12, classes=6)
    table["Metadata_pert_iname"] = [f"compound {i % 12}" for i in range(24)]
    config = config_for(table, tmp_path, hold_out="P1", models="lda,plda,knn")
    table_scores = scores(classify(config))
    assert list(table_scores.index[~table_scores["baseline"]]) == ["knn"]
    assert "warning: left out classifier lda: " in capsys.readouterr().err
    with pytest.raises(InputError, match="--models lda,plda: no classifier could be fitted"):
        classify(replace(config, models="lda,plda"))


def test_rows_without_label_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = make_table()
    table.loc[:4, "Metadata_pert_iname"] = None
    classify(config_for(table, tmp_path))
    assert "info: left out 5 rows without Metadata_pert_iname" in capsys.readouterr().err


def test_missing_and_constant_features_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_table()
    table["Cells_constant"], table["Cells_hollow"] = 1.0, np.nan
    table.loc[5, "Cells_f1"] = np.inf
    table_scores = scores(classify(config_for(table, tmp_path)))
    messages = capsys.readouterr().err
    assert table_scores.loc["lda", "accuracy"] > 0.75
    assert "dropped 1 column: Cells_constant (constant in the training rows)" in messages
    assert (
        "dropped 1 column: Cells_hollow (missing in more than 5% of the training rows)" in messages
    )
    assert "filled 1 missing training values" in messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "lda,forest"}, r"--models forest: unknown \(available: all, ridge"),
        ({"models": ","}, "--models ',': contains no name"),
        ({"hold_out": "P9"}, r"--hold-out P9: no such plate \(available: each, P0, P1, P2, P3\)"),
        ({"all_folds": True}, "--hold-out P3: must be used without --all-folds"),
        ({"hold_out": "", "split": SplitConfig("plate", folds=5)}, "there are only 4 groups"),
        ({"hold_out": "", "split": SplitConfig("layout")}, "fold|groups"),
    ],
)
def test_classify_refuses_bad_flags(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        classify(config_for(make_table(), tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_classify_refuses_single_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has one class \(DMSO\) in the training set"):
        classify(config_for(make_table().assign(Metadata_pert_iname="DMSO"), tmp_path))


def test_classify_names_missing_label_column(tmp_path: Path) -> None:
    config = config_for(make_table(), tmp_path)
    with pytest.raises(
        InputError, match=r"no column 'Metadata_moa' \(available: site_id, Metadata_Plate"
    ):
        classify(replace(config, profiles=replace(config.profiles, label_column="Metadata_moa")))


def test_printed_table_shows_training_and_test_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    print_evaluation(classify(config_for(make_table(), tmp_path, models="lda,ridge")))
    words = " ".join(capsys.readouterr().out.split())
    for part in (
        "train",
        "test",
        "balanced",
        "lda",
        "position",
        "rows that are not negative controls (n = 20)",
    ):
        assert part in words


def test_printed_table_names_unbeaten_position_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """All plates have one layout, and features are noise: only positions predict labels."""
    table = make_table(signal=0.0)
    table["Metadata_pert_iname"] = np.tile(table["Metadata_pert_iname"][:24].to_numpy(), 4)
    evaluation = classify(config_for(table, tmp_path))
    table_scores = scores(evaluation)
    assert (
        table_scores.loc["position", "accuracy"] == 1 and table_scores.loc["lda", "accuracy"] < 0.5
    )
    print_evaluation(evaluation)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "100% of the test sites have the same label as a training well at the same position"
        in printed
    )
    assert "The well position reaches 1.00, so image features show no advantage" in printed


def test_command_reports_bad_input_in_one_line(
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
    ]
    with pytest.raises(SystemExit, match="0"):
        main([*good, "--out", str(tmp_path / "out")])
    assert "knn" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*good, "--out", str(tmp_path / "out"), "--label-column", "Metadata_nothing"])
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: features: no column 'Metadata_nothing'")


@pytest.mark.parametrize(
    "split",
    [
        {"hold_out": "P3"},
        {"hold_out": "each"},
        {"hold_out": "", "split": SplitConfig(split="site", folds=3)},
        {"hold_out": "", "split": SplitConfig(split="well", folds=3)},
    ],
)
def test_classify_refuses_labels_that_are_all_different(tmp_path: Path, split) -> None:
    table = make_table()
    table["Metadata_pert_iname"] = [f"compound {number}" for number in range(len(table))]
    with pytest.raises(InputError, match="Metadata_pert_iname"):
        classify(config_for(table, tmp_path, **split))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ridge_fits_3000_profiles_of_2048_features_within_a_minute() -> None:
    import time

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 2048)).astype(np.float32)
    model = CLASSIFIERS["ridge"].make(3000, 60, 0)
    start = time.process_time()
    model.fit(x, rng.integers(60, size=3000))
    assert time.process_time() - start < 60


def test_documentation_lists_every_classifier() -> None:
    page = Path(__file__).parents[2].joinpath("docs/howto/profiles.md").read_text()
    for name, classifier in CLASSIFIERS.items():
        assert f"| `{name}` | {classifier.description} |" in page
