"""Command `audit`: output files, refused input, verdict and advice."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.audit_truth import audit_of, screen
from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.audit_tables import missing_parts
from perturbjax.audit.verdict import verdict
from perturbjax.cli import main


def write(table: pd.DataFrame, path: Path) -> Path:
    table.drop(columns=["mean_DNA", "n_cells", "mask_area"]).to_parquet(path, index=False)
    return path


@cache
def audit_one_layout() -> AuditResult:
    """Audit two plates of one layout, where position predicts the label."""
    return audit_of(screen_of_one_layout(), folds=3)


def screen_of_one_layout() -> pd.DataFrame:
    return screen(effect=8.0, plates=2, layouts=1, sites=2)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


def test_audit_writes_all_splits_and_controls(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    table = screen(effect=8.0, layouts=2, wells=48, sites=2)
    table = table.rename(columns={"f48": "Cells_Intensity_MeanIntensity_DNA"})
    out = tmp_path / "audit"
    assert (
        run(
            "audit",
            "--features",
            write(table, tmp_path / "f.parquet"),
            "--out",
            out,
            "--replicates",
            100,
            "--folds",
            3,
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((out / "audit.json").read_text())
    assert list(result["splits"]) == ["site", "well", "plate", "layout"]
    assert result["verdict"]["finding"] == "beyond" and result["verdict"]["honest"]
    by_layout = result["splits"]["layout"]
    names = {"majority", "chance", "position", "intensity", "all technical", "labels shuffled"}
    assert set(by_layout["levels"]["site"]) == {"lda", *names}
    assert set(by_layout["levels"]["site"]["lda"]["leads"]) == names
    assert result["splits"]["well"]["levels"]["site"].keys() >= {"plate"}
    assert by_layout["p"] < 0.02 and result["splits"]["site"]["p"] is None
    assert (
        0 <= by_layout["confidence"]["scaled_error"] < 0.2
        and by_layout["confidence"]["half_accuracy"] > 0.5
    )
    csv = pd.read_csv(out / "audit.csv").set_index(["split", "level", "model", "metric"])
    score = by_layout["levels"]["site"]["lda"]["scores"]["balanced_accuracy"]
    assert csv.loc[("layout", "site", "lda", "balanced_accuracy"), "low"] == pytest.approx(
        score["low"]
    )
    assert ("site minus layout", "well", "lda", "balanced_accuracy") in csv.index
    page = (out / "audit.html").read_text()
    for words in (
        "On plates with held-out layouts: balanced accuracy",
        "labels shuffled",
        "no control cell count",
        "--split layout",
    ):
        assert words.lower() in page.lower() and words in printed
    assert "http" not in page.replace("http-equiv", "") and "<svg" in page


def test_audit_restricts_splits(tmp_path, capsys):
    features = write(screen(effect=8.0, layouts=2, sites=2), tmp_path / "f.parquet")
    flags = ("--features", features, "--out", tmp_path / "audit", "--replicates", 100)
    assert run("audit", *flags, "--splits", "layout", "plate") == 0
    result = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert list(result["splits"]) == ["plate", "layout"] and not result["refused"]
    capsys.readouterr()
    assert run("audit", "--run", tmp_path, "--out", tmp_path / "other", "--splits", "plate") == 2
    assert "--splits" in capsys.readouterr().err


def test_dataset_adds_cell_count_and_intensity_controls(tmp_path):
    result = audit_of(screen(brightness=8.0, sites=2), folds=3)
    split = result["plate"]
    assert {"cell count", "intensity"} <= set(split.controls)
    assert split.controls["intensity"].value > 0.5
    conclusion = verdict(result)
    assert conclusion.finding == "explained" and "brightness" in conclusion.sentences[1]
    assert "so image features show no" in conclusion.headline


def test_verdict_never_recommends_invalid_scores():
    one_layout = audit_one_layout()
    assert "all 2 plates share one layout" in one_layout.refused["layout"]
    conclusion = verdict(one_layout)
    assert not conclusion.is_valid and one_layout.strictest.policy == "plate"
    assert conclusion.headline.startswith("No valid score: ")
    assert any("the position-only control reaches" in sentence for sentence in conclusion.sentences)
    assert any("in other wells of further plates" in line for line in conclusion.advice)
    assert not any("--split" in line for line in conclusion.advice)

    one_plate = audit_of(screen(effect=8.0, plates=1, sites=2), folds=3)
    assert set(one_plate.refused) == {"plate", "layout", "compound"}
    conclusion = verdict(one_plate)
    assert conclusion.is_valid and any("--split well" in line for line in conclusion.advice)
    assert any("new plates is unknown" in line for line in conclusion.advice)


def test_audit_of_single_well_classes_is_invalid(tmp_path, capsys):
    file, out = (
        write(screen(classes=48, plates=1, sites=2), tmp_path / "f.parquet"),
        tmp_path / "audit",
    )
    assert (
        run("audit", "--features", file, "--out", out, "--replicates", 100, "--model", "knn") == 0
    )
    result = json.loads((out / "audit.json").read_text())
    assert list(result["splits"]) == ["site"]
    assert "0 of 48 classes occur in two wells or more" in result["refused"]["well"]
    assert not result["verdict"]["honest"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "each treatment in two wells or more" in printed and "--split site" not in printed


def test_audit_excludes_classes_of_one_group():
    table = screen(effect=8.0, plates=3, sites=2)
    single = (table["Metadata_Plate"] == "P0") & (table["Metadata_Well"] == "A01")
    table.loc[single, "Metadata_pert_iname"] = "rare"
    result = audit_of(table, folds=3)
    assert (
        result["well"].n_excluded == result["plate"].n_excluded == 2
        and result["site"].n_excluded == 0
    )
    assert any("2 sites were excluded" in sentence for sentence in verdict(result).sentences)
    assert result.differences[0].sites == len(table) - 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "--features (none): must be set, or --data, or --run"),
        (("--features", "f.parquet", "--run", "r"), "--run r: must be used without --features"),
        (
            ("--features", "f.parquet", "--untrained"),
            "--untrained True: must be used without --features",
        ),
        (("--features", "f.parquet", "--model", "forest"), "--model forest: must be one of ridge"),
        (("--features", "f.parquet", "--replicates", "10"), "--replicates 10: must be 100 or more"),
        (("--features", "nowhere.parquet"), "nowhere.parquet: file not found"),
        (("--run", "nowhere"), "nowhere"),
        (("--features", "f.parquet", "--label-column", "Metadata_moa"), "no column 'Metadata_moa'"),
    ],
)
def test_audit_rejects_bad_input_in_one_line(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    write(screen(plates=1, sites=2), tmp_path / "f.parquet")
    assert run("audit", "--out", "audit", *flags) == 2
    message = capsys.readouterr().err
    assert named in message and message.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("audit/*"))


def respell(table: pd.DataFrame, spelling: str) -> pd.DataFrame:
    wells = [
        spelling.format(name=name, letter=name[0], row=ord(name[0]) - 64, column=int(name[1:]))
        for name in table["Metadata_Well"]
    ]
    return table.assign(Metadata_Well=wells)


@pytest.mark.parametrize("spelling", ["r{row:02d}c{column:02d}", "{letter}-{column:02d}"])
def test_verdict_is_independent_of_well_spelling(spelling):
    """Position predicts the label on plates of one layout, however wells are spelled."""
    expected = verdict(audit_one_layout())
    respelled = audit_of(respell(screen_of_one_layout(), spelling), folds=3)
    assert verdict(respelled) == expected
    assert expected.headline.startswith("No valid score: ")


def test_single_unplaced_well_keeps_position_control():
    table = screen_of_one_layout()
    odd = (table["Metadata_Plate"] == "P0") & (table["Metadata_Well"] == "A06")
    wells = table["Metadata_Well"].mask(odd, "A06_rescan")
    result = audit_of(table.assign(Metadata_Well=wells), folds=3)
    assert "P0 A06_rescan" in " ".join(missing_parts(result))
    assert verdict(result).headline.startswith("No valid score: ")


def test_score_without_position_control_is_not_recommended():
    result = audit_of(respell(screen(effect=8.0, plates=2, sites=2), "w{name}"), folds=3)
    assert "position" not in result["plate"].controls
    assert "all technical" in result["plate"].controls
    conclusion = verdict(result)
    assert conclusion.finding == "uncontrolled"
    assert conclusion.headline.endswith(" Not controlled for position.")
    assert not any("Report the score" in line for line in conclusion.advice)
    assert any("Correct the well names" in line for line in conclusion.advice)


def test_too_few_wells_give_no_conclusion():
    table = screen(effect=8.0, plates=1, sites=2, classes=2)
    wells = ["A01", "A02", "A03", "A04", "A05", "A06"]
    conclusion = verdict(audit_of(table[table["Metadata_Well"].isin(wells)], folds=2))
    assert conclusion.finding == "too few wells"
    assert conclusion.headline.startswith("Too few wells: ")
    assert conclusion.advice == ("Add wells: the test set needs at least 10.",)


def test_shuffle_labels_is_constant_within_wells():
    from perturbjax.audit.run_audit import shuffle_labels

    labels, wells = np.repeat(np.arange(6), 300), np.repeat(np.arange(600), 3)
    shuffled = shuffle_labels(labels, wells, np.random.default_rng(0))
    assert all(len(set(shuffled[wells == well])) == 1 for well in range(600))
    assert np.bincount(shuffled).tolist() == np.bincount(labels).tolist()
    assert abs((shuffled == labels).mean() - 1 / 6) < 0.02
