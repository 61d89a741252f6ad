"""Permutation tests of treatments against controls."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from perturbjax.screening.activity import (
    average_precision_statistic,
    center_by_plate,
    energy_statistic,
    mahalanobis_statistic,
)
from perturbjax.screening.permutations import (
    Draws,
    make_pool,
    permutation_test,
    permutation_tests,
)

STATISTICS = {
    "map": average_precision_statistic,
    "energy": energy_statistic,
    "mahalanobis": mahalanobis_statistic,
}


def plate_of_wells(rng, *, plates, controls, treated, shared_layout=False, gradient=0.0):
    """Profiles without any effect: (values, plates, positions, treated)."""
    layout = rng.permutation(96)[: controls + treated]
    values, numbers, positions, labels = [], [], [], []
    for plate in range(plates):
        if not shared_layout:
            layout = rng.permutation(96)[: controls + treated]
        profile = rng.standard_normal((len(layout), 6)) + rng.standard_normal(6)
        profile[:, 0] += gradient * (layout % 12) / 11
        values.append(profile)
        numbers += [plate] * len(layout)
        positions += list(layout)
        labels += [number < treated for number in range(len(layout))]
    return np.concatenate(values), np.array(numbers), np.array(positions), np.array(labels)


def p_values(rng, repeats, *, shared_layout=False, **design):
    found = {name: [] for name in STATISTICS}
    for _ in range(repeats):
        values, plates, positions, treated = plate_of_wells(
            rng, shared_layout=shared_layout, **design
        )
        layouts = np.zeros(len(plates), dtype=int) if shared_layout else plates
        pool = make_pool(treated, ~treated, plates, positions, layouts)
        centered = center_by_plate(values[pool.wells], pool.plates)
        for name, make in STATISTICS.items():
            seed = int(rng.integers(2**31))
            test = permutation_test(make(centered, pool), pool, permutations=99, seed=seed)
            found[name].append(test[1])
    return pool, {name: np.array(p) for name, p in found.items()}


@pytest.mark.parametrize(
    ("design", "unit"),
    [
        ({"plates": 1, "controls": 12, "treated": 3}, "well"),
        ({"plates": 4, "controls": 4, "treated": 1}, "well"),
        ({"plates": 3, "controls": 24, "treated": 1, "gradient": 4.0}, "well"),
        (
            {"plates": 3, "controls": 24, "treated": 1, "gradient": 4.0, "shared_layout": True},
            "position",
        ),
    ],
)
def test_p_values_are_uniform_without_effect(design, unit):
    pool, found = p_values(np.random.default_rng(0), 120, **design)
    assert pool.unit == unit
    for name, p in found.items():
        assert np.mean(p <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(p)), name
        # Early stopping and few assignments make p-values discrete; compare coarse quantiles.
        assert abs(np.mean(p <= 0.5) - 0.5) < 0.16, name


def test_replicates_at_one_position_count_once():
    """With wells as units a position effect on every plate would look like an effect."""
    rng = np.random.default_rng(1)
    design = {"plates": 4, "controls": 24, "treated": 1, "gradient": 12.0}
    rejected = 0
    for _ in range(40):
        values, plates, positions, treated = plate_of_wells(rng, shared_layout=True, **design)
        pool = make_pool(treated, ~treated, plates, positions, plates)  # layouts not known
        centered = center_by_plate(values[pool.wells], pool.plates)
        test = permutation_test(
            mahalanobis_statistic(centered, pool),
            pool,
            permutations=99,
            seed=int(rng.integers(2**31)),
        )
        rejected += test[1] <= 0.05
    assert rejected > 8  # far above the nominal 2: why positions are exchanged as a whole


def test_too_few_wells_give_no_p_value():
    treated = np.array([True, False, False, False])
    pool = make_pool(treated, ~treated, np.zeros(4, int), np.arange(4), np.zeros(4, int))
    value, p = permutation_test(
        lambda rows: rows[:, 0].astype(float),
        pool,
        permutations=99,
    )
    assert pool.smallest_p == 0.25 and np.isnan(p) and value == 0


def test_pool_leaves_out_plates_without_controls():
    plates = np.array([0, 0, 0, 1, 1])
    treated = np.array([True, False, False, True, True])
    control = np.array([False, True, True, False, False])
    pool = make_pool(treated, control, plates, np.arange(5), plates)
    assert pool.treated == 1 and set(pool.wells) == {0, 1, 2}
    assert make_pool(plates == 1, control, plates, np.arange(5), plates) is None


def test_energy_statistic_matches_scipy_in_one_dimension():
    rng = np.random.default_rng(2)
    values = rng.standard_normal((9, 1))
    treated = np.arange(9) < 4
    pool = make_pool(treated, ~treated, np.zeros(9, int), np.arange(9), np.zeros(9, int))
    ours = energy_statistic(values, pool)(np.arange(4)[None])[0]
    assert ours == pytest.approx(stats.energy_distance(values[:4, 0], values[4:, 0]) ** 2)


def test_average_precision_statistic_matches_copairs():
    """The oracle is copairs' own average precision of replicates against controls."""
    import pandas as pd
    from copairs.map import average_precision

    rng = np.random.default_rng(3)
    plates = np.repeat([0, 1], 8)
    treated = np.tile(np.arange(8) < 3, 2)
    values = rng.standard_normal((16, 5))
    pool = make_pool(treated, ~treated, plates, np.arange(16), plates)
    ours = average_precision_statistic(values[pool.wells], pool)(np.arange(6)[None])[0]
    table = pd.DataFrame({"plate": plates, "name": np.where(treated, "t", "c"), "treated": treated})
    theirs = average_precision(
        table,
        values,
        pos_sameby=["name"],
        pos_diffby=[],
        neg_sameby=["plate"],
        neg_diffby=["treated"],
    )
    expected = theirs.loc[treated, "average_precision"].mean()
    assert ours == pytest.approx(expected, abs=1e-5)


def test_equally_similar_controls_come_first():
    treated = np.arange(5) < 2
    pool = make_pool(treated, ~treated, np.zeros(5, int), np.arange(5), np.zeros(5, int))
    value = average_precision_statistic(np.ones((5, 3)), pool)(np.arange(2)[None])[0]
    assert value == 1 / 4


def test_permutations_do_not_depend_on_earlier_tests():
    """Tests share drawn permutations: order and other treatments must not change a p-value."""
    rng = np.random.default_rng(0)
    pools = []
    for count in (3, 5):
        treated = np.arange(40) < count
        pools.append(
            make_pool(treated, ~treated, np.zeros(40, int), np.arange(40), np.zeros(40, int))
        )
    values = rng.standard_normal((40, 4))

    def p_values(order, draws):
        return {
            number: permutation_tests(
                {"": energy_statistic(values, pools[number])},
                pools[number],
                permutations=999,
                draws=draws,
            )[""]
            for number in order
        }

    assert p_values((0, 1), Draws(1)) == p_values((1, 0), Draws(1))
