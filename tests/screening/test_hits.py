"""The hit table: effects found, inactive treatments left alone, toxicity and position notes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.screening.hits import Settings, control_test, hit_table, verdict
from perturbjax.screening.wells import find_controls, parse_doses, reduce_profiles
from screening.simulated_wells import simulate_wells

QUICK = Settings(permutations=2000)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    effects = {f"inactive_{number}": 0.0 for number in range(6)} | {"strong": 3.0, "killer": 0.0}
    wells = simulate_wells(treatments=effects, count_effect={"killer": 0.2})
    # The killer's profile follows its cell count, as dead wells' do.
    values = wells.values.copy()
    values[:, 2] += 10 * np.log2(np.maximum(wells.cell_count, 1) / 100)
    return hit_table(type(wells)(**{**vars(wells), "values": values}), QUICK).set_index("treatment")


def test_hit_table_finds_the_active_treatments(table):
    assert table.loc[["strong", "killer"], "active"].all()
    assert not table.drop(index=["strong", "killer"])["active"].any()
    assert list(table.index[:2]) != ["inactive_0", "inactive_1"]


def test_hit_table_separates_cell_count_from_other_effects(table):
    assert table.loc["killer", "toxic"] and not table.loc["strong", "toxic"]
    assert table.loc["killer", "cell_count_ratio"] == pytest.approx(0.2, abs=0.05)
    assert table.loc["strong", "active_beyond_count"]
    assert not table.loc["killer", "active_beyond_count"]


def test_verdict_counts_active_treatments(table):
    assert verdict(table.reset_index()).startswith("2 of 8 treatments are active at 5% false")
    assert "1 of them only by cell count" in verdict(table.reset_index())


def test_hit_table_is_reproducible():
    wells = simulate_wells(treatments={"a": 1.0, "b": 0.0})
    assert hit_table(wells, QUICK).equals(hit_table(wells, QUICK))


def test_false_discoveries_stay_at_their_level():
    """Forty inactive treatments on plates with gradients: hardly any may be called active."""
    effects = {f"inactive_{number:02d}": 0.0 for number in range(40)}
    wells = simulate_wells(treatments=effects, plates=2, replicates=1, gradient=2.0, seed=5)
    assert hit_table(wells, Settings(permutations=500))["active"].sum() <= 2


def test_control_test_reports_calibration():
    wells = simulate_wells(treatments={"a": 0.0, "b": 0.0}, controls=24)
    rates = control_test(wells, draws=60)
    assert rates["draws"] > 40
    assert all(rates[method] <= 0.15 for method in ("map", "energy_distance", "mahalanobis"))


def test_one_replicate_has_no_map_but_other_tests():
    wells = simulate_wells(treatments={"a": 0.0}, plates=1, replicates=1, controls=40)
    row = hit_table(wells, QUICK).iloc[0]
    assert np.isnan(row["map_p"]) and np.isfinite(row["energy_distance_p"])
    assert "one well" in row["note"]


def test_notes_name_replicates_in_one_column():
    wells = simulate_wells(treatments={"a": 0.0}, plates=1, replicates=3, controls=30)
    metadata = wells.metadata.copy()
    metadata.loc[wells.treatment == "a", "Metadata_Well"] = ["B05", "C05", "F05"]
    moved = type(wells)(**{**vars(wells), "metadata": metadata})
    assert "all replicates in one column" in hit_table(moved, QUICK).iloc[0]["note"]


def test_find_controls_names_the_flag():
    metadata = pd.DataFrame({"Metadata_pert_iname": ["a", "b"]})
    with pytest.raises(InputError, match="--negcon: no well is a negative control"):
        find_controls(metadata, "Metadata_pert_iname")


def test_reduce_profiles_ignores_missing_infinite_and_constant_features():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 4))
    broken = np.column_stack([values, np.full(20, 3.0), np.full(20, np.nan)])
    broken[3, 0] = np.inf
    plates = np.repeat([0, 1], 10)
    reduced = reduce_profiles(broken, plates)
    assert reduced.shape == (20, 4) and np.isfinite(reduced).all()
    with pytest.raises(InputError, match="constant or missing"):
        reduce_profiles(np.full((5, 2), np.nan), np.zeros(5, dtype=int))


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("Metadata_dose_nM", ["10", "100"], [0.01, 0.1]),
        ("Metadata_concentration", ["10 nM", "1 mM", ""], [0.01, 1000, np.nan]),
        ("Metadata_forskolin_uM", ["0.008", "5"], [0.008, 5]),
    ],
)
def test_parse_doses_reads_units(column, values, expected):
    np.testing.assert_allclose(parse_doses(pd.Series(values, name=column)), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [(["10 nM", "5"], "has a unit and"), (["ten"], "row 0, 'ten' is not a concentration")],
)
def test_parse_doses_refuses_mixed_or_unreadable_values(values, message):
    with pytest.raises(InputError, match=message):
        parse_doses(pd.Series(values, name="Metadata_dose"))
