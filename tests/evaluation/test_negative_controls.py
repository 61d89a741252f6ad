"""One rule for negative controls: marked rows, else rows named like a vehicle."""

from __future__ import annotations

import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.evaluation.negative_controls import negative_controls
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import ProfileConfig
from perturbjax.screening.wells import find_controls

TABLE = pd.DataFrame(
    {
        "Metadata_Plate": "P1",
        "Metadata_Well": ["A01", "A02", "A03", "A04"],
        "Metadata_pert_iname": ["DMSO", "taxol", "dmso", "ALLN"],
        "Metadata_moa": ["", "tubulin", "", "protease"],
        "Cells_a": [0.1, 0.5, 0.2, 0.7],
    }
)


def test_marked_rows_come_before_vehicle_names():
    marked = TABLE.assign(Metadata_control_type=["", "", "", "negcon"])
    assert negative_controls(marked).tolist() == [False, False, False, True]
    assert negative_controls(TABLE).tolist() == [True, False, True, False]
    # The label can be the mechanism; the vehicle is still found by its name.
    assert negative_controls(TABLE, "Metadata_moa").tolist() == [True, False, True, False]
    assert not negative_controls(TABLE[["Metadata_moa"]], "Metadata_moa").any()


def test_classifiers_and_screens_use_the_same_rule(tmp_path):
    TABLE.to_csv(tmp_path / "profiles.csv", index=False)
    _, controls, _ = load_profiles(ProfileConfig((tmp_path / "profiles.csv",)))
    assert controls.tolist() == find_controls(TABLE, "Metadata_pert_iname").tolist()
    assert controls.tolist() == [True, False, True, False]


def test_a_rule_without_a_match_is_an_error():
    with pytest.raises(
        InputError, match=r"no row matches\. Values of Metadata_moa: protease, tubu"
    ):
        negative_controls(TABLE, control="Metadata_moa=DMSO")
    with pytest.raises(InputError, match="There is no column Metadata_kind"):
        negative_controls(TABLE, control="Metadata_kind=control")
