"""Matching of mechanisms on published and on simulated profiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from experiments.bbbc021_mechanisms import COMPOUND, CONCENTRATION, Config, main, read_published
from perturbjax.core.plates import PLATE
from perturbjax.screening.commands import compute_similar
from perturbjax.screening.screen_inputs import make_wells

pytestmark = pytest.mark.full


@pytest.mark.shared
def test_main_reproduces_scores_of_published_profiles(shared, tmp_path):
    main(Config(out=tmp_path, data=shared / "data" / "bbbc021_profiles", replicates=200))
    table = pd.read_csv(tmp_path / "mechanisms.csv").set_index(["pipeline", "measure"])
    simple = table.loc["z-scores to DMSO of the plate"]
    assert simple["treatments"].to_dict() == {"NSC": 103, "NSCB": 92}
    assert simple["matched"].round(3).to_dict() == {"NSC": 0.767, "NSCB": 0.685}
    assert ((table["low"] < table["matched"]) & (table["matched"] < table["high"])).all()
    # `perturbjax similar` has the same scores, computed by other functions.
    profiles = read_published(shared / "data" / "bbbc021_profiles")
    metadata = profiles.metadata.assign(Metadata_Batch=profiles.column(PLATE).str.split("_").str[0])
    wells = make_wells(
        replace(profiles, metadata=metadata), COMPOUND, "", None, dose_column=CONCENTRATION
    )
    scores = compute_similar(wells).scores
    expected = table.loc["consensus of perturbjax similar"]
    for measure, (treatments, matched, chance) in scores.items():
        row = expected.loc[measure]
        assert (treatments, matched) == (row["treatments"], pytest.approx(row["matched"]))
        assert chance == pytest.approx(row["chance"])
    assert list(scores) == ["NSC", "NSCB"]


def test_main_matches_simulated_mechanisms_and_warns_of_trained_features(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [
        {
            "Metadata_Plate": f"Week{week}_1",
            "Metadata_Well": f"{'ABCDEFGH'[compound]}{copy + 1:02d}",
            "Metadata_pert_iname": f"c{compound}",
            "Metadata_concentration_uM": "1",
            "Metadata_moa": f"m{compound // 2}",
        }
        for compound in range(8)
        for week in (1, 2)
        for copy in range(2)
    ]
    table = pd.DataFrame(rows)
    kinds = table["Metadata_moa"].str[1:].astype(int).to_numpy()
    values = 5 * np.eye(4)[kinds] + rng.normal(size=(len(table), 4))
    table = pd.concat(
        [table.assign(Metadata_part="test"), pd.DataFrame(values).add_prefix("f")], axis=1
    )
    table.to_parquet(tmp_path / "f.parquet", index=False)
    main(Config(out=tmp_path / "out", features=tmp_path / "f.parquet", replicates=100))
    table = pd.read_csv(tmp_path / "out" / "mechanisms.csv")
    assert list(table["matched"]) == [1.0] and table["measure"].tolist() == ["NSC"]
    messages = " ".join(capsys.readouterr().err.split())
    assert "the features contain the labels" in messages
    assert "skipped (plate Week1_1 has 0 DMSO wells" in messages
