"""Calibration of predicted probabilities, and accuracy among the most confident sites.

The expected calibration error (ECE) is the mean difference between confidence and accuracy over
ten bins of confidence. Temperature scaling replaces p by softmax(log p / T): T > 1 lowers the
confidence of an overconfident model and leaves the ranking of the classes unchanged. T minimizes
the log loss on sites other than those that are scored (cross-fitting).

Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

#: Lower limit of probabilities, since exact zeros (neighbors, forests) have no logarithm.
_MIN_PROBABILITY = 1e-6
#: Maximum temperature, and one over the minimum.
_MAX_TEMPERATURE = 20.0
#: Number of bins of confidence.
BINS = 10


@dataclass(frozen=True)
class Confidence:
    """Calibration of a model on its test sites."""

    error: float
    """Expected calibration error."""
    scaled_error: float
    """The same after temperature scaling with a temperature from other sites."""
    temperature: float
    """Mean temperature; above 1 the model is overconfident, below 1 underconfident."""
    half_accuracy: float
    """Accuracy among the more confident half of the sites."""


def calibration_error(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> float:
    """Compute the expected calibration error: mean |accuracy - confidence| over samples."""
    confidences, accuracies, sites = confidence_bins(labels, probabilities)
    return float((np.abs(accuracies - confidences) * sites).sum() / len(labels))


def confidence_bins(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """Return mean confidence, accuracy and number of sites of each bin with sites."""
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    # Bins of equal width; a confidence of 1 belongs to the last bin.
    bins = np.minimum((top * BINS).astype(int), BINS - 1)
    sites = np.bincount(bins, minlength=BINS)
    filled = sites > 0
    means = [np.bincount(bins, values, BINS)[filled] / sites[filled] for values in (top, right)]
    return means[0], means[1], sites[filled]


def confident_accuracies(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> Float[np.ndarray, " n"]:
    """Return the accuracy of the k most confident sites for k from 1 to n.

    Confidence is the predicted probability, without temperature scaling: cross-fitted temperatures
    differ between the parts, and would change the order of the sites.
    """
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    right = probabilities[order].argmax(axis=1) == labels[order]
    return np.cumsum(right) / np.arange(1, len(right) + 1)


def half_of(n: int) -> int:
    """Return the number of sites in the more confident half."""
    return max(1, n // 2)


def temperature(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> float:
    """Fit the temperature T that minimizes the log loss of softmax(log p / T)."""
    # Imported here, because the import takes half a second and `predict` does not need it.
    from scipy.optimize import minimize_scalar

    sites = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        own = scaled(probabilities, np.exp(log_temperature))[sites, labels]
        return float(-np.log(np.maximum(own, _MIN_PROBABILITY)).mean())

    # Optimize log T, so that T and 1 / T are treated symmetrically.
    end = np.log(_MAX_TEMPERATURE)
    return float(np.exp(minimize_scalar(loss, bounds=(-end, end), method="bounded").x))


def scaled(
    probabilities: Float[np.ndarray, "n classes"], temperature: float
) -> Float[np.ndarray, "n classes"]:
    """Compute softmax(log p / T), which changes the confidence and not the ranking."""
    # softmax(log p / T) equals p^(1/T), divided by the sum over classes.
    powers = np.maximum(probabilities, _MIN_PROBABILITY).astype(float) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def halves_of_wells(wells: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """Assign each site to one of two random halves of the wells, 0 or 1."""
    # Sites of one well share the permuted well number, so they are in the same half.
    return np.random.default_rng(seed).permutation(int(wells.max()) + 1)[wells] % 2


def confidence(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    parts: Int[np.ndarray, " n"],
) -> Confidence:
    """Measure calibration before and after cross-fitted temperature scaling.

    Args:
        labels: true class of each site.
        probabilities: predicted probabilities.
        parts: parts without common wells (folds, or halves of the wells). The temperature of a
            part is fitted on all other parts; with a single part it is 1.
    """
    after, temperatures = np.array(probabilities, dtype=float), []
    for part in np.unique(parts):
        own: Bool[np.ndarray, " n"] = parts == part
        fitted = 1.0 if own.all() else temperature(labels[~own], probabilities[~own])
        after[own] = scaled(probabilities[own], fitted)
        temperatures.append(fitted)
    accuracies = confident_accuracies(labels, np.asarray(probabilities))
    return Confidence(
        error=calibration_error(labels, np.asarray(probabilities, dtype=float)),
        scaled_error=calibration_error(labels, after),
        temperature=float(np.mean(temperatures)),
        half_accuracy=float(accuracies[half_of(len(labels)) - 1]),
    )
