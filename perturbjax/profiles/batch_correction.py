"""Plates made alike by what should be alike on them: steps of the pipeline of `normalize`, after sphering.

Both take the reference rows (negative controls, or all) of the training plates as the target, and of every plate its
own: a plate that comes later is moved by its own reference rows to the target, and changes nothing for the others.
TVN (Ando, McLean, Berndl 2017, bioRxiv 161422) is sphering by the controls, then `Coral`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE
from perturbjax.profiles.preparation import NEGCON, TableStep, feature_names
from perturbjax.profiles.profile_options import Reference

#: Steps of the empirical Bayes iteration at most, and the relative change at which it ends.
_STEPS, _ENOUGH = 100, 1e-4


class _ByPlate(TableStep):
    """A step that moves each plate by its own reference rows."""

    reference: Reference

    def _reference(
        self, values: Float[np.ndarray, "n d"], X: pd.DataFrame
    ) -> Float[np.ndarray, "m d"]:
        return values[X[NEGCON].to_numpy()] if self.reference == "negcon" else values

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        out, plates = np.empty_like(values), X[PLATE].to_numpy()
        for plate in pd.unique(plates):
            rows = plates == plate
            if plate not in (known := self.plates_):
                known = {plate: self._of_plate(plate, self._own(plate, values[rows], X[rows]))}
            out[rows] = self._moved(values[rows], known[plate])
        return out, feature_names(X)

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        plates = X[PLATE].to_numpy()
        own = {
            name: self._own(name, values[plates == name], X[plates == name])
            for name in pd.unique(plates)
        }
        self._target(own)
        self.plates_ = {name: self._of_plate(name, rows) for name, rows in own.items()}

    def _own(self, plate: str, values: np.ndarray, X: pd.DataFrame) -> Float[np.ndarray, "m d"]:
        reference = self._reference(values, X)
        if len(reference) < 2:
            raise InputError(
                f"plate {plate}: {len(reference)} rows to align it by (--align-to {self.reference}), and it needs two: "
                "choose --align none, or another --align-to or --negcon"
            )
        return reference


class Coral(_ByPlate):
    """Each plate's covariance made that of the training plates (CORAL: Sun, Feng, Saenko 2016, arXiv 1511.05547).

    With a plate's reference rows of mean m and covariance C, and the target's M and T, x becomes
    (x - m) (C + εI)^(-1/2) (T + εI)^(1/2) + M. T is the mean of the training plates' covariances, so that what differs
    between plates is no part of it.

    Args:
        reference: "all" rows of a plate, or its negative controls "negcon".
        regularization: ε in units of the target's mean variance, > 0; plates have fewer rows than features.
    """

    def __init__(self, reference: Reference = "negcon", regularization: float = 1.0):
        self.reference = reference
        self.regularization = regularization

    def _target(self, own: dict[str, Float[np.ndarray, "_m d"]]) -> None:
        self.centre_ = np.mean([rows.mean(axis=0) for rows in own.values()], axis=0)
        covariance = np.mean([_covariance(rows) for rows in own.values()], axis=0)
        self.floor_ = self.regularization * float(np.trace(covariance)) / len(covariance)
        if not self.floor_ > 0:
            raise InputError(
                "--align coral: the rows to align by are all alike; choose another --align-to or --negcon"
            )
        self.colour_ = _power(covariance, self.floor_, 0.5)

    def _of_plate(self, plate: str, own: Float[np.ndarray, "m d"]) -> tuple[np.ndarray, np.ndarray]:
        return own.mean(axis=0), _power(_covariance(own), self.floor_, -0.5) @ self.colour_

    def _moved(self, values: np.ndarray, by: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return (values - by[0]) @ by[1] + self.centre_


class _Batch(NamedTuple):
    shift: Float[np.ndarray, " d"]
    spread: Float[np.ndarray, " d"]


class Combat(_ByPlate):
    """Each plate's shift and spread of each feature taken away, both shrunk towards those of the plate's other features
    (ComBat, parametric: Johnson, Li, Rabinovic 2007, doi:10.1093/biostatistics/kxj037).

    Args:
        reference: "all" rows of a plate, or its negative controls "negcon".
    """

    def __init__(self, reference: Reference = "negcon"):
        self.reference = reference

    def _target(self, own: dict[str, Float[np.ndarray, "_m d"]]) -> None:
        rows = sum(len(one) for one in own.values())
        self.centre_ = sum(one.sum(axis=0) for one in own.values()) / rows
        within = sum(((one - one.mean(axis=0)) ** 2).sum(axis=0) for one in own.values()) / rows
        self.spread_ = np.where(within > 0, np.sqrt(within), 1.0)

    def _of_plate(self, plate: str, own: Float[np.ndarray, "m d"]) -> _Batch:
        z = (own - self.centre_) / self.spread_
        n, shift, variance = len(z), z.mean(axis=0), z.var(axis=0, ddof=1)
        prior_mean, prior_variance = shift.mean(), shift.var(ddof=1) if len(shift) > 1 else 0.0
        mean, spread = variance.mean(), variance.var(ddof=1) if len(shift) > 1 else 0.0
        if not (
            prior_variance > 0 and spread > 0
        ):  # one feature, or all alike: nothing to learn from the others
            return _Batch(shift, np.sqrt(np.where(variance > 0, variance, 1.0)))
        shape, rate = 2 + mean**2 / spread, mean * (1 + mean**2 / spread)
        gamma, delta = shift, variance
        for _ in range(_STEPS):
            new_gamma = (n * prior_variance * shift + delta * prior_mean) / (
                n * prior_variance + delta
            )
            squares = ((z - new_gamma) ** 2).sum(axis=0)
            new_delta = (rate + squares / 2) / (n / 2 + shape - 1)
            change = max(_change(gamma, new_gamma), _change(delta, new_delta))
            gamma, delta = new_gamma, new_delta
            if change < _ENOUGH:
                break
        return _Batch(gamma, np.sqrt(delta))

    def _moved(self, values: np.ndarray, by: _Batch) -> np.ndarray:
        z = (values - self.centre_) / self.spread_
        return (z - by.shift) / by.spread * self.spread_ + self.centre_


def _covariance(rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "d d"]:
    centred = rows - rows.mean(axis=0)
    return centred.T @ centred / (len(rows) - 1)


def _power(
    covariance: Float[np.ndarray, "d d"], floor: float, power: float
) -> Float[np.ndarray, "d d"]:
    """(C + floor I)^power."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * (np.maximum(values, 0) + floor) ** power) @ vectors.T


def _change(old: np.ndarray, new: np.ndarray) -> float:
    return float((np.abs(new - old) / np.maximum(np.abs(old), 1e-12)).max())
