"""Scaling, sphering and selection: what they do, and that only training rows decide it."""

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
    NEGCON,
    Clean,
    CorrelationFilter,
    Scaler,
    Sphere,
    Tame,
    as_table,
    feature_values,
    preparation,
)
from perturbjax.profiles.profile_options import Preparation


def table_of(
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


def test_gaps_are_filled_with_the_training_median_and_hollow_or_constant_features_go() -> None:
    values = np.random.default_rng(0).normal(size=(40, 4))
    values[:10, 0] = np.nan
    values[:, 1] = 7.0
    values[3, 2] = np.nan
    step = Clean(max_missing=0.05).fit(table_of(values))
    after = step.transform(table_of(np.full((1, 4), np.nan)))
    assert list(after.columns[3:]) == ["f2", "f3"]
    np.testing.assert_allclose(feature_values(after)[0], np.nanmedian(values[:, 2:], axis=0))
    assert step.notes() == [
        "1 features dropped, missing in more than 5% of the training rows: f0",
        "1 features dropped, constant in the training rows: f1",
        "1 missing training values filled with the feature's training median",
    ]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(InputError, match="every column is constant or missing"):
        Clean().fit(table_of(np.ones((5, 3))))


@pytest.mark.parametrize(
    ("how", "centre", "spread"), [("standardize", np.mean, np.std), ("robustize", np.median, None)]
)
def test_each_plate_gets_the_same_centre_and_scale(
    screen: pd.DataFrame, how: str, centre, spread
) -> None:
    scaled = Scaler(how).fit_transform(screen)
    for _, plate in scaled.groupby("Metadata_Plate"):
        values = feature_values(plate)
        np.testing.assert_allclose(centre(values, axis=0), 0, atol=1e-6)
        size = (
            values.std(axis=0)
            if how == "standardize"
            else 1.4826 * np.median(np.abs(values), axis=0)
        )
        np.testing.assert_allclose(size, 1, rtol=1e-6)


def test_negative_controls_can_give_the_scale(screen: pd.DataFrame) -> None:
    scaled = Scaler("standardize", reference="negcon").fit_transform(screen)
    controls = feature_values(scaled[(scaled["Metadata_Plate"] == "P2") & scaled[NEGCON]])
    np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-6)
    with pytest.raises(InputError, match="plate P0: 0 rows to scale it by"):
        Scaler("standardize", reference="negcon").fit(screen.assign(**{NEGCON: False}))


def test_a_plate_seen_in_training_keeps_its_training_scale(screen: pd.DataFrame) -> None:
    train, test = screen.iloc[::2], screen.iloc[1::2].copy()
    step = Scaler("robustize").fit(train)
    before = step.transform(test)
    test.loc[test.index[0], "Cells_f0"] = 1e9
    after = step.transform(test)
    pd.testing.assert_frame_equal(before.iloc[1:], after.iloc[1:])


def test_a_new_plate_is_scaled_by_its_own_rows(screen: pd.DataFrame) -> None:
    new = screen["Metadata_Plate"] == "P3"
    scaled = feature_values(Scaler("standardize").fit(screen[~new]).transform(screen[new]))
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)


def test_mad_of_zero_does_not_divide_by_zero() -> None:
    values = np.zeros((20, 1))
    values[:3] = 5
    scaled = feature_values(Scaler("robustize").fit_transform(table_of(values)))
    assert np.isfinite(scaled).all() and scaled.max() < 10


def test_outliers_are_cut_or_made_logarithmic() -> None:
    values = np.array([[-100.0], [0.5], [100.0]])
    assert feature_values(Tame("clip").fit_transform(table_of(values))).ravel().tolist() == [
        -10,
        0.5,
        10,
    ]
    np.testing.assert_allclose(
        feature_values(Tame("arcsinh").fit_transform(table_of(values))), np.arcsinh(values)
    )


@settings(max_examples=50)
@given(
    n=st.integers(3, 40),
    d=st.integers(2, 12),
    method=st.sampled_from(["zca", "zca_cor", "pca_cor"]),
    regularization=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_sphering_whitens_its_reference(
    n: int, d: int, method: str, regularization: float, seed: int
) -> None:
    """A direction of variance θ ends with θ / (θ + ε): nearly 1 where it stands out of ε, 0 outside the reference."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    before = np.linalg.eigvalsh(
        np.cov(values.T) if method == "zca" else np.corrcoef(values.T)
    ).clip(0)
    whitened = feature_values(Sphere("all", method, regularization).fit_transform(table_of(values)))
    after = np.linalg.eigvalsh(np.cov(whitened.T).reshape(whitened.shape[1], -1))
    expected = np.sort(before / (before + regularization * before.mean()))
    np.testing.assert_allclose(after, expected[-len(after) :], atol=1e-5)


def test_zca_equals_the_inverse_root_of_the_covariance() -> None:
    values = np.random.default_rng(1).normal(size=(50, 6)) @ np.random.default_rng(2).normal(
        size=(6, 6)
    )
    covariance = np.cov(values.T)
    eigenvalues, axes = np.linalg.eigh(covariance)
    root = axes @ np.diag(1 / np.sqrt(eigenvalues + 0.3 * eigenvalues.mean())) @ axes.T
    got = feature_values(Sphere("all", "zca", 0.3).fit_transform(table_of(values)))
    np.testing.assert_allclose(got, (values - values.mean(axis=0)) @ root, atol=1e-8)


def test_sphering_with_fewer_controls_than_features_is_defined() -> None:
    values = np.random.default_rng(0).normal(size=(30, 20))
    controls = np.arange(30) < 6
    whitened = feature_values(
        Sphere("negcon", "zca_cor", 1.0).fit_transform(table_of(values, negcon=controls))
    )
    assert whitened.shape == (30, 20) and np.isfinite(whitened).all()
    with pytest.raises(InputError, match="--sphere negcon: 2 such training rows"):
        Sphere("negcon").fit(table_of(values, negcon=np.arange(30) < 2))


def test_no_kept_pair_correlates_beyond_the_threshold() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(100, 5))
    values = np.hstack([base, base + 0.05 * rng.normal(size=(100, 5)), -base])
    step = CorrelationFilter(0.9).fit(table_of(values))
    kept = feature_values(step.transform(table_of(values)))
    assert kept.shape[1] == 5
    assert np.abs(np.corrcoef(kept.T) - np.eye(5)).max() <= 0.9


EVERYTHING = Preparation(
    normalize="robustize", outliers="arcsinh", select=True, sphere="negcon", pca=5, unit_length=True
)


def test_changing_test_rows_does_not_change_what_was_fitted(screen: pd.DataFrame) -> None:
    """Plates stand on both sides here, so even the plate scale could leak."""
    train = (np.arange(len(screen)) % 3) > 0
    features = [c for c in screen if c.startswith("Cells")]
    spoiled = screen.copy()
    spoiled.loc[~train, features] = (
        np.random.default_rng(1).normal(size=((~train).sum(), len(features))) * 1e3
    )
    outputs = []
    for whole in (screen, spoiled):
        steps = preparation(EVERYTHING)
        steps.fit(whole[train])
        outputs.append(steps.transform(whole)[train])
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_test_rows_do_not_see_each_other_on_plates_of_the_training(screen: pd.DataFrame) -> None:
    train = (np.arange(len(screen)) % 3) > 0
    steps = preparation(EVERYTHING).fit(screen[train])
    together = steps.transform(screen[~train])
    alone = np.concatenate(
        [steps.transform(screen[~train].iloc[[i]]) for i in range((~train).sum())]
    )
    np.testing.assert_allclose(together, alone, atol=1e-9)


def test_the_pipeline_can_be_cloned_as_scikit_learn_asks(screen: pd.DataFrame) -> None:
    steps = preparation(EVERYTHING)
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
def test_numbers_out_of_range_name_their_flag(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"^--{next(iter(change)).replace('_', '-')} "):
        Preparation(**change)


def test_more_components_than_rows_means_all_there_are(screen: pd.DataFrame) -> None:
    assert preparation(Preparation(pca=500)).fit_transform(screen).shape == (96, 12)
