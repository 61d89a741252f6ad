"""Dose response: curves, trend, lowest effective dose, and the published organoid outcome."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile

from perturbjax.screening.doses import (
    Curve,
    analyze_dose_response,
    describe_ec50,
    fit_curve,
    lowest_effective_dose,
    outcome,
    trend_test,
)
from perturbjax.screening.permutations import adjust

DOSES = np.repeat(10.0 ** np.arange(-3, 3), 3)


def wells_of(curve: Curve | None, noise: float, rng: np.random.Generator) -> np.ndarray:
    mean = np.ones(len(DOSES)) if curve is None else curve(DOSES)
    return mean + noise * rng.standard_normal(len(DOSES))


@pytest.mark.parametrize("ec50", [0.02, 0.5, 8.0])
@pytest.mark.parametrize("top", [3.0, 0.2])
def test_fit_curve_recovers_parameters(ec50, top):
    curve = Curve(bottom=1.0, top=top, ec50=ec50, slope=1.5)
    fitted = fit_curve(DOSES, curve(DOSES), np.ones(4))
    assert fitted.ec50 == pytest.approx(ec50, rel=0.05)
    assert fitted.bottom == pytest.approx(1.0, abs=0.02)
    assert fitted.top == pytest.approx(top, abs=0.05)


def test_trend_p_values_are_uniform_without_effect():
    rng = np.random.default_rng(0)
    plates = np.tile([0, 1, 2], 6)
    p = [trend_test(DOSES, wells_of(None, 1, rng) + plates, plates, rng)[1] for _ in range(40)]
    assert np.mean(np.array(p) <= 0.05) <= 0.14 and 0.3 < np.mean(p) < 0.7


def test_ec50_interval_covers_the_true_value():
    rng = np.random.default_rng(1)
    curve = Curve(bottom=1.0, top=2.0, ec50=0.5, slope=1.2)
    covered = 0
    for seed in range(25):
        result = analyze_dose_response(
            DOSES, wells_of(curve, 0.1, rng), np.zeros(len(DOSES), int), seed=seed
        )
        covered += result.ec50_low <= curve.ec50 <= result.ec50_high
    assert covered >= 21


def test_lowest_effective_dose_is_tested_from_above():
    doses = np.repeat([0.0, 1.0, 2.0, 4.0], 4)
    spread = np.tile([-0.1, -0.05, 0.05, 0.1], 4)
    assert lowest_effective_dose(doses, np.repeat([0.0, 0.02, 5, 5], 4) + spread) == 2.0
    assert np.isnan(lowest_effective_dose(doses, np.repeat([0.0, 5, 5, 0.02], 4) + spread))


def test_outcome_names_missing_response_and_range():
    rng = np.random.default_rng(3)
    flat = analyze_dose_response(DOSES, wells_of(None, 1, rng), np.zeros(len(DOSES), int))
    assert outcome(flat, (1e-3, 100), max(flat.p, 0.2)) == "no dose response"
    late = analyze_dose_response(
        DOSES[:9],
        np.repeat([1.0, 1.01, 1.2], 3) + 1e-3 * rng.standard_normal(9),
        np.zeros(9, int),
    )
    assert late.curve is None  # three doses are too few for four parameters
    above = Curve(1, 2, 500, 1)
    result = analyze_dose_response(DOSES, above(DOSES), np.zeros(len(DOSES), int))
    assert outcome(result, (1e-3, 100), 0.001) == "response, EC50 above the tested range"
    assert describe_ec50(result, (1e-3, 100)) == ">100"


@pytest.mark.shared
def test_organoid_swelling_has_the_published_outcome(shared):
    """Forskolin alone is flat; both correctors swell to 1.7; images at T0 show no response."""
    folder = shared / "data/organoid_doses"
    table = pd.read_csv(folder / "load_data_T6.csv")
    area = {
        time: np.array(
            [
                np.count_nonzero(tifffile.imread(folder / f"masks/{well}_{time}_labels.tif"))
                for well in table["Metadata_Well"]
            ]
        )
        for time in ("T0", "T6")
    }
    responses = {"ratio": area["T6"] / area["T0"], "T0": area["T0"].astype(float)}
    results = {
        (response, name): analyze_dose_response(
            rows["Metadata_forskolin_uM"].to_numpy(),
            values[rows.index],
            np.zeros(len(rows), int),
        )
        for response, values in responses.items()
        for name, rows in table.groupby("Metadata_pert_iname")
    }
    q = {
        response: dict(
            zip(
                [name for kind, name in results if kind == response],
                adjust(pd.Series([r.p for (kind, _), r in results.items() if kind == response])),
                strict=True,
            )
        )
        for response in responses
    }
    assert {name: bool(value <= 0.05) for name, value in q["ratio"].items()} == {
        "fsk": False,
        "fsk_770": True,
        "fsk_809": True,
        "fsk_770_809": True,
    }
    assert all(value > 0.05 for value in q["T0"].values())
    both = results["ratio", "fsk_770_809"]
    assert both.curve.ec50 == pytest.approx(0.3, abs=0.1) and both.max_effect > 0.65
    assert both.lowest_effective_dose == pytest.approx(0.128)
    assert abs(results["ratio", "fsk"].max_effect) < 0.03
