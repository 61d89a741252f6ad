"""Regression of true traits on features."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.resolution import interval, predict_traits, r_squared, read_truth
from perturbjax.core.errors import InputError


def test_r_squared_separates_visible_and_invisible_traits():
    rng = np.random.default_rng(0)
    plates = np.repeat(["P1", "P2", "P3"], 24)
    traits = rng.normal(size=(72, 2))
    staining = np.repeat(rng.normal(0, 10, (3, 50)), 24, axis=0)
    visible = traits @ rng.normal(size=(2, 50)) + 0.1 * rng.normal(size=(72, 50)) + staining
    errors, deviations = predict_traits(visible, traits, plates)
    assert r_squared(errors, deviations) > 0.95
    low, high = interval(errors, deviations, 200)
    assert low < r_squared(errors, deviations) < high

    errors, deviations = predict_traits(rng.normal(size=(72, 50)), traits, plates)
    assert r_squared(errors, deviations) < 0.2


def test_read_truth_names_the_missing_settings(tmp_path):
    with pytest.raises(InputError, match=r"settings.json: does not exist"):
        read_truth(tmp_path)
