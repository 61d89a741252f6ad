"""Audits of simulated screens with known effects; docs/audit.md has the table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from experiments.audit_truth import SIZE, audit_of, intervals, screen
from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.verdict import verdict

pytestmark = pytest.mark.full


def detects_leak_only(result: AuditResult) -> bool:
    conclusion = verdict(result)
    return conclusion.finding == "chance" and conclusion.has_leak


def test_position_gradient_is_a_leak_without_effect():
    """Other sites of training wells are recognized, wells of new plates are not."""
    results = [audit_of(screen(gradient=4.0, seed=seed, **SIZE), folds=3) for seed in range(3)]
    assert np.mean([one["site"].score.value for one in results]) > 0.4
    assert abs(np.mean([one["plate"].score.value for one in results]) - 0.25) < 0.05
    assert all(map(detects_leak_only, results))


@pytest.mark.slow
def test_audit_has_few_false_positives():
    """At most 5 % of screens without effect are called positive."""
    results = [
        verdict(audit_of(screen(gradient=4.0, seed=seed, **SIZE), folds=3)) for seed in range(100)
    ]
    assert sum(one.finding == "chance" for one in results) >= 95
    assert sum(one.has_leak for one in results) >= 85


@pytest.mark.parametrize(
    "screens", [pytest.param(3, id="3"), pytest.param(50, id="50", marks=pytest.mark.slow)]
)
def test_strong_effect_is_detected_on_new_plates(screens):
    results = [
        verdict(audit_of(screen(effect=6.0, seed=seed, **SIZE), folds=3)) for seed in range(screens)
    ]
    assert sum(one.finding == "beyond" and one.is_valid for one in results) >= 0.95 * screens


@pytest.mark.slow
def test_brightness_effect_is_explained_by_intensity():
    results = [audit_of(screen(brightness=8.0, seed=seed, **SIZE), folds=3) for seed in range(50)]
    assert sum(verdict(one).finding != "beyond" for one in results) >= 47


@pytest.mark.slow
def test_score_increases_with_effect():
    means = [
        np.mean(
            [
                audit_of(screen(effect=effect, seed=seed, **SIZE), folds=3)["plate"].score.value
                for seed in range(8)
            ]
        )
        for effect in (0.0, 1.5, 3.0, 6.0)
    ]
    assert (np.diff(means) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["well", "plate"])
def test_p_is_uniform_without_effect_across_folds(policy):
    results = [
        audit_of(screen(gradient=4.0, seed=seed, **SIZE), folds=3)[policy].p for seed in range(200)
    ]
    assert kstest(results, "uniform").pvalue > 0.01
    assert np.mean(np.array(results) < 0.05) < 0.09


@pytest.mark.slow
def test_intervals_cover_the_true_score():
    shares = intervals(300).set_index(["classes", "wells a class"]).astype(float)
    assert shares.to_numpy().min() > 0.9 and shares.to_numpy().mean() > 0.93
