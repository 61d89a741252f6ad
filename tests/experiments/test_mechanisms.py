"""Matching of mechanisms: the published profiles give the known numbers, and labels in the features are warned of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.bbbc021_mechanisms import Config, main


@pytest.mark.shared
def test_the_simple_recipe_on_published_profiles_gives_what_was_measured_by_hand(shared, tmp_path):
    main(Config(out=tmp_path, data=shared / "data" / "bbbc021_profiles", replicates=200))
    found = pd.read_csv(tmp_path / "mechanisms.csv").set_index(["pipeline", "measure"])
    plain = found.loc["z-scores against the plate's DMSO"]
    assert plain["treatments"].to_dict() == {"NSC": 103, "NSCB": 92}
    assert plain["matched"].round(3).to_dict() == {"NSC": 0.767, "NSCB": 0.685}
    assert ((found["low"] < found["matched"]) & (found["matched"] < found["high"])).all()


def test_planted_mechanisms_are_matched_and_trained_features_are_warned_of(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [
        {"Metadata_Plate": f"Week{week}_1", "Metadata_Well": f"{'ABCDEFGH'[compound]}{copy + 1:02d}",
         "Metadata_pert_iname": f"c{compound}", "Metadata_concentration_uM": "1", "Metadata_moa": f"m{compound // 2}"}
        for compound in range(8) for week in (1, 2) for copy in range(2)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    kinds = table["Metadata_moa"].str[1:].astype(int).to_numpy()
    values = 5 * np.eye(4)[kinds] + rng.normal(size=(len(table), 4))
    table = pd.concat(
        [table.assign(Metadata_part="test"), pd.DataFrame(values).add_prefix("f")], axis=1
    )
    table.to_parquet(tmp_path / "f.parquet", index=False)
    main(Config(out=tmp_path / "out", features=tmp_path / "f.parquet", replicates=100))
    found = pd.read_csv(tmp_path / "out" / "mechanisms.csv")
    assert list(found["matched"]) == [1.0] and found["measure"].tolist() == ["NSC"]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "the labels are in the features" in said
        and "left out (plate Week1_1 has 0 DMSO wells" in said
    )
