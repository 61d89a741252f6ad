"""Baselines find what is there to be found without cells, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from perturbjax.core.plates import parse_wells
from perturbjax.evaluation import baselines
from perturbjax.evaluation.scores import point, score
from perturbjax.evaluation.wells import aggregate_wells, well_ids


def plate(name: str, labels: np.ndarray, *, sites: int = 2) -> tuple[pd.DataFrame, np.ndarray]:
    """A 96-well plate with the given labels (8, 12), and its labels a site."""
    rows, columns = np.divmod(np.repeat(np.arange(96), sites), 12)
    wells = [
        f"{'ABCDEFGH'[row]}{column + 1:02d}" for row, column in zip(rows, columns, strict=True)
    ]
    return pd.DataFrame({"Metadata_Plate": name, "Metadata_Well": wells}), labels[rows, columns]


def screen(*grids: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    tables, labels = zip(*(plate(f"P{i}", grid) for i, grid in enumerate(grids)), strict=True)
    return pd.concat(tables, ignore_index=True), np.concatenate(labels)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    return score(labels, probabilities)["accuracy"]


def test_wells_are_parsed_to_row_and_column():
    names = ["A01", "P24", "h3", "AA01", "AF48", "Z09", "AG01", "well 7", "A00", "01A", ""]
    expected = [(0, 0), (15, 23), (7, 2), (26, 0), (31, 47), (25, 8), *[(-1, -1)] * 5]
    assert [tuple(spot) for spot in parse_wells(pd.Series(names))] == expected


def test_a_well_says_the_mean_of_its_sites_probabilities():
    probabilities = np.array([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    labels, together = aggregate_wells(np.array([1, 0, 1]), np.array([0, 1, 0]), probabilities)
    np.testing.assert_array_equal(labels, [1, 0])
    np.testing.assert_allclose(together, [[0.2, 0.8], [0.7, 0.3]])


def test_wells_of_the_same_name_on_two_plates_are_two():
    index = pd.DataFrame(
        {"Metadata_Plate": ["P", "Q", "P"], "Metadata_Well": ["A01", "A01", "A01"]}
    )
    np.testing.assert_array_equal(well_ids(index), [0, 1, 0])


def test_the_majority_baseline_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    train, test = rng.choice(8, size=300, p=np.arange(1, 9) / 36), rng.integers(8, size=100)
    ours = baselines.majority(pd.DataFrame(), train, pd.DataFrame(index=range(100)), 8)
    theirs = (
        DummyClassifier(strategy="prior")
        .fit(np.zeros((300, 1)), train)
        .predict_proba(np.zeros((100, 1)))
    )
    np.testing.assert_allclose(ours, theirs)
    assert accuracy(ours, test) == np.mean(test == np.bincount(train).argmax())


def test_chance_scores_what_many_random_draws_score_on_the_mean():
    rng = np.random.default_rng(1)
    shares = np.arange(1, 9) / 36
    train, test = rng.choice(8, size=400, p=shares), rng.choice(8, size=200, p=shares)
    expected = point(baselines.chance_counts(test, train, 8, np.arange(200)))
    logits = np.log(np.bincount(train, minlength=8) / 400)
    draws = [score(test, np.exp(g) / np.exp(g).sum(axis=1, keepdims=True)) for g in
             (logits + rng.gumbel(size=(200, 8)) for _ in range(400))]  # fmt: skip
    for metric, value in expected.items():
        assert value == pytest.approx(np.mean([draw[metric] for draw in draws]), abs=0.01)


def test_chance_never_draws_a_class_without_training_sites():
    found = point(baselines.chance_counts(np.array([2, 2]), np.array([0, 1]), 3, np.array([0, 1])))
    assert found["accuracy"] == 0 and found["top5"] == 0


def test_position_finds_a_layout_that_plates_share():
    grid = np.random.default_rng(2).integers(6, size=(8, 12))
    train, train_labels = screen(grid, grid)
    test, labels = plate("new", grid)
    assert accuracy(baselines.position(train, train_labels, test, 6), labels) == 1.0


def test_position_finds_a_gradient_from_neighbours_on_the_same_plate():
    """Labels change from left to right; wells held out at random are told by their neighbours."""
    grid = np.broadcast_to(np.arange(12) // 3, (8, 12))
    index, labels = screen(grid, grid)
    held = np.isin(well_ids(index), np.random.default_rng(3).choice(192, 40, replace=False))
    found = baselines.position(index[~held], labels[~held], index[held], 4)
    assert accuracy(found, labels[held]) > 0.9


def test_position_prefers_its_own_plate_where_layouts_differ():
    """Every plate has its own gradient: only wells of the same plate tell."""
    left = np.broadcast_to(np.arange(12) // 3, (8, 12))
    grids = [left, 3 - left, np.broadcast_to(np.arange(8)[:, None] // 2, (8, 12))]
    index, labels = screen(*grids)
    held = np.isin(well_ids(index), np.random.default_rng(4).choice(288, 60, replace=False))
    found = baselines.position(index[~held], labels[~held], index[held], 4)
    assert accuracy(found, labels[held]) > 0.85


def test_position_answers_everything_where_wells_stand_on_both_sides():
    grid = np.random.default_rng(5).integers(6, size=(8, 12))
    index, labels = screen(grid, grid.T.reshape(8, 12))
    held = np.arange(len(index)) % 2 == 0
    assert (
        accuracy(baselines.position(index[~held], labels[~held], index[held], 6), labels[held])
        == 1.0
    )


def test_position_finds_nothing_in_randomised_layouts():
    rng = np.random.default_rng(6)
    train, train_labels = screen(*rng.integers(6, size=(4, 8, 12)))
    test, labels = plate("new", rng.integers(6, size=(8, 12)))
    assert accuracy(baselines.position(train, train_labels, test, 6), labels) < 0.35


def test_position_says_why_it_cannot():
    train, labels = screen(np.zeros((8, 12), dtype=int))
    with pytest.raises(baselines.BaselineUnavailable, match="training well 'site 4'"):
        baselines.position(train.assign(Metadata_Well="site 4"), labels, train, 1)


def counts(rng: np.random.Generator, labels: np.ndarray, effect: float) -> pd.DataFrame:
    n_cells = np.exp(rng.normal(3 + effect * labels, 0.2))
    return pd.DataFrame(
        {"n_cells": n_cells, "mask_area": n_cells * np.exp(rng.normal(4, 0.1, len(labels)))}
    )


def test_cell_count_finds_toxic_classes_and_only_those():
    rng = np.random.default_rng(7)
    train, test = rng.integers(3, size=300), rng.integers(3, size=300)
    toxic = baselines.cell_count(counts(rng, train, -0.8), train, counts(rng, test, -0.8), 3)
    harmless = baselines.cell_count(counts(rng, train, 0), train, counts(rng, test, 0), 3)
    assert accuracy(toxic, test) > 0.9
    assert accuracy(harmless, test) < 0.45


def test_with_many_sites_cell_count_is_quadratic_discriminant_analysis():
    rng = np.random.default_rng(8)
    train, test = rng.integers(3, size=6000), rng.integers(3, size=500)
    x, z = counts(rng, train, 0.2), counts(rng, test, 0.2)
    theirs = QuadraticDiscriminantAnalysis().fit(np.log1p(x), train).predict_proba(np.log1p(z))
    np.testing.assert_allclose(baselines.cell_count(x, train, z, 3), theirs, atol=0.02)


def test_cell_count_never_predicts_a_class_without_training_sites_and_bears_constant_counts():
    constant = pd.DataFrame({"n_cells": np.ones(6), "mask_area": np.ones(6)})
    found = baselines.cell_count(constant, np.array([0, 0, 0, 0, 2, 2]), constant, 3)
    np.testing.assert_allclose(found[0], [4 / 6, 0, 2 / 6], atol=1e-6)


def test_cell_count_says_why_it_cannot():
    table = pd.DataFrame({"n_cells": [1.0, np.nan], "mask_area": [1.0, 2.0]})
    with pytest.raises(baselines.BaselineUnavailable, match="missing for some sites"):
        baselines.cell_count(table, np.array([0, 1]), table, 2)
    with pytest.raises(baselines.BaselineUnavailable, match="no column mask_area"):
        baselines.cell_count(table[["n_cells"]], np.array([0, 1]), table, 2)


def brightness(rng: np.random.Generator, labels: np.ndarray, effect: float) -> pd.DataFrame:
    level = 500 * np.exp(effect * labels + rng.normal(0, 0.2, len(labels)))
    noise = rng.lognormal(5, 0.3, size=(len(labels), 2))
    return pd.DataFrame(
        {"mean_DNA": level, "p50_DNA": noise[:, 0], "std_ER": noise[:, 1], "n_cells": labels}
    )


def test_intensity_finds_bright_classes_and_only_those():
    rng = np.random.default_rng(9)
    train, test = rng.integers(3, size=300), rng.integers(3, size=300)
    bright = baselines.intensity(brightness(rng, train, 0.8), train, brightness(rng, test, 0.8), 3)
    alike = baselines.intensity(brightness(rng, train, 0), train, brightness(rng, test, 0), 3)
    assert accuracy(bright, test) > 0.85
    assert accuracy(alike, test) < 0.45


def test_intensity_is_the_logistic_regression_of_scikit_learn_without_classes_that_never_train():
    rng = np.random.default_rng(10)
    train, test = 2 * rng.integers(3, size=200), 2 * rng.integers(3, size=50)
    x, z = brightness(rng, train, 0.2), brightness(rng, test, 0.2)
    found = baselines.intensity(x, train, z, 5)
    x, z = (np.log1p(table.drop(columns="n_cells")) for table in (x, z))
    centre, scale = x.mean(), x.std(ddof=0)
    theirs = LogisticRegression(tol=1e-8, max_iter=1000).fit((x - centre) / scale, train)
    np.testing.assert_allclose(
        found[:, [0, 2, 4]], theirs.predict_proba((z - centre) / scale), atol=1e-3
    )
    np.testing.assert_array_equal(found[:, [1, 3]], 0)


def test_intensity_says_why_it_cannot():
    table = pd.DataFrame({"mean_DNA": [1.0, np.nan], "n_cells": [1, 2]})
    with pytest.raises(baselines.BaselineUnavailable, match="missing for some sites"):
        baselines.intensity(table, np.array([0, 1]), table, 2)
    with pytest.raises(baselines.BaselineUnavailable, match="no columns mean_<channel>"):
        baselines.intensity(table[["n_cells"]], np.array([0, 1]), table, 2)


@pytest.mark.shared
def test_on_plates_of_one_layout_position_alone_names_every_compound(shared):
    """CPJUMP1's compound plates share a map: a held-out plate is answered without looking at a cell."""
    files = sorted((shared / "data" / "cpjump1_profiles").glob("*.csv.gz"))
    columns = ["Metadata_Plate", "Metadata_Well", "Metadata_pert_iname"]
    tables = [pd.read_csv(file, usecols=columns) for file in files]
    labels = pd.factorize(pd.concat(tables)["Metadata_pert_iname"])[0]
    index, held = pd.concat(tables, ignore_index=True), np.repeat(np.arange(len(files)), 384) == 0
    found = baselines.position(index[~held], labels[~held], index[held], int(labels.max()) + 1)
    assert labels.max() + 1 == 303
    assert accuracy(found, labels[held]) == 1.0
