"""Labels exchanged between wells: p is uniform without an effect, small with one, absent where it would say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from perturbjax.evaluation.baselines import BaselineUnavailable
from perturbjax.evaluation.permutation import permutation_p


def plates(seed: int, *, skill: float = 0.0, wells: int = 24, classes: int = 4):
    """Labels, probabilities, wells and plates of two plates of wells of two sites; sites of a well err together."""
    rng = np.random.default_rng(seed)
    of_well = np.concatenate(
        [rng.permutation(np.resize(np.arange(classes), wells)) for _ in range(2)]
    )
    logits = rng.normal(size=(2 * wells, classes)) + skill * np.eye(classes)[of_well]
    site = np.repeat(np.arange(2 * wells), 2)
    logits = logits[site] + 0.3 * rng.normal(size=(4 * wells, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return of_well[site], probabilities, site, site // wells


def test_p_is_uniform_without_an_effect_though_sites_of_a_well_err_together():
    found = [permutation_p(*plates(seed), permutations=199, seed=seed) for seed in range(150)]
    assert kstest(found, "uniform").pvalue > 0.01


def test_p_is_small_with_an_effect():
    assert permutation_p(*plates(0, skill=3.0), permutations=499) == 1 / 500


def test_a_difference_between_plates_alone_is_no_effect():
    """Each plate has its own classes, and the answer knows the plate and nothing else."""
    rng = np.random.default_rng(0)
    plate = np.repeat([0, 1], 24)
    labels = 2 * plate + rng.integers(2, size=48)
    answer = np.eye(4)[2 * plate + rng.integers(2, size=48)]
    assert permutation_p(labels, answer, np.arange(48), plate, permutations=499) > 0.05


@pytest.mark.parametrize(
    ("labels", "wells", "blocks", "why"),
    [
        ([0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0], "there are 6 ways to deal the labels"),
        ([0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 1, 1], "there are 1 ways to deal the labels"),
        ([0, 1, 0, 1], [0, 0, 1, 2], [0, 0, 0, 0], "the sites of one well have different labels"),
    ],
)
def test_where_it_would_say_nothing_there_is_no_p(labels, wells, blocks, why):
    answer = np.full((4, 2), 0.5)
    with pytest.raises(BaselineUnavailable, match=why):
        permutation_p(np.array(labels), answer, np.array(wells), np.array(blocks))
