"""Alignment of plates by reference rows: CORAL and ComBat, steps of `preparation` after sphering.

Both compare the reference rows of each plate (its negative controls, or all its rows) with a
target, computed from the reference rows of the training plates. A new plate is moved to this target
by its own reference rows, so that it does not change the results of other plates. Sphering by the
negative controls followed by `Coral` is TVN, typical variation normalization (Ando, McLean, Berndl
2017, doi:10.1101/161422).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.errors import InputError
from perturbjax.profiles.profile_options import Reference
from perturbjax.profiles.table_steps import TableStep, feature_names, reference_rows, rows_by_plate

#: Maximum number of iterations of the empirical Bayes estimate, and the relative change at which it
#: stops.
_MAX_ITERATIONS, _TOLERANCE = 100, 1e-4


class _PlateAlignment(TableStep):
    """A step that moves each plate by its own reference rows.

    Subclasses define `_fit_target` (from the reference rows of all training plates), `_fit_plate`
    and `_move`.
    """

    reference: Reference

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        rows = {
            plate: self._reference(plate, values[mask], X[mask]) for plate, mask in rows_by_plate(X)
        }
        self._fit_target(rows)
        self.plates_ = {plate: self._fit_plate(reference) for plate, reference in rows.items()}

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        out = np.empty_like(values)
        for plate, mask in rows_by_plate(X):
            fitted = self.plates_.get(plate)
            if fitted is None:  # a new plate
                fitted = self._fit_plate(self._reference(plate, values[mask], X[mask]))
            out[mask] = self._move(values[mask], fitted)
        return out, feature_names(X)

    def _reference(
        self, plate: str, values: np.ndarray, X: pd.DataFrame
    ) -> Float[np.ndarray, "m d"]:
        rows = reference_rows(values, X, self.reference)
        if len(rows) < 2:
            kind = "negative controls" if self.reference == "negcon" else "rows"
            raise InputError(
                f"plate {plate}: {len(rows)} {kind} for the alignment of plates, but at least two "
                "are needed. Choose a preparation without alignment, or check --negcon."
            )
        return rows


class Coral(_PlateAlignment):
    """CORAL (correlation alignment): give each plate the covariance of the training plates.

    With mean m and covariance C of a plate's reference rows, and M and T those of the target, a row
    x becomes (x - m) (C + εI)^(-1/2) (T + εI)^(1/2) + M. T is the mean of the covariances *within*
    training plates, so that it does not contain differences between plates.

    Source: Sun, Feng, Saenko 2016, arXiv:1511.05547.

    Args:
        reference: "all" rows of a plate, or its negative controls "negcon".
        regularization: ε in units of the target's mean variance, > 0. It is needed because plates
            have fewer rows than features.
    """

    def __init__(self, reference: Reference = "negcon", regularization: float = 1.0):
        self.reference = reference
        self.regularization = regularization

    def _fit_target(self, plates: dict[str, Float[np.ndarray, "_m d"]]) -> None:
        self.center_ = np.mean([rows.mean(axis=0) for rows in plates.values()], axis=0)
        covariance = np.mean([_covariance(rows) for rows in plates.values()], axis=0)
        self.ridge_ = self.regularization * float(np.trace(covariance)) / len(covariance)
        if not self.ridge_ > 0:
            raise InputError(
                "CORAL: the reference rows of each plate are identical. Check --negcon, or "
                "choose another preparation."
            )
        # (T + εI)^(1/2). Plates use the same ridge ε, which is fixed by the target.
        self.target_ = _power(covariance, self.ridge_, 0.5)

    def _fit_plate(self, rows: Float[np.ndarray, "m d"]) -> tuple[np.ndarray, np.ndarray]:
        # Whitening by the plate, followed by coloring by the target, as one matrix.
        return rows.mean(axis=0), _power(_covariance(rows), self.ridge_, -0.5) @ self.target_

    def _move(self, values: np.ndarray, fitted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        mean, matrix = fitted
        return (values - mean) @ matrix + self.center_


class _Batch(NamedTuple):
    shift: Float[np.ndarray, " d"]
    spread: Float[np.ndarray, " d"]


class Combat(_PlateAlignment):
    """ComBat: remove shift and spread of each feature on each plate by empirical Bayes.

    A plate has few reference rows, so that shift and spread of a single feature are noisy. ComBat
    takes them as draws from a distribution over all features of the plate (normal for shifts,
    inverse gamma for variances) and shrinks each estimate towards the mean of this distribution.
    Shift γ and variance δ depend on each other and are iterated.

    Source: parametric ComBat, Johnson, Li, Rabinovic 2007, doi:10.1093/biostatistics/kxj037.

    Args:
        reference: "all" rows of a plate, or its negative controls "negcon".
    """

    def __init__(self, reference: Reference = "negcon"):
        self.reference = reference

    def _fit_target(self, plates: dict[str, Float[np.ndarray, "_m d"]]) -> None:
        count = sum(len(rows) for rows in plates.values())
        self.center_ = sum(rows.sum(axis=0) for rows in plates.values()) / count
        squares = sum(((rows - rows.mean(axis=0)) ** 2).sum(axis=0) for rows in plates.values())
        # Variance within plates: differences between the means of plates do not count.
        within = squares / count
        self.spread_ = np.where(within > 0, np.sqrt(within), 1.0)

    def _fit_plate(self, rows: Float[np.ndarray, "m d"]) -> _Batch:
        z = (rows - self.center_) / self.spread_
        n, shift, variance = len(z), z.mean(axis=0), z.var(axis=0, ddof=1)
        several = len(shift) > 1
        prior_mean, prior_variance = shift.mean(), shift.var(ddof=1) if several else 0.0
        mean, spread = variance.mean(), variance.var(ddof=1) if several else 0.0
        if not (prior_variance > 0 and spread > 0):  # no distribution over features to shrink to
            return _Batch(shift, np.sqrt(np.where(variance > 0, variance, 1.0)))
        # Moments of the inverse gamma prior.
        # With shape a and rate b, the mean is b / (a - 1) and the variance is mean² / (a - 2).
        shape, rate = 2 + mean**2 / spread, mean * (1 + mean**2 / spread)
        gamma, delta = shift, variance
        for _ in range(_MAX_ITERATIONS):
            # Posterior mean of the shift: plate mean and prior mean, weighted by their precisions.
            new_gamma = (n * prior_variance * shift + delta * prior_mean) / (
                n * prior_variance + delta
            )
            squares = ((z - new_gamma) ** 2).sum(axis=0)
            # Posterior mean of the variance, given the new shift.
            new_delta = (rate + squares / 2) / (n / 2 + shape - 1)
            change = max(_relative_change(gamma, new_gamma), _relative_change(delta, new_delta))
            gamma, delta = new_gamma, new_delta
            if change < _TOLERANCE:
                break
        return _Batch(gamma, np.sqrt(delta))

    def _move(self, values: np.ndarray, fitted: _Batch) -> np.ndarray:
        z = (values - self.center_) / self.spread_
        return (z - fitted.shift) / fitted.spread * self.spread_ + self.center_


def _covariance(rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "d d"]:
    centered = rows - rows.mean(axis=0)
    return centered.T @ centered / (len(rows) - 1)


def _power(
    covariance: Float[np.ndarray, "d d"], ridge: float, power: float
) -> Float[np.ndarray, "d d"]:
    """Compute (C + ridge I)^power."""
    values, vectors = np.linalg.eigh(covariance)
    # Rounding can make eigenvalues of a singular covariance slightly negative.
    return (vectors * (np.maximum(values, 0) + ridge) ** power) @ vectors.T


def _relative_change(old: np.ndarray, new: np.ndarray) -> float:
    return float((np.abs(new - old) / np.maximum(np.abs(old), 1e-12)).max())
