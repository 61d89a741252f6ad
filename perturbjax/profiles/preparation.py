"""Preparation of features before a classifier or an embedding: one scikit-learn Pipeline.

Features of different plates differ in scale and offset (staining, exposure, week), and many
features are redundant. The steps, in order:

1. `FeatureCleaner` drops features that are mostly missing or constant and fills gaps with medians.
2. `Scaler` centers and scales each feature per plate. *MAD normalization* ("robustize") uses median
   and median absolute deviation (MAD) instead of mean and standard deviation: z = (x - median) /
   (1.4826 MAD). With the negative controls as reference it is the normalization of pycytominer
   ("mad_robustize"; Caicedo et al. 2017, doi:10.1038/nmeth.4397).
3. `OutlierLimiter` limits extreme values.
4. `CorrelationFilter` drops one of two features that correlate strongly.
5. `Sphering` (*whitening*) makes the covariance of the negative controls nearly the identity, so
   that directions in which controls vary for technical reasons count less.
6. `Coral` or `Combat` align plates, see `batch_correction`. Sphering by the controls followed by
   CORAL is *TVN*, typical variation normalization (Ando, McLean, Berndl 2017, doi:10.1101/161422).
7. `Components` reduces to principal components, `VarianceBalancer` weights them against image
   statistics.
8. `PlateRelative` adds features relative to the plate, see `control_relative`.

Every step is fitted on the training rows only. The one exception is a plate without training rows:
it is scaled by its own rows, without their labels (see `Scaler`). This module needs scikit-learn:
import it where it is used.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer

from perturbjax.core.errors import InputError
from perturbjax.profiles.batch_correction import Combat, Coral
from perturbjax.profiles.components import Components, VarianceBalancer
from perturbjax.profiles.control_relative import GROUP, PlateRelative
from perturbjax.profiles.feature_columns import list_columns
from perturbjax.profiles.profile_options import (
    Outliers,
    Preparation,
    Reference,
    Scale,
    ScaleBy,
    Whitening,
)
from perturbjax.profiles.table_steps import (
    TableStep,
    feature_names,
    feature_values,
    nonzero,
    reference_rows,
    rows_by_plate,
    select_names,
)

#: Standard deviation of a normal distribution in units of its MAD: 1 / Φ⁻¹(3/4).
_SD_PER_MAD = 1.4826
#: A feature whose range is below this fraction of its size varies by rounding only and counts as
#: constant.
_CONSTANT = 1e-6
#: Limit for outliers, in standard deviations.
_CLIP = 10.0


def fit_preparation(
    table: pd.DataFrame, config: Preparation, seed: int, labels: np.ndarray, groups: np.ndarray
) -> tuple[Pipeline, Float[np.ndarray, "n d"]]:
    """Fit the preparation to training rows and transform them.

    Args:
        table: n training rows, see `table_steps.as_table`.
        config: the steps.
        seed: seed of the principal components.
        labels: (n,) class numbers, used only by `relative="auto"`.
        groups: (n,) groups of the split, such as plates, used only by `relative="auto"`.

    Returns:
        The fitted pipeline and the transformed features.

    Raises:
        InputError: Features or reference rows are missing.
    """
    steps = preparation(config, seed=seed)
    return steps, steps.fit_transform(table.assign(**{GROUP: groups}), labels)


def preparation_notes(steps: Pipeline) -> list[str]:
    """Return sentences about features dropped, values filled and choices made in fitting."""
    return [
        n for step in steps.named_steps.values() if hasattr(step, "notes") for n in step.notes()
    ]


def preparation(config: Preparation, *, seed: int = 0) -> Pipeline:
    """Return the unfitted steps from a table (`table_steps.as_table`) to an array (n, d)."""
    steps: dict[str, BaseEstimator] = {
        "clean": FeatureCleaner(config.max_missing),
        "scale": Scaler(config.normalize, config.normalize_by, config.normalize_to),
        "outliers": OutlierLimiter(config.outliers),
    }
    if config.select:
        steps["select"] = CorrelationFilter(config.correlation)
    if config.sphere != "none":
        reference: Reference = "negcon" if config.sphere == "negcon" else "all"
        steps["sphere"] = Sphering(reference, config.sphere_method, config.sphere_regularization)
    if config.align == "coral":
        steps["align"] = Coral(config.align_to, config.sphere_regularization)
    elif config.align == "combat":
        steps["align"] = Combat(config.align_to)
    if config.pca:
        steps["pca"] = Components(config.pca, seed)
    if config.pca and config.pca_variance:
        steps["balance"] = VarianceBalancer(config.pca_variance)
    if config.relative != "none":
        steps["relative"] = PlateRelative(config.relative)
    steps["array"] = ToArray()
    if config.unit_length:
        steps["unit_length"] = Normalizer()
    return Pipeline(list(steps.items()))


class FeatureCleaner(TableStep):
    """Drop features that are often missing or constant; fill gaps with the training median.

    Args:
        max_missing: maximum fraction of training rows in which a feature may be missing, in [0, 1].
            Rows without any feature, such as sites without cells, do not count.
    """

    def __init__(self, max_missing: float = 0.05):
        self.max_missing = max_missing

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        gaps = np.isnan(values)
        measured = gaps[~gaps.all(axis=1)]
        missing = measured.mean(axis=0) > self.max_missing if len(measured) else gaps.all(axis=0)
        present = values[:, ~missing]
        largest = np.nanmax(present, axis=0, initial=-np.inf)
        spread = largest - np.nanmin(present, axis=0, initial=np.inf)
        size = np.nanmax(np.abs(present), axis=0, initial=0)
        constant = np.zeros(values.shape[1], dtype=bool)
        constant[~missing] = ~(spread > _CONSTANT * size)  # also without any value
        self.missing_, self.constant_ = select_names(X, missing), select_names(X, constant)
        self.kept_ = ~(missing | constant)
        if not self.kept_.any():
            raise InputError(
                "features: every feature is constant or missing in the training rows. Use "
                "another table or split."
            )
        self.median_ = np.nanmedian(values[:, self.kept_], axis=0)
        self.filled_ = int(np.isnan(values[:, self.kept_]).sum())

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        values = values[:, self.kept_]
        return np.where(np.isnan(values), self.median_, values), select_names(X, self.kept_)

    def notes(self) -> list[str]:
        """Return which features were dropped and how many values were filled."""
        reasons = {
            f"missing in more than {self.max_missing:.0%} of the training rows": self.missing_,
            "constant in the training rows": self.constant_,
        }
        notes = [
            f"dropped {list_columns(names)} ({why})" for why, names in reasons.items() if names
        ]
        if self.filled_:
            notes.append(f"filled {self.filled_} missing training values with training medians")
        return notes


class Scaler(TableStep):
    """Center and scale each feature, per plate or over all training rows.

    A plate with training rows keeps their center and scale. A new plate is scaled by its own rows
    (with `reference="negcon"`, by its negative controls) without using labels, as in a new plate of
    a screen. Predictions for such a plate therefore depend on which of its rows are given: predict
    whole plates.

    Args:
        how: "standardize" (mean, standard deviation), "robustize" (median, MAD), or "none".
        by: "plate", or "training" for one center and scale of all training rows (plates with few
            rows).
        reference: rows that define center and scale: "all", or the negative controls "negcon".

    Raises:
        InputError: A plate has fewer than two reference rows.
    """

    def __init__(
        self, how: Scale = "standardize", by: ScaleBy = "plate", reference: Reference = "all"
    ):
        self.how = how
        self.by = by
        self.reference = reference

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        self.scales_ = {
            name: self._center_and_scale(name, values[rows], X[rows])
            for name, rows in self._groups(X)
        }

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        out = np.empty_like(values)
        for name, rows in self._groups(X):
            center, scale = self.scales_.get(name) or self._center_and_scale(
                name, values[rows], X[rows]
            )
            out[rows] = (values[rows] - center) / scale
        return out, feature_names(X)

    def _groups(self, X: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
        return rows_by_plate(X) if self.by == "plate" else [("training", np.ones(len(X), bool))]

    def _center_and_scale(
        self, name: str, values: np.ndarray, X: pd.DataFrame
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.how == "none":
            return np.zeros(values.shape[1]), np.ones(values.shape[1])
        rows = reference_rows(values, X, self.reference)
        if len(rows) < 2:
            kind = "negative controls" if self.reference == "negcon" else "rows"
            raise InputError(
                f"plate {name}: {len(rows)} {kind} for normalization, but at least two are "
                "needed. Normalize by all training rows, choose another preparation, or check "
                "--negcon."
            )
        if self.how == "standardize":
            return rows.mean(axis=0), nonzero(rows.std(axis=0))
        center = np.median(rows, axis=0)
        spread = _SD_PER_MAD * np.median(np.abs(rows - center), axis=0)
        # The MAD is 0 if more than half of the rows are equal, although the feature may vary.
        return center, nonzero(np.where(spread > 0, spread, rows.std(axis=0)))


class OutlierLimiter(TableStep):
    """Limit extreme values of scaled features.

    Args:
        how: "clip" (to ±10 standard deviations), "arcsinh" (linear near 0, logarithmic for large
            values), or "none".
    """

    def __init__(self, how: Outliers = "clip"):
        self.how = how

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        self.fitted_ = True

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        if self.how == "arcsinh":
            values = np.arcsinh(values)
        elif self.how == "clip":
            values = np.clip(values, -_CLIP, _CLIP)
        return values, feature_names(X)


class CorrelationFilter(TableStep):
    """Drop one of two strongly correlated features: the one with the larger total correlation.

    Args:
        threshold: maximum absolute Pearson correlation between features, in (0, 1].
    """

    def __init__(self, threshold: float = 0.9):
        self.threshold = threshold

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        centered = values - values.mean(axis=0)
        unit = centered / nonzero(np.linalg.norm(centered, axis=0))
        correlation = np.abs(unit.T @ unit)
        total = correlation.sum(axis=0)
        np.fill_diagonal(correlation, 0)
        self.kept_ = np.ones(values.shape[1], dtype=bool)
        # Visit features by decreasing total correlation; a feature stays if no remaining one
        # correlates with it.
        for feature in np.argsort(-total, kind="stable"):
            self.kept_[feature] = not (correlation[feature, self.kept_] > self.threshold).any()

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        return values[:, self.kept_], select_names(X, self.kept_)


class Sphering(TableStep):
    """Whiten features by the covariance of reference rows, so that their variation counts less.

    Let P = G Θ Gᵀ be the correlation matrix of the reference rows (eigenvectors G, eigenvalues Θ)
    and V their variances. Then zca_cor multiplies by G (Θ + ε)^(-1/2) Gᵀ V^(-1/2); pca_cor omits
    the last rotation G; zca uses the covariance instead of P and V = 1. The ridge ε =
    `regularization` · mean(Θ) prevents that directions in which few controls agree by chance are
    amplified.

    Source: Kessy, Lewin, Strimmer 2018, doi:10.1080/00031305.2016.1277159.

    Args:
        reference: "all" training rows, or their negative controls "negcon".
        method: "zca_cor", "zca", or "pca_cor" (keeps as many components as the reference has
            dimensions).
        regularization: ε in units of the mean eigenvalue, > 0.

    Raises:
        InputError: There are fewer than three reference rows, or they are identical.
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
        rows = reference_rows(values, X, self.reference)
        if len(rows) < 3:
            kind = (
                "negative controls in training" if self.reference == "negcon" else "training rows"
            )
            raise InputError(
                f"sphering: {len(rows)} {kind}, but at least three are needed. Choose a "
                "preparation without sphering, or check --negcon."
            )
        self.center_ = rows.mean(axis=0)
        spread = rows.std(axis=0, ddof=1)
        self.scale_ = nonzero(spread) if self.method.endswith("_cor") else np.ones(len(spread))
        unit = (rows - self.center_) / self.scale_
        # Singular values of the rows give the eigenvalues without the (d, d) matrix.
        _, singular, self.rotation_ = np.linalg.svd(unit, full_matrices=False)
        eigenvalues = singular**2 / (len(rows) - 1)
        ridge = self.regularization * eigenvalues.sum() / values.shape[1]  # mean over all d
        if ridge <= 0:
            raise InputError(
                "sphering: the reference rows are identical, or the regularization is not above "
                "0. Check --negcon."
            )
        self.gain_, self.rest_gain_ = 1 / np.sqrt(eigenvalues + ridge), 1 / np.sqrt(ridge)

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        unit = (values - self.center_) / self.scale_
        scores = unit @ self.rotation_.T
        if self.method == "pca_cor":
            return scores * self.gain_, [f"component_{i}" for i in range(scores.shape[1])]
        # Directions outside the span of the reference rows have eigenvalue 0 and share one gain.
        inside = (scores * (self.gain_ - self.rest_gain_)) @ self.rotation_
        return self.rest_gain_ * unit + inside, feature_names(X)


class ToArray(TransformerMixin, BaseEstimator):
    """Return the features of a table as an array, for estimators of scikit-learn."""

    def fit(self, X: pd.DataFrame, y: object = None) -> ToArray:
        """Do nothing."""
        self.fitted_ = True
        return self

    def transform(self, X: pd.DataFrame) -> Float[np.ndarray, "n d"]:
        """Return the features."""
        return feature_values(X)
