"""The screening commands from the command line, on a table written by another program."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from perturbjax.cli import main
from screening.simulated_wells import simulate_wells


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """A CSV of profiles: two mechanisms, an inactive treatment, doses and cell counts."""
    effects = {"strong": 3.0, "also strong": 3.0, "inactive": 0.0}
    wells = simulate_wells(treatments=effects, plates=3, replicates=4, controls=16)
    frame = wells.metadata.assign(
        Metadata_dose_uM=np.tile([0.1, 1.0, 10.0, 100.0], len(wells.metadata))[
            : len(wells.metadata)
        ],
        Metadata_moa=wells.treatment.map({"strong": "m", "also strong": "m"}).fillna(""),
        n_cells=wells.cell_count,
    )
    frame.loc[wells.control, "Metadata_dose_uM"] = np.nan
    path = tmp_path_factory.mktemp("screen") / "profiles.csv"
    profiles = pd.DataFrame(wells.values, columns=list(wells.features))
    pd.concat([frame, profiles], axis=1).to_csv(path, index=False)
    return str(path)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    return int(end.value.code or 0)


def test_hits_writes_table_and_verdict(table, tmp_path, capsys):
    out = tmp_path / "hits"
    assert run("hits", "--features", table, "--out", out, "--permutations", 999) == 0
    hits = pd.read_csv(out / "hits.csv").set_index("treatment")
    assert hits["active"].to_dict() == {"strong": True, "also strong": True, "inactive": False}
    assert json.loads((out / "summary.json").read_text())["verdict"].startswith("2 of 3")
    assert "calibration on" in capsys.readouterr().err
    assert pd.read_parquet(out / "hits.parquet").shape[0] == 3


def test_doses_reports_no_response_for_a_constant_effect(table, tmp_path):
    """The simulated effect does not depend on the dose, so no trend within the doses may appear."""
    out = tmp_path / "doses"
    words = ("--dose-column", "Metadata_dose_uM", "--response", "feature_5")
    assert run("doses", "--features", table, *words, "--out", out) == 0
    doses = pd.read_csv(out / "doses.csv")
    assert set(doses["treatment"]) == {"strong", "also strong", "inactive"}
    assert (doses["outcome"] == "no dose response").all()
    assert (pd.read_csv(out / "wells.csv")["response"].notna()).all()


def test_similar_finds_the_shared_mechanism(table, tmp_path, capsys):
    out = tmp_path / "similar"
    assert run("similar", "--features", table, "--neighbors", 1, "--out", out) == 0
    neighbors = pd.read_csv(out / "neighbors.csv").set_index("treatment")
    assert neighbors.loc["strong", "neighbor"] == "also strong"
    printed = capsys.readouterr().err
    assert "NSC: " in printed and "NSCB" not in printed
    assert (out / "enrichment.csv").is_file()


def test_differences_ranks_treatments_by_changed_features(table, tmp_path):
    out = tmp_path / "differences"
    assert run("differences", "--features", table, "--out", out) == 0
    summary = pd.read_csv(out / "summary.csv")
    assert summary["treatment"].iloc[-1] == "inactive"
    features = pd.read_csv(out / "differences.csv")
    assert features[features["treatment"] == "strong"]["feature"].iloc[0] == "feature_1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hits --negcon Metadata_moa=x", "--negcon Metadata_moa=x: no row matches"),
        ("hits --dose-column Metadata_none", "--dose-column Metadata_none: not found"),
        ("hits --run missing", "pass --run, or"),
        ("doses --dose-column Metadata_dose_uM --response none", "--response none: not found"),
        ("doses --dose-column Metadata_moa", "is not a concentration"),
        ("hits --poscon Metadata_moa=x", "--poscon Metadata_moa=x: no well matches"),
        ("hits --label-column Metadata_Site", "no column 'Metadata_Site'"),
        ("similar --restriction week", "--restriction week: must be one of none"),
        ("similar --restriction Metadata_week", "--restriction Metadata_week: not found"),
        ("differences --treatments none", "treatment 'none' has no well"),
    ],
)
def test_wrong_input_is_one_line(table, tmp_path, capsys, words, message):
    command, *rest = words.split()
    out = tmp_path / "out"
    assert run(command, "--features", table, *rest, "--out", out) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert not out.exists()
