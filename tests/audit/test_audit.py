"""`perturbjax audit` through its command: what it writes, what it refuses, and advice that can be followed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.audit_truth import audit_of, screen
from perturbjax.audit.verdict import verdict
from perturbjax.cli import main


def write(table: pd.DataFrame, path: Path) -> Path:
    table.drop(columns=["mean_DNA", "n_cells", "mask_area"]).to_parquet(path, index=False)
    return path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


def test_every_split_stands_beside_its_controls_on_terminal_json_csv_and_page(
    tmp_path, capsys, monkeypatch
):
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
        )
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads((out / "audit.json").read_text())
    assert list(found["splits"]) == ["site", "well", "plate", "layout"]
    assert found["verdict"]["finding"] == "beyond" and found["verdict"]["honest"]
    by_layout = found["splits"]["layout"]
    names = {"majority", "chance", "position", "intensity", "all together", "labels shuffled"}
    assert set(by_layout["levels"]["site"]) == {"lda", *names}
    assert set(by_layout["levels"]["site"]["lda"]["leads"]) == names
    assert found["splits"]["well"]["levels"]["site"].keys() >= {"plate"}
    assert by_layout["p"] < 0.02 and found["splits"]["site"]["p"] is None
    assert (
        0 <= by_layout["confidence"]["scaled_error"] < 0.2
        and by_layout["confidence"]["half_accuracy"] > 0.5
    )
    csv = pd.read_csv(out / "audit.csv").set_index(["split", "level", "model", "metric"])
    score = by_layout["levels"]["site"]["lda"]["scores"]["balanced_accuracy"]
    assert csv.loc[("layout", "site", "lda", "balanced_accuracy"), "low"] == pytest.approx(
        score["low"]
    )
    assert ("site minus layout", "site", "lda", "balanced_accuracy") in csv.index
    page = (out / "audit.html").read_text()
    for words in (
        "On held-out layouts: balanced accuracy",
        "labels shuffled",
        "no cell count",
        "--split layout",
    ):
        assert words.lower() in page.lower() and words in shown
    assert "http" not in page.replace("http-equiv", "") and "data:image/png" in page


def test_only_the_splits_that_were_asked_for_are_made(tmp_path, capsys):
    features = write(screen(effect=8.0, layouts=2, sites=2), tmp_path / "f.parquet")
    flags = ("--features", features, "--out", tmp_path / "audit", "--replicates", 100)
    assert run("audit", *flags, "--splits", "layout", "plate") == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert list(found["splits"]) == ["plate", "layout"] and not found["refused"]
    capsys.readouterr()
    assert run("audit", "--run", tmp_path, "--out", tmp_path / "other", "--splits", "plate") == 2
    assert "--splits" in capsys.readouterr().err


def test_a_dataset_adds_cell_count_and_brightness(tmp_path):
    found = audit_of(screen(brightness=8.0, sites=2))
    answer = found["plate"]
    assert {"cell count", "intensity"} <= set(answer.controls)
    assert answer.controls["intensity"].value > 0.5
    said = verdict(found)
    assert said.finding == "explained" and "brightness" in said.sentences[0]
    assert said.headline == "Not shown: what sees no cell answers as well."


def test_what_the_data_does_not_allow_is_said_and_never_recommended():
    one_layout = audit_of(screen(effect=8.0, layouts=1, sites=2))
    assert "all 4 plates share one layout" in one_layout.refused["layout"]
    said = verdict(one_layout)
    assert not said.honest and one_layout.strictest.policy == "plate"
    assert said.headline.startswith("Not shown: ")
    assert any("a plate map learned by heart answers" in sentence for sentence in said.sentences)
    assert any("in other wells of further plates" in line for line in said.advice)
    assert not any("--split" in line for line in said.advice)

    one_plate = audit_of(screen(effect=8.0, plates=1, sites=2))
    assert set(one_plate.refused) == {"plate", "layout", "compound"}
    said = verdict(one_plate)
    assert said.honest and any("--split well" in line for line in said.advice)
    assert any("cannot be said" in line for line in said.advice)


def test_classes_of_one_well_each_leave_nothing_to_be_learned(tmp_path, capsys):
    file, out = (
        write(screen(classes=48, plates=1, sites=2), tmp_path / "f.parquet"),
        tmp_path / "audit",
    )
    assert (
        run("audit", "--features", file, "--out", out, "--replicates", 100, "--model", "knn") == 0
    )
    found = json.loads((out / "audit.json").read_text())
    assert list(found["splits"]) == ["site"]
    assert "0 of 48 classes stand in two wells or more" in found["refused"]["well"]
    assert not found["verdict"]["honest"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "each treatment in two wells or more" in shown and "--split site" not in shown


def test_sites_whose_class_stands_in_one_group_are_not_judged_and_are_counted():
    table = screen(effect=8.0, plates=3, sites=2)
    alone = (table["Metadata_Plate"] == "P0") & (table["Metadata_Well"] == "A01")
    table.loc[alone, "Metadata_pert_iname"] = "rare"
    found = audit_of(table)
    assert (
        found["well"].n_excluded == found["plate"].n_excluded == 2 and found["site"].n_excluded == 0
    )
    assert any("2 sites could not be asked" in sentence for sentence in verdict(found).sentences)
    assert found.differences[0].sites == len(table) - 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--features (none): must be given, or else --data or --run"),
        (("--features", "f.parquet", "--run", "r"), "--run r: must be without --features"),
        (
            ("--features", "f.parquet", "--untrained"),
            "--untrained True: must be without --features",
        ),
        (("--features", "f.parquet", "--model", "forest"), "--model forest: must be one of ridge"),
        (("--features", "f.parquet", "--replicates", "10"), "--replicates 10: must be 100 or more"),
        (("--features", "nowhere.parquet"), "nowhere.parquet: file not found"),
        (("--run", "nowhere"), "nowhere"),
        (("--features", "f.parquet", "--label-column", "Metadata_moa"), "no column 'Metadata_moa'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    write(screen(plates=1, sites=2), tmp_path / "f.parquet")
    assert run("audit", "--out", "audit", *words) == 2
    said = capsys.readouterr().err
    assert named in said and said.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("audit/*"))


def test_a_place_that_names_no_well_still_has_the_other_controls():
    table = screen(effect=8.0, sites=2)
    found = audit_of(
        table.assign(
            Metadata_Well="w" + table["Metadata_Well"].str[1:] + table["Metadata_Well"].str[0]
        )
    )
    assert "position" not in found["plate"].controls and "all together" in found["plate"].controls


def test_shuffled_labels_keep_wells_together_and_agree_with_none():
    from perturbjax.audit.run_audit import _dealt_anew

    labels, wells = np.repeat(np.arange(6), 300), np.repeat(np.arange(600), 3)
    dealt = _dealt_anew(labels, wells, np.random.default_rng(0))
    assert all(len(set(dealt[wells == well])) == 1 for well in range(600))
    assert np.bincount(dealt).tolist() == np.bincount(labels).tolist()
    assert abs((dealt == labels).mean() - 1 / 6) < 0.02
