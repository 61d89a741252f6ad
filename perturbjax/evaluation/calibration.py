"""Does a probability mean what it says, and what is gained by answering only where it is high?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar

#: Probabilities below this are taken as this: exact zeros (neighbours, forests) have no logarithm.
_LEAST = 1e-6
#: Greatest temperature, and one over the least.
_HOTTEST = 20.0
_BINS = 10


@dataclass(frozen=True)
class Confidence:
    """How far probabilities can be taken at their word, on sites that no temperature was fitted on."""

    error: float
    """Expected calibration error: mean distance of stated confidence and accuracy over ten bins (Guo et al. 2017)."""
    scaled_error: float
    """The same after temperature scaling, fitted on other sites."""
    temperature: float
    """Mean of the temperatures; above 1 the model says too much, below too little."""
    half_accuracy: float
    """Accuracy where only the more confident half of the sites is answered."""


def calibration_error(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> float:
    """Mean over bins of confidence of |accuracy - confidence|, each bin by its share of sites."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    where = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(where, right.astype(float) - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def temperature(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> float:
    """The T under which softmax(log p / T) has the least log loss on these sites."""
    own = np.arange(len(labels)), labels

    def loss(log_temperature: float) -> float:
        return float(
            -np.log(np.maximum(scaled(probabilities, np.exp(log_temperature))[own], _LEAST)).mean()
        )

    end = np.log(_HOTTEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-end, end), method="bounded").x))


def scaled(
    probabilities: Float[np.ndarray, "n classes"], temperature: float
) -> Float[np.ndarray, "n classes"]:
    """softmax(log p / T): the same ranking, other confidence."""
    powers = np.maximum(probabilities, _LEAST).astype(float) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def confidence(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    parts: Int[np.ndarray, " n"],
) -> Confidence:
    """Calibration as it is, and with the temperature of each part's sites fitted on all other parts.

    Args:
        parts: what shares no well with each other: folds, or halves of the wells. Of one part alone nothing can be
            fitted, and its temperature is 1.
    """
    after, temperatures = np.array(probabilities, dtype=float), []
    for part in np.unique(parts):
        here: Bool[np.ndarray, " n"] = parts == part
        fitted = 1.0 if here.all() else temperature(labels[~here], probabilities[~here])
        after[here] = scaled(probabilities[here], fitted)
        temperatures.append(fitted)
    sure = np.argsort(-after.max(axis=1), kind="stable")[: max(1, len(labels) // 2)]
    return Confidence(
        error=calibration_error(labels, np.asarray(probabilities, dtype=float)),
        scaled_error=calibration_error(labels, after),
        temperature=float(np.mean(temperatures)),
        half_accuracy=float((after[sure].argmax(axis=1) == labels[sure]).mean()),
    )
