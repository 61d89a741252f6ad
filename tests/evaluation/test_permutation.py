"""Permutation test: uniform p without effect, small p with effect."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from perturbjax.evaluation.baselines import BaselineUnavailable
from perturbjax.evaluation.permutation import permutation_p


def plates(seed: int, *, skill: float = 0.0, wells: int = 24, classes: int = 4):
    """Simulate two plates of wells with two correlated sites."""
    rng = np.random.default_rng(seed)
    well_labels = np.concatenate(
        [rng.permutation(np.resize(np.arange(classes), wells)) for _ in range(2)]
    )
    logits = rng.normal(size=(2 * wells, classes)) + skill * np.eye(classes)[well_labels]
    site = np.repeat(np.arange(2 * wells), 2)
    logits = logits[site] + 0.3 * rng.normal(size=(4 * wells, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return well_labels[site], probabilities, site, site // wells


def test_permutation_p_is_uniform_without_effect():
    found = [permutation_p(*plates(seed), permutations=199, seed=seed) for seed in range(150)]
    assert kstest(found, "uniform").pvalue > 0.01


def test_permutation_p_is_small_with_effect():
    assert permutation_p(*plates(0, skill=3.0), permutations=499) == 1 / 500


def test_permutation_p_ignores_plate_effects():
    """Each plate has other classes, and predictions depend only on the plate."""
    rng = np.random.default_rng(0)
    plate = np.repeat([0, 1], 24)
    labels = 2 * plate + rng.integers(2, size=48)
    prediction = np.eye(4)[2 * plate + rng.integers(2, size=48)]
    assert permutation_p(labels, prediction, np.arange(48), plate, permutations=499) > 0.05


@pytest.mark.parametrize(
    ("labels", "wells", "blocks", "why"),
    [
        ([0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0], "only 6 arrangements"),
        ([0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 1, 1], "only 1 arrangements"),
        ([0, 1, 0, 1], [0, 0, 1, 2], [0, 0, 0, 0], "sites of one well have different labels"),
    ],
)
def test_permutation_p_requires_enough_arrangements(labels, wells, blocks, why):
    prediction = np.full((4, 2), 0.5)
    with pytest.raises(BaselineUnavailable, match=why):
        permutation_p(np.array(labels), prediction, np.array(wells), np.array(blocks))
