"""Calibration error and cross-fitted temperature scaling."""

from __future__ import annotations

import numpy as np
import pytest

from perturbjax.evaluation.calibration import (
    calibration_error,
    confidence,
    confident_accuracies,
    scaled,
    temperature,
)


def simulate_predictions(
    n: int = 4000, sharpened: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate a calibrated model whose logits are then multiplied by `sharpened`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 5)) * 2
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(n)[:, None] > exact.cumsum(axis=1)).sum(axis=1)
    return labels, scaled(exact, 1 / sharpened)


def test_calibrated_model_has_no_error():
    labels, probabilities = simulate_predictions()
    assert calibration_error(labels, probabilities) < 0.02
    assert temperature(labels, probabilities) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sharpened", [3.0, 0.4])
def test_temperature_corrects_over_and_underconfidence(sharpened):
    labels, probabilities = simulate_predictions(sharpened=sharpened)
    result = confidence(labels, probabilities, np.arange(len(labels)) % 2)
    assert result.error > 0.1 and result.scaled_error < 0.03
    assert result.temperature == pytest.approx(sharpened, rel=0.1)


def test_confident_half_is_more_accurate():
    labels, probabilities = simulate_predictions(sharpened=2.0)
    result = confidence(labels, probabilities, np.arange(len(labels)) % 2)
    assert result.half_accuracy > (probabilities.argmax(axis=1) == labels).mean() + 0.1
    assert (scaled(probabilities, 7.0).argmax(axis=1) == probabilities.argmax(axis=1)).all()


def test_confident_half_is_chosen_by_the_predicted_probability():
    # Temperatures of the two parts differ and would exchange the order of their sites.
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 1])
    top = np.array([0.95, 0.94, 0.93, 0.6, 0.92, 0.59, 0.58, 0.57])
    predicted = np.array([0, 1, 0, 1, 1, 1, 0, 0])
    probabilities = np.where(np.arange(2) == predicted[:, None], top[:, None], 1 - top[:, None])
    result = confidence(labels, probabilities, np.arange(8) % 2)
    assert result.half_accuracy == confident_accuracies(labels, probabilities)[3] == 0.75


def test_calibration_error_with_exact_zeros():
    probabilities = np.array([[1.0, 0.0], [0.8, 0.2], [0.8, 0.2], [0.0, 1.0]])
    assert calibration_error(np.array([0, 0, 1, 1]), probabilities) == pytest.approx(
        (abs(2 - 2) + abs(1 - 1.6)) / 4
    )
    assert (
        confidence(np.array([0, 0, 1, 1]), probabilities, np.zeros(4, dtype=int)).temperature == 1.0
    )
    assert np.isfinite(scaled(probabilities, 0.05)).all()
