"""Changed features: effect sizes, p-values, groups and words."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from perturbjax.core.errors import InputError
from perturbjax.screening.differences import (
    describe,
    difference_table,
    feature_group,
    group_table,
    van_elteren,
)
from screening.simulated_wells import simulate_wells


def test_difference_table_ranks_the_shifted_feature_first():
    wells = simulate_wells(treatments={"a": 2.0, "b": 0.0}, replicates=4)
    table = difference_table(wells, "a")
    assert table["feature"].iloc[0] == "feature_1" and table["effect"].iloc[0] > 1
    assert table["q"].iloc[0] < 0.01
    assert (difference_table(wells, "b")["q"] > 0.05).all()


def test_van_elteren_of_one_plate_is_the_rank_sum_test():
    rng = np.random.default_rng(0)
    values = np.round(rng.standard_normal((14, 3)), 1)
    treated = np.arange(14) < 5
    ours = van_elteren(values, treated, ~treated, np.zeros(14, int))
    theirs = stats.mannwhitneyu(
        values[treated], values[~treated], use_continuity=False, method="asymptotic"
    ).pvalue
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_van_elteren_is_uniform_with_plate_effects():
    rng = np.random.default_rng(1)
    plates = np.repeat([0, 1, 2], 12)
    treated = np.tile(np.arange(12) < 4, 3)
    values = rng.standard_normal((36, 2000)) + 5 * plates[:, None]
    p = van_elteren(values, treated, ~treated, plates)
    assert abs(np.mean(p <= 0.05) - 0.05) < 0.015


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("Cells_Intensity_MeanIntensity_Mito", ("Cells", "Mito", "intensity")),
        ("Nuclei_AreaShape_Area", ("Nuclei", "", "shape")),
        ("component_3", ("", "", "")),
    ],
)
def test_feature_group_reads_cellprofiler_names(name, group):
    assert feature_group(name) == group


def test_describe_puts_changes_into_words():
    wells = simulate_wells(treatments={"a": 0.0}, replicates=4, plate_effect=0.0)
    values = np.abs(wells.values) + 100
    rows = (wells.treatment == "a").to_numpy()
    values[rows, 0] *= 1.2
    names = ("Nuclei_AreaShape_Area", *wells.features[1:])
    changed = type(wells)(**{**vars(wells), "values": values, "features": names})
    table = difference_table(changed, "a")
    assert describe(table) == "nuclei 20 % larger"
    assert group_table(table)["compartment"].iloc[0] == "Nuclei"
    quiet = type(wells)(**{**vars(wells), "values": np.ones_like(values), "features": names})
    assert describe(difference_table(quiet, "a")) == "no feature differs clearly"


def test_difference_table_names_an_unknown_treatment():
    wells = simulate_wells(treatments={"a": 0.0})
    with pytest.raises(InputError, match="treatment 'x' has no well"):
        difference_table(wells, "x")
