"""Similar treatments: neighbors, restrictions and enrichment of mechanisms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.screening.similarity import (
    cluster_tree,
    match_mechanisms,
    mechanism_enrichment,
    mechanism_scores,
    neighbor_table,
    similarity_matrix,
)
from perturbjax.screening.wells import Wells
from screening.simulated_wells import simulate_wells

MECHANISM = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b", "b3": "b"}


@pytest.fixture(scope="module")
def wells():
    """Two mechanisms that move different features, and inactive treatments."""
    names = {**dict.fromkeys(MECHANISM, 0.0), **{f"none_{n}": 0.0 for n in range(6)}}
    drawn = simulate_wells(treatments=names, plates=4, replicates=1, controls=24)
    values = drawn.values.copy()
    for name, mechanism in MECHANISM.items():
        values[np.ix_((drawn.treatment == name).to_numpy(), [3 if mechanism == "a" else 5])] += 8
    return type(drawn)(**{**vars(drawn), "values": values})


@pytest.mark.parametrize("restriction", ["none", "plate", "position"])
def test_neighbors_share_the_mechanism(wells, restriction):
    table = neighbor_table(wells, restriction=restriction, top=2)
    own = table[table["treatment"].isin(MECHANISM)]
    assert (own["neighbor"].str[0] == own["treatment"].str[0]).all()
    assert (own["q"] <= 0.05).all()
    inactive = table[table["treatment"].str.startswith("none")]
    assert (inactive["q"] <= 0.05).mean() <= 0.2


def test_restriction_leaves_out_pairs_of_one_plate(wells):
    matrix = similarity_matrix(wells, "layout")
    assert np.isfinite(matrix.to_numpy()).all()  # every plate has its own layout
    first = wells.metadata["Metadata_Plate"] == "P0"
    one = type(wells)(
        **{
            **vars(wells),
            "metadata": wells.metadata[first].reset_index(drop=True),
            "values": wells.values[first],
            "treatment": wells.treatment[first].reset_index(drop=True),
            "control": wells.control[first],
            "positive": wells.positive[first],
            "cell_count": wells.cell_count[first],
        }
    )
    off_diagonal = similarity_matrix(one, "plate").to_numpy()[~np.eye(12, dtype=bool)]
    assert np.isnan(off_diagonal).all()


def test_cluster_tree_puts_mechanisms_together(wells):
    order = [name for name in cluster_tree(similarity_matrix(wells))[1] if name in MECHANISM]
    assert order in (sorted(order, key=lambda n: n[0]), sorted(order, key=lambda n: -ord(n[0])))


def test_mechanism_enrichment_finds_the_own_mechanism(wells):
    table = mechanism_enrichment(neighbor_table(wells, top=2), MECHANISM)
    own = table[table["own"]]
    assert set(own["treatment"]) == set(MECHANISM) and (own["neighbors"] == 2).all()


def test_match_mechanisms_counts_treatments_with_a_possible_match(wells):
    mechanism = MECHANISM | {"none_0": "alone"}
    counted, matched, chance = match_mechanisms(similarity_matrix(wells), mechanism)
    assert counted == 6 and matched == 1.0 and chance == pytest.approx(2 / 6)


def test_mechanism_scores_equal_a_hand_computation(monkeypatch):
    """Treatments in the plane: degrees, mechanism and batch. a1 and a2 are doses of one compound.

    NSC: the nearest other compounds are b, b, a2, b, c: four of five have the same mechanism.
    NSCB: a1 has b, b has c, c has b, d has c; a2 can only have c and cannot match.
    """
    degrees = {"a1": 0, "a2": 12, "b": 22, "c": 40, "d": 130}
    mechanism = {"a1": "x", "a2": "x", "b": "x", "c": "y", "d": "y"}
    angles = np.deg2rad(list(degrees.values()))
    names, none = pd.Series(list(degrees)), np.zeros(5, dtype=bool)
    metadata = pd.DataFrame({"Metadata_Plate": ["P"] * 5, "Metadata_Batch": list("12212")})
    profiles = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    drawn = Wells(metadata, profiles, ("f", "g"), names, none, none, None, names.str[0])
    relative = "perturbjax.screening.similarity.relative_to_controls"
    monkeypatch.setattr(relative, lambda wells: wells.values)
    scores = mechanism_scores(drawn, mechanism, "Metadata_Batch")
    assert scores["NSC"] == (5, 4 / 5, pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 4 + 1 / 4) / 5))
    assert scores["NSCB"] == (4, 2 / 4, pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 2) / 4))
    assert list(mechanism_scores(drawn, mechanism)) == ["NSC"]


def test_treatments_of_one_compound_are_no_neighbors(wells):
    """With doses, a1 and a2 are two doses of one compound: a3 is the neighbor of both."""
    compound = wells.treatment.replace({"a1": "a", "a2": "a"})
    matrix = similarity_matrix(type(wells)(**{**vars(wells), "compound": compound}))
    assert np.isnan(matrix.loc["a1", "a2"])
    assert matrix.loc["a1"].drop("a1").idxmax() == "a3"


def test_neighbors_come_from_the_reference(wells):
    reference = (wells.metadata["Metadata_Plate"] >= "P2").to_numpy()
    table = neighbor_table(wells, top=1, reference=reference)
    own = table[table["treatment"].isin(MECHANISM)]
    assert len(own) == 6 and (own["neighbor"].str[0] == own["treatment"].str[0]).all()
    assert (own["q"] <= 0.05).all()


def test_mechanism_enrichment_is_empty_without_labels():
    empty = pd.DataFrame({"treatment": ["x"], "neighbor": ["y"]})
    assert mechanism_enrichment(empty, {}).empty
