"""What bounds a score is told on screens where it is known: new compounds, few plates, classes that are one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.ceiling import PAIRS, Baseline, confused, familiar, known, learn
from perturbjax.profiles.profile_table import Profiles
from perturbjax.profiles.table_steps import as_table

PLATES, SITES = 20, 36


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    """Three mechanisms of which two look the same; of the third one compound stands on one plate, and looks like no
    other."""
    rng = np.random.default_rng(0)
    n = PLATES * SITES
    plates = np.repeat(np.arange(PLATES), SITES)
    kind = np.tile(np.repeat(np.arange(3), 4), n // 12)
    lonely = (kind == 2) & (plates == 0)
    centres = np.array([[4.0, 0, 0], [4.0, 0, 0], [0, 4.0, 0]])
    values = rng.normal(size=(n, 12)).astype(np.float32)
    values[:, :3] += np.where(lonely[:, None], [4.0, 0, 0], centres[kind])
    metadata = pd.DataFrame(
        {
            "site_id": [f"s{i}" for i in range(n)],
            "Metadata_Plate": [f"P{plate:02d}" for plate in plates],
            "Metadata_Well": [f"A{1 + (i % SITES) // 4:02d}" for i in range(n)],
            "Metadata_pert_iname": np.where(lonely, "lonely", np.array(["a", "b", "c"])[kind]),
            "Metadata_moa": np.array(["one", "two", "three"])[kind],
        }
    ).astype(str)
    profiles = Profiles(metadata, values, tuple(f"f{i}" for i in range(12)))
    return Baseline(as_table(profiles, np.zeros(n, bool)), metadata, "Metadata_moa")


@pytest.fixture(scope="module")
def learned(baseline) -> tuple[pd.DataFrame, np.ndarray]:
    return learn(baseline, seed=0)


def test_every_site_is_answered_by_plates_that_are_not_its_own(baseline, learned):
    table, answered = learned
    np.testing.assert_allclose(answered.sum(1), 1, rtol=1e-6)
    assert list(table["share of plates"]) == [0.25, 0.5, 1.0]
    assert list(table["plates"]) == [4, 8, 16] and list(table["sites"]) == [
        4 * SITES,
        8 * SITES,
        16 * SITES,
    ]
    assert table["accuracy"].iloc[-1] > 0.6


def test_a_compound_on_no_training_plate_is_told_apart_from_those_there(baseline, learned):
    table = familiar(baseline, learned[1]).set_index("compound stands on")
    assert (
        table.loc["no training plate", "sites"] == 12
        and table.loc["no training plate", "accuracy"] < 0.2
    )
    assert (
        table.loc["two or more", "sites"] == PLATES * SITES - 12
        and table.loc["two or more", "accuracy"] > 0.6
    )
    assert table.loc["any", "sites"] == PLATES * SITES


def test_answers_of_a_well_together_are_better_than_one_by_one(baseline, learned):
    table = known(baseline, learned[1]).set_index("kept whole")
    assert list(table.index) == ["plate", "well", "site"]
    assert (table["accuracy, its well's mean"] >= table["accuracy"] - 0.02).all()


def test_classes_that_are_one_are_those_confused(baseline, learned):
    table = confused(baseline, learned[1])
    assert len(table) <= PAIRS
    assert {tuple(row) for row in table[["is", "taken for"]].head(2).to_numpy()} == {
        ("one", "two"),
        ("two", "one"),
    }
    assert 0.3 < table["of the class"].iloc[0] < 0.7
