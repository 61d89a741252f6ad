"""Steps of the preparation: their effect, and independence of test rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from tiny_profiles import as_profiles, make_table

from perturbjax.core.errors import InputError
from perturbjax.profiles.preparation import (
    CorrelationFilter,
    FeatureCleaner,
    OutlierLimiter,
    Scaler,
    Sphering,
    preparation,
)
from perturbjax.profiles.profile_options import Preparation
from perturbjax.profiles.table_steps import NEGCON, as_table, feature_values


def make_steps_table(
    values: np.ndarray, plates: list[str] | None = None, negcon: np.ndarray | None = None
) -> pd.DataFrame:
    n = len(values)
    first = pd.DataFrame(
        {
            "Metadata_Plate": plates or ["P0"] * n,
            "Metadata_Well": [f"A{i:02d}" for i in range(n)],
            NEGCON: np.zeros(n, bool) if negcon is None else negcon,
        }
    )
    return pd.concat(
        [first, pd.DataFrame(values, columns=[f"f{i}" for i in range(values.shape[1])])], axis=1
    )


@pytest.fixture
def screen(tmp_path: Path) -> pd.DataFrame:
    profiles = as_profiles(make_table(), tmp_path)
    return as_table(profiles, (profiles.column("Metadata_control_type") == "negcon").to_numpy())


def test_feature_cleaner_fills_gaps_and_drops_missing_or_constant_features() -> None:
    values = np.random.default_rng(0).normal(size=(40, 4))
    values[:10, 0] = np.nan
    values[:, 1] = 7.0
    values[3, 2] = np.nan
    step = FeatureCleaner(max_missing=0.05).fit(make_steps_table(values))
    after = step.transform(make_steps_table(np.full((1, 4), np.nan)))
    assert list(after.columns[3:]) == ["f2", "f3"]
    np.testing.assert_allclose(feature_values(after)[0], np.nanmedian(values[:, 2:], axis=0))
    assert step.notes() == [
        "dropped 1 column: f0 (missing in more than 5% of the training rows)",
        "dropped 1 column: f1 (constant in the training rows)",
        "filled 1 missing training values with training medians",
    ]


def test_feature_cleaner_keeps_features_of_tables_with_sites_without_cells() -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    values[::4] = np.nan
    values[1:10:4, 1] = np.nan
    step = FeatureCleaner(max_missing=0.05).fit(make_steps_table(values))
    assert list(step.transform(make_steps_table(values)).columns[3:]) == ["f0"]
    assert step.filled_ == 10


def test_feature_cleaner_refuses_table_without_varying_features() -> None:
    with pytest.raises(InputError, match="every feature is constant or missing"):
        FeatureCleaner().fit(make_steps_table(np.ones((5, 3))))
    with pytest.raises(InputError, match="every feature is constant or missing"):
        FeatureCleaner().fit(make_steps_table(np.full((5, 3), np.nan)))


@pytest.mark.parametrize(("how", "center"), [("standardize", np.mean), ("robustize", np.median)])
def test_scaler_gives_plates_the_same_center_and_scale(
    screen: pd.DataFrame, how: str, center
) -> None:
    scaled = Scaler(how).fit_transform(screen)
    for _, plate in scaled.groupby("Metadata_Plate"):
        values = feature_values(plate)
        np.testing.assert_allclose(center(values, axis=0), 0, atol=1e-6)
        size = (
            values.std(axis=0)
            if how == "standardize"
            else 1.4826 * np.median(np.abs(values), axis=0)
        )
        np.testing.assert_allclose(size, 1, rtol=1e-6)


def test_scaler_uses_negative_controls(screen: pd.DataFrame) -> None:
    scaled = Scaler("standardize", reference="negcon").fit_transform(screen)
    controls = feature_values(scaled[(scaled["Metadata_Plate"] == "P2") & scaled[NEGCON]])
    np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-6)
    with pytest.raises(InputError, match="plate P0: 0 negative controls for normalization"):
        Scaler("standardize", reference="negcon").fit(screen.assign(**{NEGCON: False}))


def test_scaler_keeps_training_scale_of_training_plates(screen: pd.DataFrame) -> None:
    train, test = screen.iloc[::2], screen.iloc[1::2].copy()
    step = Scaler("robustize").fit(train)
    before = step.transform(test)
    test.loc[test.index[0], "Cells_f0"] = 1e9
    after = step.transform(test)
    pd.testing.assert_frame_equal(before.iloc[1:], after.iloc[1:])


def test_scaler_scales_new_plate_by_its_own_rows(screen: pd.DataFrame) -> None:
    new = screen["Metadata_Plate"] == "P3"
    scaled = feature_values(Scaler("standardize").fit(screen[~new]).transform(screen[new]))
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)


def test_scaler_handles_mad_of_zero() -> None:
    values = np.zeros((20, 1))
    values[:3] = 5
    scaled = feature_values(Scaler("robustize").fit_transform(make_steps_table(values)))
    assert np.isfinite(scaled).all() and scaled.max() < 10


def test_outlier_limiter_clips_or_compresses() -> None:
    values = np.array([[-100.0], [0.5], [100.0]])
    assert feature_values(
        OutlierLimiter("clip").fit_transform(make_steps_table(values))
    ).ravel().tolist() == [
        -10,
        0.5,
        10,
    ]
    np.testing.assert_allclose(
        feature_values(OutlierLimiter("arcsinh").fit_transform(make_steps_table(values))),
        np.arcsinh(values),
    )


@settings(max_examples=50)
@given(
    n=st.integers(3, 40),
    d=st.integers(2, 12),
    method=st.sampled_from(["zca", "zca_cor", "pca_cor"]),
    regularization=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_sphering_whitens_reference_rows(
    n: int, d: int, method: str, regularization: float, seed: int
) -> None:
    """A direction of variance θ gets variance θ / (θ + ε)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    before = np.linalg.eigvalsh(
        np.cov(values.T) if method == "zca" else np.corrcoef(values.T)
    ).clip(0)
    whitened = feature_values(
        Sphering("all", method, regularization).fit_transform(make_steps_table(values))
    )
    after = np.linalg.eigvalsh(np.cov(whitened.T).reshape(whitened.shape[1], -1))
    expected = np.sort(before / (before + regularization * before.mean()))
    np.testing.assert_allclose(after, expected[-len(after) :], atol=1e-5)


def test_zca_is_inverse_square_root_of_covariance() -> None:
    values = np.random.default_rng(1).normal(size=(50, 6)) @ np.random.default_rng(2).normal(
        size=(6, 6)
    )
    covariance = np.cov(values.T)
    eigenvalues, axes = np.linalg.eigh(covariance)
    root = axes @ np.diag(1 / np.sqrt(eigenvalues + 0.3 * eigenvalues.mean())) @ axes.T
    result = feature_values(Sphering("all", "zca", 0.3).fit_transform(make_steps_table(values)))
    np.testing.assert_allclose(result, (values - values.mean(axis=0)) @ root, atol=1e-8)


def test_sphering_handles_fewer_controls_than_features() -> None:
    values = np.random.default_rng(0).normal(size=(30, 20))
    controls = np.arange(30) < 6
    whitened = feature_values(
        Sphering("negcon", "zca_cor", 1.0).fit_transform(make_steps_table(values, negcon=controls))
    )
    assert whitened.shape == (30, 20) and np.isfinite(whitened).all()
    with pytest.raises(InputError, match="sphering: 2 negative controls in training"):
        Sphering("negcon").fit(make_steps_table(values, negcon=np.arange(30) < 2))


def test_correlation_filter_leaves_no_pair_above_threshold() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(100, 5))
    values = np.hstack([base, base + 0.05 * rng.normal(size=(100, 5)), -base])
    step = CorrelationFilter(0.9).fit(make_steps_table(values))
    remaining = feature_values(step.transform(make_steps_table(values)))
    assert remaining.shape[1] == 5
    assert np.abs(np.corrcoef(remaining.T) - np.eye(5)).max() <= 0.9


ALL_STEPS = Preparation(
    normalize="robustize", outliers="arcsinh", select=True, sphere="negcon", pca=5, unit_length=True
)


def test_preparation_is_fitted_on_training_rows_only(screen: pd.DataFrame) -> None:
    """Plates occur in training and test here, so even the scale of a plate could leak."""
    train = (np.arange(len(screen)) % 3) > 0
    features = [c for c in screen if c.startswith("Cells")]
    changed = screen.copy()
    changed.loc[~train, features] = (
        np.random.default_rng(1).normal(size=((~train).sum(), len(features))) * 1e3
    )
    outputs = []
    for whole in (screen, changed):
        steps = preparation(ALL_STEPS)
        steps.fit(whole[train])
        outputs.append(steps.transform(whole)[train])
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_preparation_transforms_test_rows_of_training_plates_independently(
    screen: pd.DataFrame,
) -> None:
    train = (np.arange(len(screen)) % 3) > 0
    steps = preparation(ALL_STEPS).fit(screen[train])
    together = steps.transform(screen[~train])
    separate = np.concatenate(
        [steps.transform(screen[~train].iloc[[i]]) for i in range((~train).sum())]
    )
    np.testing.assert_allclose(together, separate, atol=1e-9)


def test_preparation_can_be_cloned(screen: pd.DataFrame) -> None:
    steps = preparation(ALL_STEPS)
    np.testing.assert_allclose(clone(steps).fit_transform(screen), steps.fit_transform(screen))


@pytest.mark.parametrize(
    "change",
    [
        {"correlation": 0.0},
        {"sphere_regularization": 0.0},
        {"max_missing": 1.5},
        {"pca": -1},
        {"pca_variance": -1.0},
    ],
)
def test_preparation_refuses_numbers_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"^--{next(iter(change)).replace('_', '-')} "):
        Preparation(**change)


def test_components_are_limited_by_rows_and_features(screen: pd.DataFrame) -> None:
    assert preparation(Preparation(pca=500)).fit_transform(screen).shape == (96, 12)
