"""Calibration: what is overconfident is found to be, a temperature mends it on sites it was not fitted on."""

from __future__ import annotations

import numpy as np
import pytest

from perturbjax.evaluation.calibration import calibration_error, confidence, scaled, temperature


def answers(n: int = 4000, sharpened: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the probabilities of a model that knows itself, which then says `sharpened` times as much."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 5)) * 2
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(n)[:, None] > honest.cumsum(axis=1)).sum(axis=1)
    return labels, scaled(honest, 1 / sharpened)


def test_a_model_that_knows_itself_has_no_error_and_needs_no_temperature():
    labels, probabilities = answers()
    assert calibration_error(labels, probabilities) < 0.02
    assert temperature(labels, probabilities) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sharpened", [3.0, 0.4])
def test_what_says_too_much_or_too_little_is_mended_on_sites_that_nothing_was_fitted_on(sharpened):
    labels, probabilities = answers(sharpened=sharpened)
    found = confidence(labels, probabilities, np.arange(len(labels)) % 2)
    assert found.error > 0.1 and found.scaled_error < 0.03
    assert found.temperature == pytest.approx(sharpened, rel=0.1)


def test_the_confident_half_is_more_accurate_and_a_temperature_changes_no_answer():
    labels, probabilities = answers(sharpened=2.0)
    found = confidence(labels, probabilities, np.arange(len(labels)) % 2)
    assert found.half_accuracy > (probabilities.argmax(axis=1) == labels).mean() + 0.1
    assert (scaled(probabilities, 7.0).argmax(axis=1) == probabilities.argmax(axis=1)).all()


def test_by_hand_and_with_exact_zeros():
    probabilities = np.array([[1.0, 0.0], [0.8, 0.2], [0.8, 0.2], [0.0, 1.0]])
    assert calibration_error(np.array([0, 0, 1, 1]), probabilities) == pytest.approx(
        (abs(2 - 2) + abs(1 - 1.6)) / 4
    )
    assert (
        confidence(np.array([0, 0, 1, 1]), probabilities, np.zeros(4, dtype=int)).temperature == 1.0
    )
    assert np.isfinite(scaled(probabilities, 0.05)).all()
