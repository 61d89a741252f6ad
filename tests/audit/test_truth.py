"""The judge judged: on screens whose truth is known, what an audit says is so. The table is in docs/audit.md."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from experiments.audit_truth import QUICK, audit_of, intervals, screen
from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.verdict import verdict


def says_leak(found: AuditResult) -> bool:
    said = verdict(found)
    return said.finding == "chance" and said.leaky


def test_a_position_gradient_without_effect_is_called_a_leak_and_no_effect():
    """Sites of known wells are recognised, wells of new plates are not, and both are said."""
    found = [audit_of(screen(gradient=4.0, seed=seed, **QUICK), folds=3) for seed in range(3)]
    assert np.mean([one["site"].score.value for one in found]) > 0.4
    assert abs(np.mean([one["plate"].score.value for one in found]) - 0.25) < 0.05
    assert all(map(says_leak, found))


@pytest.mark.slow
def test_without_effect_none_is_found_in_ninety_five_of_a_hundred_screens():
    """The leak of some screens of 96 wells is too small to be told from luck; that there is no effect is said."""
    found = [
        verdict(audit_of(screen(gradient=4.0, seed=seed, **QUICK), folds=3)) for seed in range(100)
    ]
    assert sum(one.finding == "chance" for one in found) >= 95
    assert sum(one.leaky for one in found) >= 85


@pytest.mark.parametrize(
    "screens", [pytest.param(3, id="3"), pytest.param(50, id="50", marks=pytest.mark.slow)]
)
def test_a_strong_effect_is_found_on_new_plates(screens):
    found = [
        verdict(audit_of(screen(effect=6.0, seed=seed, **QUICK), folds=3))
        for seed in range(screens)
    ]
    assert sum(one.finding == "beyond" and one.honest for one in found) >= 0.95 * screens


@pytest.mark.slow
def test_an_effect_on_brightness_alone_is_called_brightness():
    found = [audit_of(screen(brightness=8.0, seed=seed, **QUICK), folds=3) for seed in range(50)]
    assert sum(verdict(one).finding != "beyond" for one in found) >= 47


@pytest.mark.slow
def test_the_score_grows_with_the_effect():
    means = [
        np.mean(
            [
                audit_of(screen(effect=effect, seed=seed, **QUICK), folds=3)["plate"].score.value
                for seed in range(8)
            ]
        )
        for effect in (0.0, 1.5, 3.0, 6.0)
    ]
    assert (np.diff(means) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["well", "plate"])
def test_p_is_uniform_without_effect_though_folds_train_on_each_other(policy):
    found = [
        audit_of(screen(gradient=4.0, seed=seed, **QUICK), folds=3)[policy].p for seed in range(200)
    ]
    assert kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) < 0.05) < 0.09


@pytest.mark.slow
def test_intervals_hold_the_truth_where_every_class_counts_alike_and_wells_are_few():
    shares = intervals(300).set_index(["classes", "wells a class"]).astype(float)
    assert shares.to_numpy().min() > 0.9 and shares.to_numpy().mean() > 0.93
