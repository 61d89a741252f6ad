"""The automatic choice of a split is the strictest that the data allow, with the reason."""

from __future__ import annotations

import pandas as pd
import pytest

from perturbjax.core.config import SplitConfig
from perturbjax.data.split_choice import choose_split
from perturbjax.data.splits import create_manifest, split_name


def make_index(plates: int, layouts: int, one_plate: float = 0.0) -> pd.DataFrame:
    """Plates of eight wells with four treatments; some wells have a class of their plate only."""
    rows = []
    for plate in range(plates):
        for well in range(8):
            own = well < one_plate * 8
            treatment = f"only {plate}" if own else f"t{(well + plate % layouts) % 4}"
            rows.append((f"P{plate}", f"A{well + 1:02d}", treatment))
    index = pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "Metadata_pert_iname"])
    return index.assign(site_id=index["Metadata_Plate"] + index["Metadata_Well"])


@pytest.mark.parametrize(
    ("index", "policy", "reason"),
    [
        (make_index(8, 2), "plate", "2 layouts are fewer than --folds 5"),
        (make_index(10, 5, 0), "plate", "fewer than --folds 5"),
        (make_index(1, 1), "well", "there is only one plate"),
        (make_index(3, 1), "well", "3 plates are fewer than --folds 5"),
        (make_index(6, 1, 0.5), "well", "50% of the sites have a class that occurs on one plate"),
    ],
)
def test_choice_states_why_stricter_splits_are_not_possible(index, policy, reason):
    chosen, sentence = choose_split(index, "Metadata_pert_iname", 5)
    assert chosen == policy and reason in sentence
    assert sentence.startswith(f"info: --split {policy} is the strictest")


def test_layout_is_not_chosen_without_a_column_of_compounds():
    index = make_index(6, 1).rename(columns={"Metadata_pert_iname": "Metadata_gene"})
    policy, sentence = choose_split(index, "Metadata_gene", 5)
    assert policy == "plate"
    assert "not layout: the index has no column that identifies compounds" in sentence


def test_layout_is_chosen_if_it_has_enough_groups():
    index = make_index(8, 2)
    assert choose_split(index, "Metadata_pert_iname", 2)[0] == "layout"


def test_manifest_stores_the_chosen_policy_and_leaves_out_empty_wells():
    index = make_index(3, 1)
    empty = index["Metadata_Well"] == "A08"
    index["Metadata_control_type"] = empty.map({True: "empty", False: "trt"})
    config = SplitConfig()
    manifest = create_manifest(index, config, label="Metadata_pert_iname", seed=0)
    assert split_name(config, manifest) == "well" and len(manifest) == 21
    assert any("control_type==empty: 3 of 24" in note for note in manifest.attrs["notes"])
