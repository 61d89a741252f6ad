"""Relative to the plate: what may be a reference follows from the data, and the reason is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.control_relative import Relative, choose
from perturbjax.profiles.preparation import NEGCON, feature_values, preparation
from perturbjax.profiles.profile_options import Preparation

CLASSES = 6


def screen(
    classes_of_plate: list[list[int]], *, controls: int = 0, shift: float = 6.0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Plates of eight rows a class, each plate shifted at random, and controls (of class 0) on every plate."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, 8)) * 1.2
    tables, labels = [], []
    for number, classes in enumerate(classes_of_plate):
        of_plate = np.concatenate([np.repeat(classes, 8), np.zeros(controls, int)])
        values = (
            centres[of_plate] + rng.normal(size=(len(of_plate), 8)) + shift * rng.normal(size=8)
        )
        table = pd.DataFrame(values, columns=[f"f{i}" for i in range(8)])
        table.insert(0, PLATE, f"P{number}")
        table.insert(1, WELL, "A01")
        table.insert(2, NEGCON, np.arange(len(of_plate)) >= len(of_plate) - controls)
        tables.append(table)
        labels.append(of_plate)
    return pd.concat(tables, ignore_index=True), np.concatenate(labels)


ALL = [list(range(CLASSES))] * 9
#: Two classes a plate, always the same two, and hardly any shift: a plate's mean is their mean.
FEW = [[0, 1], [2, 3], [4, 5]] * 3


def test_controls_on_every_plate_are_the_reference():
    how, why = choose(*screen(ALL, controls=5))
    assert how == "negcon" and "every plate holds 5 or more" in why


def test_a_plate_of_all_classes_is_its_own_reference():
    how, why = choose(*screen(ALL))
    assert how == "plate" and "plates hold 6 of 6 classes" in why and "0 negative controls" in why


def test_the_mean_of_a_plate_of_few_classes_is_no_reference():
    how, why = choose(*screen(FEW, shift=0.2))
    assert how == "none" and "plates hold 2 of 6 classes" in why and "no reference" in why


def test_one_group_cannot_be_tried():
    how, why = choose(*screen(ALL[:1]))
    assert how == "none" and "one group" in why


def test_what_is_relative_loses_the_shift_of_a_plate_that_was_not_there():
    table, _ = screen(ALL, controls=5)
    seen = (table[PLATE] != "P8").to_numpy()
    step = Relative("negcon").fit(table[seen])
    moved = table[~seen].copy()
    moved[[f"f{i}" for i in range(8)]] += 100
    for whole, other in ((step.transform(table[~seen]), step.transform(moved)),):
        np.testing.assert_allclose(
            feature_values(whole)[:, 8:], feature_values(other)[:, 8:], atol=1e-9
        )


def test_a_control_is_relative_to_the_other_controls():
    table, _ = screen(ALL[:1], controls=4)
    relative = feature_values(Relative("negcon").fit_transform(table))[:, 8:]
    values, negcon = feature_values(table), table[NEGCON].to_numpy()
    first = np.flatnonzero(negcon)[0]
    others = np.setdiff1d(np.flatnonzero(negcon), first)
    np.testing.assert_allclose(relative[first], values[first] - values[others].mean(0))
    np.testing.assert_allclose(relative[0], values[0] - values[negcon].mean(0))


def test_controls_that_are_not_there_name_the_plate_and_the_flag():
    table, _ = screen(ALL)
    with pytest.raises(
        InputError, match=r"plate P0: 0 negative controls .*--relative negcon.*--negcon"
    ):
        Relative("negcon").fit(table)


def test_labels_of_rows_to_be_predicted_change_nothing():
    table, labels = screen(ALL)
    seen = (table[PLATE] != "P8").to_numpy()
    steps = preparation(Preparation(relative="auto", pca=4, normalize_by="training"))
    steps.fit(table[seen], labels[seen])
    assert steps["relative"].chosen_ == "plate"
    assert steps.transform(table[~seen]).shape == (48, 8)


def test_statistics_of_the_index_are_no_part_of_the_components():
    table, labels = screen(ALL)
    table = table.rename(columns={"f7": "index_log_n_cells"})
    steps = preparation(Preparation(pca=3, normalize="none", outliers="none"))
    found = steps.fit_transform(table, labels)
    assert found.shape == (len(table), 4)
    np.testing.assert_array_equal(found[:, 3], table["index_log_n_cells"])
    alike = preparation(
        Preparation(pca=3, pca_variance=20, normalize="none", outliers="none")
    ).fit_transform(table)
    np.testing.assert_allclose([alike[:, :3].var(0).sum(), alike[:, 3].var()], 20, rtol=0.02)
