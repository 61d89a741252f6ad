"""From raw features to features comparable across plates: transformers for one scikit-learn Pipeline.

Steps pass a table on (see `as_table`): feature columns, with `Metadata_Plate`, `Metadata_Well` and `Metadata_negcon`
that say where a row comes from. Everything is fitted on the rows given to `fit`, the training rows; the one thing taken
from rows to be predicted is stated in `Scaler`. This module needs scikit-learn: import it where it is used.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.profile_options import (
    Outliers,
    Preparation,
    Reference,
    Scale,
    ScaleBy,
    Whitening,
)
from perturbjax.profiles.profile_table import METADATA, STATISTIC, Profiles

#: Whether a row is a negative control, true or false.
NEGCON = "Metadata_negcon"
#: Standard deviations of a normal distribution in one MAD.
_SD_PER_MAD = 1.4826
#: A spread below this share of a feature's size is rounding, and the feature counts as constant.
_CONSTANT = 1e-6
#: Deviations at which outliers are cut off.
_CLIP = 10.0


def as_table(profiles: Profiles, negcon: np.ndarray) -> pd.DataFrame:
    """What the pipeline takes: float64 features, plate, well, and whether a row is a negative control."""
    table = pd.DataFrame(profiles.values.astype(np.float64), columns=list(profiles.names))
    where = {
        PLATE: profiles.column(PLATE),
        WELL: profiles.column(WELL),
        NEGCON: np.asarray(negcon, dtype=bool),
    }
    return pd.concat([pd.DataFrame(where), table], axis=1)


class TableStep(TransformerMixin, BaseEstimator):
    """A step that changes the features of a table and hands its metadata on."""

    def fit(self, X: pd.DataFrame, y: object = None) -> TableStep:
        """Learn from training rows only."""
        self._fit(feature_values(X), X)
        return self

    def transform(self, X: pd.DataFrame) -> pd.DataFrame:
        """The table with changed features."""
        values, names = self._transform(feature_values(X), X)
        metadata = X[[c for c in X.columns if c.startswith(METADATA)]]
        return pd.concat([metadata, pd.DataFrame(values, columns=names, index=X.index)], axis=1)


class Clean(TableStep):
    """Drop features that training rows hardly have or that do not vary there; fill gaps with the training median.

    Args:
        max_missing: greatest share of training rows in which a kept feature may be missing, in [0, 1].
    """

    def __init__(self, max_missing: float = 0.05):
        self.max_missing = max_missing

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        gone = np.isnan(values).mean(axis=0) > self.max_missing
        columns = feature_names(X)
        filled = values[:, ~gone]
        spread = np.nanmax(filled, axis=0, initial=-np.inf) - np.nanmin(
            filled, axis=0, initial=np.inf
        )
        size = np.nanmax(np.abs(filled), axis=0, initial=0)
        constant = np.zeros(len(columns), dtype=bool)
        constant[~gone] = ~(spread > _CONSTANT * size)
        self.missing_ = [c for c, drop in zip(columns, gone, strict=True) if drop]
        self.constant_ = [c for c, drop in zip(columns, constant, strict=True) if drop]
        self.kept_ = ~(gone | constant)
        if not self.kept_.any():
            raise InputError(
                "features: every column is constant or missing in the training rows; nothing is left"
            )
        self.median_ = np.nanmedian(values[:, self.kept_], axis=0)
        self.filled_ = int(np.isnan(values[:, self.kept_]).sum())

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        kept = values[:, self.kept_]
        names = [c for c, keep in zip(feature_names(X), self.kept_, strict=True) if keep]
        return np.where(np.isnan(kept), self.median_, kept), names

    def notes(self) -> list[str]:
        """What was done, one sentence each; empty if nothing."""
        found = []
        for names, why in (
            (self.missing_, f"missing in more than {self.max_missing:.0%} of the training rows"),
            (self.constant_, "constant in the training rows"),
        ):
            if names:
                shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
                found.append(f"{len(names)} features dropped, {why}: {shown}")
        if self.filled_:
            found.append(
                f"{self.filled_} missing training values filled with the feature's training median"
            )
        return found


class Scaler(TableStep):
    """Centre and scale: to mean 0 and deviation 1, or by median and MAD; each plate by itself or all rows alike.

    A plate seen in `fit` keeps the centre and scale of its training rows. A plate that was not there is scaled by the
    rows that come to be transformed, without their labels (with "negcon": by those that are negative controls), as a
    screen's new plate is: so predict plates whole.

    Args:
        how: "standardize" (mean, standard deviation), "robustize" (median, MAD), or "none".
        by: "plate", or "training": one centre and scale from all training rows, for plates of few rows.
        reference: rows that give centre and scale: "all", or the negative controls "negcon".

    Raises:
        InputError: a plate has fewer than two reference rows.
    """

    def __init__(
        self, how: Scale = "standardize", by: ScaleBy = "plate", reference: Reference = "all"
    ):
        self.how = how
        self.by = by
        self.reference = reference

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        groups = self._groups(X)
        self.scales_ = {
            name: self._centre_and_scale(name, values[rows], X[rows]) for name, rows in groups
        }

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        out = np.empty_like(values)
        for name, rows in self._groups(X):
            centre, scale = self.scales_.get(name) or self._centre_and_scale(
                name, values[rows], X[rows]
            )
            out[rows] = (values[rows] - centre) / scale
        return out, feature_names(X)

    def _groups(self, X: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
        names = X[PLATE].to_numpy() if self.by == "plate" else np.full(len(X), "training")
        return [(name, names == name) for name in pd.unique(names)]

    def _centre_and_scale(
        self, name: str, values: np.ndarray, X: pd.DataFrame
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.how == "none":
            return np.zeros(values.shape[1]), np.ones(values.shape[1])
        reference = values[X[NEGCON].to_numpy()] if self.reference == "negcon" else values
        if len(reference) < 2:
            raise InputError(
                f"plate {name}: {len(reference)} rows to scale it by (--normalize-to {self.reference}), and it needs "
                "two: choose --normalize-by training, or another --normalize-to or --negcon"
            )
        if self.how == "standardize":
            return reference.mean(axis=0), _never_zero(reference.std(axis=0))
        centre = np.median(reference, axis=0)
        spread = _SD_PER_MAD * np.median(np.abs(reference - centre), axis=0)
        # More than half the rows alike: MAD is 0 though the feature varies.
        return centre, _never_zero(np.where(spread > 0, spread, reference.std(axis=0)))


class Tame(TableStep):
    """Keep a few extreme values from deciding everything: "clip" at ±10 deviations, "arcsinh", or "none".

    arcsinh is linear near 0 and logarithmic far away. Both suppose features scaled to deviations.
    """

    def __init__(self, how: Outliers = "clip"):
        self.how = how

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        self.fitted_ = True

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        tamed = {
            "none": values,
            "arcsinh": np.arcsinh(values),
            "clip": np.clip(values, -_CLIP, _CLIP),
        }
        return tamed[self.how], feature_names(X)


class CorrelationFilter(TableStep):
    """Of every pair of features that correlate beyond a threshold in training, drop the one more correlated overall.

    Args:
        threshold: greatest absolute Pearson correlation that may stay, in (0, 1].
    """

    def __init__(self, threshold: float = 0.9):
        self.threshold = threshold

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        centred = values - values.mean(axis=0)
        unit = centred / _never_zero(np.linalg.norm(centred, axis=0))
        correlation = np.abs(unit.T @ unit)
        total = correlation.sum(axis=0)
        np.fill_diagonal(correlation, 0)
        self.kept_ = np.ones(values.shape[1], dtype=bool)
        for feature in np.argsort(-total, kind="stable"):
            self.kept_[feature] = not (correlation[feature, self.kept_] > self.threshold).any()

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        names = [c for c, keep in zip(feature_names(X), self.kept_, strict=True) if keep]
        return values[:, self.kept_], names


class Sphere(TableStep):
    """Whiten by the covariance of the reference rows: what varies between wells that should be alike counts less.

    With correlation matrix P = G Θ Gᵀ and deviations V of the reference, zca_cor is G (Θ + ε)^(-1/2) Gᵀ V^(-1/2),
    pca_cor the same without the last rotation (Kessy, Lewin, Strimmer 2018, doi:10.1080/00031305.2016.1277159), zca the
    first with the covariance in place of P and V = 1. ε is `regularization` times the mean of Θ: without it directions
    in which a few controls happen to agree would be blown up.

    Args:
        reference: "all" training rows, or their negative controls "negcon".
        method: see above; pca_cor keeps as many components as the reference has dimensions.
        regularization: > 0.

    Raises:
        InputError: fewer than three reference rows.
    """

    def __init__(
        self,
        reference: Reference = "negcon",
        method: Whitening = "zca_cor",
        regularization: float = 1.0,
    ):
        self.reference = reference
        self.method = method
        self.regularization = regularization

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        reference = values[X[NEGCON].to_numpy()] if self.reference == "negcon" else values
        if len(reference) < 3:
            raise InputError(
                f"--sphere {self.reference}: {len(reference)} such training rows; sphering needs three or more: "
                "choose --sphere train or none, or another --negcon"
            )
        self.centre_ = reference.mean(axis=0)
        spread = reference.std(axis=0, ddof=1)
        self.scale_ = _never_zero(spread) if self.method.endswith("_cor") else np.ones(len(spread))
        unit = (reference - self.centre_) / self.scale_
        _, singular, rotation = np.linalg.svd(unit, full_matrices=False)
        eigenvalues = singular**2 / (len(reference) - 1)
        floor = self.regularization * eigenvalues.sum() / values.shape[1]
        if floor <= 0:
            raise InputError(
                "--sphere: the reference rows are all alike, or the regularization is not above 0"
            )
        self.rotation_, self.gain_, self.rest_ = (
            rotation,
            1 / np.sqrt(eigenvalues + floor),
            1 / np.sqrt(floor),
        )

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        unit = (values - self.centre_) / self.scale_
        scores = unit @ self.rotation_.T
        if self.method == "pca_cor":
            return scores * self.gain_, [f"component_{i}" for i in range(scores.shape[1])]
        # Directions outside the reference's span have eigenvalue 0 and all get the same gain.
        return self.rest_ * unit + (
            scores * (self.gain_ - self.rest_)
        ) @ self.rotation_, feature_names(X)


class Components(TableStep):
    """The first principal components; all there are where rows or features are fewer than asked for.

    Statistics of a dataset's index are handed on beside them: a few numbers would drown among a network's thousands.
    """

    def __init__(self, count: int = 50, seed: int = 0):
        self.count = count
        self.seed = seed

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        self.kept_ = np.array([name.startswith(STATISTIC) for name in feature_names(X)])
        rest = values[:, ~self.kept_]
        self.pca_ = PCA(min(self.count, *rest.shape), random_state=self.seed).fit(rest)

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        found = self.pca_.transform(values[:, ~self.kept_])
        names = [name for name, keep in zip(feature_names(X), self.kept_, strict=True) if keep]
        names = [*(f"component_{i}" for i in range(found.shape[1])), *names]
        return np.concatenate([found, values[:, self.kept_]], axis=1), names


class Balance(TableStep):
    """The index's statistics, and all else, each scaled to one total variance, so that neither drowns in the other.

    Args:
        variance: the sum of a part's variances over the training rows, > 0.
    """

    def __init__(self, variance: float):
        self.variance = variance

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        statistic = np.array([name.startswith(STATISTIC) for name in feature_names(X)])
        self.gain_ = np.ones(values.shape[1])
        for part in (statistic, ~statistic):
            total = values[:, part].var(axis=0).sum()
            self.gain_[part] = np.sqrt(self.variance / total) if total > 0 else 1.0

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        return values * self.gain_, feature_names(X)


class Features(TransformerMixin, BaseEstimator):
    """The end of the table: its features as a plain array, for scikit-learn's own steps."""

    def fit(self, X: pd.DataFrame, y: object = None) -> Features:
        """Learn nothing."""
        self.fitted_ = True
        return self

    def transform(self, X: pd.DataFrame) -> Float[np.ndarray, "n d"]:
        """Features (n, d) float64."""
        return feature_values(X)


def preparation(config: Preparation, *, seed: int = 0) -> Pipeline:
    """The unfitted steps from a table (`as_table`) to an array (n, d)."""
    steps: list[tuple[str, BaseEstimator]] = [
        ("clean", Clean(config.max_missing)),
        ("scale", Scaler(config.normalize, config.normalize_by, config.normalize_to)),
        ("tame", Tame(config.outliers)),
    ]
    if config.select:
        steps.append(("select", CorrelationFilter(config.correlation)))
    if config.sphere != "none":
        reference: Literal["all", "negcon"] = "negcon" if config.sphere == "negcon" else "all"
        steps.append(
            ("sphere", Sphere(reference, config.sphere_method, config.sphere_regularization))
        )
    if config.align != "none":
        from perturbjax.profiles.batch_correction import Combat, Coral

        aligned = (
            Coral(config.align_to, config.sphere_regularization)
            if config.align == "coral"
            else Combat(config.align_to)
        )
        steps.append(("align", aligned))
    if config.pca:
        steps.append(("pca", Components(config.pca, seed)))
    if config.pca and config.pca_variance:
        steps.append(("balance", Balance(config.pca_variance)))
    if config.relative != "none":
        from perturbjax.profiles.control_relative import Relative

        steps.append(("relative", Relative(config.relative)))
    steps.append(("features", Features()))
    if config.unit_length:
        steps.append(("unit", Normalizer()))
    return Pipeline(steps)


def feature_names(X: pd.DataFrame) -> list[str]:
    """Columns that are not metadata."""
    return [c for c in X.columns if not c.startswith(METADATA)]


def feature_values(X: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """(n, d) float64 of the columns that are not metadata."""
    return X[feature_names(X)].to_numpy(dtype=np.float64)


def _never_zero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1.0)
