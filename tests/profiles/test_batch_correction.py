"""Batch correction removes differences between plates and keeps treatment effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.profiles.batch_correction import Combat, Coral
from perturbjax.profiles.preparation import Sphering, preparation
from perturbjax.profiles.profile_options import Preparation
from perturbjax.profiles.table_steps import NEGCON, feature_values

FEATURES = 6


def screen(plates: int = 3, controls: int = 40, treated: int = 20, seed: int = 0) -> pd.DataFrame:
    """Return plates with random linear maps and shifts; treated wells differ in feature 0."""
    rng = np.random.default_rng(seed)
    parts = []
    for plate in range(plates):
        clean = rng.normal(size=(controls + treated, FEATURES))
        clean[controls:, 0] += 3
        mixed = (
            clean @ (np.eye(FEATURES) + 0.3 * rng.normal(size=(FEATURES, FEATURES)))
            + rng.normal(size=FEATURES) * 4
        )
        part = pd.DataFrame(mixed, columns=[f"f{i}" for i in range(FEATURES)])
        part.insert(0, "Metadata_Plate", f"P{plate}")
        part.insert(1, "Metadata_Well", [f"A{i:02d}" for i in range(len(part))])
        part.insert(2, NEGCON, np.arange(len(part)) < controls)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def controls_of(table: pd.DataFrame, plate: str) -> np.ndarray:
    return feature_values(table[(table["Metadata_Plate"] == plate) & table[NEGCON]])


def test_coral_equalizes_mean_and_covariance_of_controls():
    table = screen()
    step = Coral(regularization=1e-6).fit(table)
    after = step.transform(table)
    expected = np.mean([np.cov(controls_of(table, f"P{i}").T) for i in range(3)], axis=0)
    for plate in ("P0", "P1", "P2"):
        np.testing.assert_allclose(controls_of(after, plate).mean(axis=0), step.center_, atol=1e-8)
        np.testing.assert_allclose(
            np.cov(controls_of(after, plate).T), expected, atol=1e-4 * np.trace(expected)
        )


def test_tvn_gives_controls_of_new_plates_identity_covariance():
    """After sphering, plates differ in the covariance of their controls; CORAL removes this."""
    table = screen(plates=4)
    train, new = table[table["Metadata_Plate"] != "P3"], table[table["Metadata_Plate"] == "P3"]
    sphere = Sphering("negcon", "zca", regularization=1e-6).fit(train)
    step = Coral(regularization=1e-6).fit(sphere.transform(train))
    second = Sphering("negcon", "zca", regularization=1e-6).fit(
        step.transform(sphere.transform(train))
    )
    for part in (train, new):
        after = second.transform(step.transform(sphere.transform(part)))
        for plate in part["Metadata_Plate"].unique():
            np.testing.assert_allclose(
                np.cov(controls_of(after, plate).T), np.eye(FEATURES), atol=0.02
            )


def test_combat_removes_shift_and_spread_and_shrinks_small_samples():
    table = screen()
    after = Combat().fit(table).transform(table)
    for values in (np.array([controls_of(after, f"P{i}").mean(axis=0) for i in range(3)]),):
        assert values.std(axis=0).max() < 0.1 * controls_of(table, "P0").std()
    spreads = np.array([controls_of(after, f"P{i}").std(axis=0) for i in range(3)])
    before = np.array([controls_of(table, f"P{i}").std(axis=0) for i in range(3)])
    assert (spreads.std(axis=0) < 0.5 * before.std(axis=0)).all()
    few = screen(controls=3)
    own = Combat().fit(few).plates_["P0"].spread
    plain = controls_of(few, "P0").std(axis=0, ddof=1) / Combat().fit(few).spread_
    assert own.std() < 0.7 * plain.std(), (
        "the spread of three rows must be shrunk towards that of other features"
    )


@pytest.mark.parametrize("step", [Coral(), Combat()])
def test_alignment_of_new_plate_is_independent_and_keeps_effects(step):
    table = screen(plates=4)
    train, new = table[table["Metadata_Plate"] != "P3"], table[table["Metadata_Plate"] == "P3"]
    step.fit(train)
    separate, together = step.transform(train), step.transform(table)
    pd.testing.assert_frame_equal(separate, together[together["Metadata_Plate"] != "P3"])
    pd.testing.assert_frame_equal(step.transform(new), together[together["Metadata_Plate"] == "P3"])
    moved = step.transform(new)
    lead = feature_values(moved[~moved[NEGCON]]).mean(axis=0) - feature_values(
        moved[moved[NEGCON]]
    ).mean(axis=0)
    assert np.linalg.norm(lead) > 1


def test_alignment_in_pipeline_and_plate_without_controls():
    table = screen()
    labels = np.zeros(len(table), dtype=int)
    for align in ("coral", "combat"):
        steps = preparation(Preparation(normalize="none", sphere="negcon", align=align))
        assert (
            "align" in steps.named_steps and np.isfinite(steps.fit_transform(table, labels)).all()
        )
    lone = table[~((table["Metadata_Plate"] == "P1") & table[NEGCON])]
    with pytest.raises(
        InputError,
        match="plate P1: 0 negative controls for the alignment of plates, but at least two",
    ):
        Coral().fit(lone)
    everything = Combat("all").fit(lone)
    assert set(everything.plates_) == {"P0", "P1", "P2"}
