"""Features relative to the plate: choice of the reference and values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.control_relative import PlateRelative, choose_reference
from perturbjax.profiles.preparation import preparation
from perturbjax.profiles.profile_options import Preparation
from perturbjax.profiles.table_steps import NEGCON, feature_values

CLASSES = 6


def screen(
    classes_of_plate: list[list[int]], *, controls: int = 0, shift: float = 6.0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return plates with eight rows per class, a random shift, and controls (class 0)."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(CLASSES, 8)) * 1.2
    tables, labels = [], []
    for number, classes in enumerate(classes_of_plate):
        plate_labels = np.concatenate([np.repeat(classes, 8), np.zeros(controls, int)])
        values = (
            centers[plate_labels]
            + rng.normal(size=(len(plate_labels), 8))
            + shift * rng.normal(size=8)
        )
        table = pd.DataFrame(values, columns=[f"f{i}" for i in range(8)])
        table.insert(0, PLATE, f"P{number}")
        table.insert(1, WELL, "A01")
        table.insert(2, NEGCON, np.arange(len(plate_labels)) >= len(plate_labels) - controls)
        tables.append(table)
        labels.append(plate_labels)
    return pd.concat(tables, ignore_index=True), np.concatenate(labels)


ALL = [list(range(CLASSES))] * 9
#: Two classes a plate, always the same two, and hardly any shift: a plate's mean is their mean.
FEW = [[0, 1], [2, 3], [4, 5]] * 3


def test_choose_reference_prefers_negative_controls():
    how, why = choose_reference(*screen(ALL, controls=5))
    assert how == "negcon" and "at least 5 controls per plate" in why


def test_choose_reference_uses_mean_of_plates_with_all_classes():
    how, why = choose_reference(*screen(ALL))
    assert how == "plate" and "plates hold 6 of 6 classes" in why and "0 negative controls" in why


def test_choose_reference_rejects_mean_of_plates_with_few_classes():
    how, why = choose_reference(*screen(FEW, shift=0.2))
    assert how == "none" and "plates hold 2 of 6 classes" in why and "not added" in why


def test_choose_reference_needs_two_groups():
    how, why = choose_reference(*screen(ALL[:1]))
    assert how == "none" and "one group" in why


def test_plate_relative_removes_shift_of_new_plate():
    table, _ = screen(ALL, controls=5)
    in_training = (table[PLATE] != "P8").to_numpy()
    step = PlateRelative("negcon").fit(table[in_training])
    moved = table[~in_training].copy()
    moved[[f"f{i}" for i in range(8)]] += 100
    for whole, other in ((step.transform(table[~in_training]), step.transform(moved)),):
        np.testing.assert_allclose(
            feature_values(whole)[:, 8:], feature_values(other)[:, 8:], atol=1e-9
        )


def test_plate_relative_compares_controls_with_other_controls():
    table, _ = screen(ALL[:1], controls=4)
    relative = feature_values(PlateRelative("negcon").fit_transform(table))[:, 8:]
    values, negcon = feature_values(table), table[NEGCON].to_numpy()
    first = np.flatnonzero(negcon)[0]
    others = np.setdiff1d(np.flatnonzero(negcon), first)
    np.testing.assert_allclose(relative[first], values[first] - values[others].mean(0))
    np.testing.assert_allclose(relative[0], values[0] - values[negcon].mean(0))


def test_plate_relative_names_plate_without_controls():
    table, _ = screen(ALL)
    with pytest.raises(
        InputError, match=r"plate P0: 0 negative controls, .* at least two.*--negcon"
    ):
        PlateRelative("negcon").fit(table)


def test_plate_relative_transforms_new_plates_without_labels():
    table, labels = screen(ALL)
    in_training = (table[PLATE] != "P8").to_numpy()
    steps = preparation(Preparation(relative="auto", pca=4, normalize_by="training"))
    steps.fit(table[in_training], labels[in_training])
    assert steps["relative"].chosen_ == "plate"
    assert steps.transform(table[~in_training]).shape == (48, 8)


def test_components_keep_image_statistics():
    table, labels = screen(ALL)
    table = table.rename(columns={"f7": "index_log_n_cells"})
    steps = preparation(Preparation(pca=3, normalize="none", outliers="none"))
    result = steps.fit_transform(table, labels)
    assert result.shape == (len(table), 4)
    np.testing.assert_array_equal(result[:, 3], table["index_log_n_cells"])
    balanced = preparation(
        Preparation(pca=3, pca_variance=20, normalize="none", outliers="none")
    ).fit_transform(table)
    np.testing.assert_allclose([balanced[:, :3].var(0).sum(), balanced[:, 3].var()], 20, rtol=0.02)
