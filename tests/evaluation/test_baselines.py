"""Baselines detect simulated technical effects, and are at chance without them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression

from perturbjax.core.plates import parse_wells
from perturbjax.evaluation import baselines
from perturbjax.evaluation.scores import pooled_scores, score
from perturbjax.evaluation.wells import aggregate_wells, well_ids


def plate(name: str, labels: np.ndarray, *, sites: int = 2) -> tuple[pd.DataFrame, np.ndarray]:
    """Simulate a 96-well plate with labels (8, 12); return sites and their labels."""
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


def test_parse_wells_returns_row_and_column():
    names = [
        "A01",
        "P24",
        "h3",
        "A-01",
        "B - 2",
        "r03c04",
        "AA01",
        "AF48",
        "Q1-A01",
        "q2_A1",
        "Q3 H12",
        "H12.Q4",
        "A01-Q2",
        "Q4-P24",
        "Z09",
        "AG01",
        "well 7",
        "A00",
        "01A",
        "Q5-A01",
        "Q1-Q12",
        "",
    ]
    expected = [
        (0, 0),
        (15, 23),
        (7, 2),
        (0, 0),
        (1, 1),
        (2, 3),
        (26, 0),
        (31, 47),
        (0, 0),
        (0, 1),
        (15, 22),
        (15, 23),
        (0, 1),
        (31, 47),
        (25, 8),
        *[(-1, -1)] * 7,
    ]
    assert [tuple(spot) for spot in parse_wells(pd.Series(names))] == expected


def test_aggregate_wells_averages_probabilities():
    probabilities = np.array([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    labels, means = aggregate_wells(np.array([1, 0, 1]), np.array([0, 1, 0]), probabilities)
    np.testing.assert_array_equal(labels, [1, 0])
    np.testing.assert_allclose(means, [[0.2, 0.8], [0.7, 0.3]])


def test_well_ids_differ_between_plates():
    index = pd.DataFrame(
        {"Metadata_Plate": ["P", "Q", "P"], "Metadata_Well": ["A01", "A01", "A01"]}
    )
    np.testing.assert_array_equal(well_ids(index), [0, 1, 0])


def test_majority_equals_scikit_learn_dummy():
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


def test_chance_counts_equal_mean_of_random_draws():
    rng = np.random.default_rng(1)
    fractions = np.arange(1, 9) / 36
    train, test = rng.choice(8, size=400, p=fractions), rng.choice(8, size=200, p=fractions)
    expected = pooled_scores(baselines.chance_counts(test, train, 8, np.arange(200)))
    logits = np.log(np.bincount(train, minlength=8) / 400)
    draws = [
        score(test, np.exp(g) / np.exp(g).sum(axis=1, keepdims=True))
        for g in (logits + rng.gumbel(size=(200, 8)) for _ in range(400))
    ]
    for metric, value in expected.items():
        assert value == pytest.approx(np.mean([draw[metric] for draw in draws]), abs=0.01)


def test_chance_counts_exclude_untrained_classes():
    predicted = pooled_scores(
        baselines.chance_counts(np.array([2, 2]), np.array([0, 1]), 3, np.array([0, 1]))
    )
    assert predicted["accuracy"] == 0 and predicted["top5"] == 0


def test_position_detects_shared_layout():
    grid = np.random.default_rng(2).integers(6, size=(8, 12))
    train, train_labels = screen(grid, grid)
    test, labels = plate("new", grid)
    assert accuracy(baselines.position(train, train_labels, test, 6), labels) == 1.0


def test_position_detects_gradient_from_neighbors():
    """Labels change from left to right; neighbors predict random test_sites-out wells."""
    grid = np.broadcast_to(np.arange(12) // 3, (8, 12))
    index, labels = screen(grid, grid)
    test_sites = np.isin(well_ids(index), np.random.default_rng(3).choice(192, 40, replace=False))
    predicted = baselines.position(index[~test_sites], labels[~test_sites], index[test_sites], 4)
    assert accuracy(predicted, labels[test_sites]) > 0.9


def test_position_weights_own_plate_if_layouts_differ():
    """Every plate has another gradient, so only wells of the same plate are informative."""
    left = np.broadcast_to(np.arange(12) // 3, (8, 12))
    grids = [left, 3 - left, np.broadcast_to(np.arange(8)[:, None] // 2, (8, 12))]
    index, labels = screen(*grids)
    test_sites = np.isin(well_ids(index), np.random.default_rng(4).choice(288, 60, replace=False))
    predicted = baselines.position(index[~test_sites], labels[~test_sites], index[test_sites], 4)
    assert accuracy(predicted, labels[test_sites]) > 0.85


def test_position_is_perfect_if_wells_are_shared():
    grid = np.random.default_rng(5).integers(6, size=(8, 12))
    index, labels = screen(grid, grid.T.reshape(8, 12))
    test_sites = np.arange(len(index)) % 2 == 0
    assert (
        accuracy(
            baselines.position(index[~test_sites], labels[~test_sites], index[test_sites], 6),
            labels[test_sites],
        )
        == 1.0
    )


def test_position_is_at_chance_for_random_layouts():
    rng = np.random.default_rng(6)
    train, train_labels = screen(*rng.integers(6, size=(4, 8, 12)))
    test, labels = plate("new", rng.integers(6, size=(8, 12)))
    assert accuracy(baselines.position(train, train_labels, test, 6), labels) < 0.35


def test_position_reports_unrecognized_wells():
    train, labels = screen(np.zeros((8, 12), dtype=int))
    with pytest.raises(baselines.BaselineUnavailable, match="first: 'site 4'"):
        baselines.position(train.assign(Metadata_Well="site 4"), labels, train, 1)


def test_position_excludes_single_unplaced_wells():
    grid = np.random.default_rng(2).integers(6, size=(8, 12))
    train, train_labels = screen(grid, grid)
    test, labels = plate("new", grid)
    unplaced = test["Metadata_Well"] == "A06"
    test = test.assign(Metadata_Well=test["Metadata_Well"].mask(unplaced, "A06_rescan"))
    predicted = baselines.position(train, train_labels, test, 6)
    frequencies = np.bincount(train_labels, minlength=6) / len(train_labels)
    np.testing.assert_allclose(predicted[unplaced], np.tile(frequencies, (2, 1)))
    assert accuracy(predicted[~unplaced], labels[~unplaced]) == 1.0
    assert baselines.list_unplaced_wells(test) == ("new A06_rescan",)


@pytest.mark.parametrize("spelling", ["r{row:02d}c{column:02d}", "{letter}-{column:02d}"])
def test_position_accepts_other_well_spellings(spelling):
    grid = np.random.default_rng(2).integers(6, size=(8, 12))
    train, train_labels = screen(grid, grid)
    test, labels = plate("new", grid)
    test["Metadata_Well"] = [
        spelling.format(letter=name[0], row=ord(name[0]) - 64, column=int(name[1:]))
        for name in test["Metadata_Well"]
    ]
    assert accuracy(baselines.position(train, train_labels, test, 6), labels) == 1.0


def test_all_technical_equals_extra_trees_classifier():
    """Trees fitted one by one give the probabilities of scikit-learn's forest."""
    rng = np.random.default_rng(11)
    train, train_labels = screen(*rng.integers(4, size=(2, 8, 12)))
    test, _ = plate("new", rng.integers(4, size=(8, 12)))
    covariates = baselines._covariates(pd.concat([train, test], ignore_index=True))
    forest = ExtraTreesClassifier(50, random_state=0).fit(covariates[: len(train)], train_labels)
    expected = forest.predict_proba(covariates[len(train) :])
    predicted = baselines.all_technical(train, 2 * train_labels, test, 8)
    np.testing.assert_array_equal(predicted[:, ::2], expected)


def counts(rng: np.random.Generator, labels: np.ndarray, effect: float) -> pd.DataFrame:
    n_cells = np.exp(rng.normal(3 + effect * labels, 0.2))
    return pd.DataFrame(
        {"n_cells": n_cells, "mask_area": n_cells * np.exp(rng.normal(4, 0.1, len(labels)))}
    )


def test_cell_count_detects_toxic_classes_only():
    rng = np.random.default_rng(7)
    train, test = rng.integers(3, size=300), rng.integers(3, size=300)
    toxic = baselines.cell_count(counts(rng, train, -0.8), train, counts(rng, test, -0.8), 3)
    harmless = baselines.cell_count(counts(rng, train, 0), train, counts(rng, test, 0), 3)
    assert accuracy(toxic, test) > 0.9
    assert accuracy(harmless, test) < 0.45


def test_cell_count_converges_to_quadratic_discriminant_analysis():
    rng = np.random.default_rng(8)
    train, test = rng.integers(3, size=6000), rng.integers(3, size=500)
    x, z = counts(rng, train, 0.2), counts(rng, test, 0.2)
    theirs = QuadraticDiscriminantAnalysis().fit(np.log1p(x), train).predict_proba(np.log1p(z))
    np.testing.assert_allclose(baselines.cell_count(x, train, z, 3), theirs, atol=0.02)


def test_cell_count_handles_constant_counts_and_absent_classes():
    constant = pd.DataFrame({"n_cells": np.ones(6), "mask_area": np.ones(6)})
    predicted = baselines.cell_count(constant, np.array([0, 0, 0, 0, 2, 2]), constant, 3)
    np.testing.assert_allclose(predicted[0], [4 / 6, 0, 2 / 6], atol=1e-6)


def test_cell_count_reports_missing_columns():
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


def test_intensity_detects_bright_classes_only():
    rng = np.random.default_rng(9)
    train, test = rng.integers(3, size=300), rng.integers(3, size=300)
    bright = baselines.intensity(brightness(rng, train, 0.8), train, brightness(rng, test, 0.8), 3)
    uniform = baselines.intensity(brightness(rng, train, 0), train, brightness(rng, test, 0), 3)
    assert accuracy(bright, test) > 0.85
    assert accuracy(uniform, test) < 0.45


def test_intensity_equals_scikit_learn_logistic_regression():
    rng = np.random.default_rng(10)
    train, test = 2 * rng.integers(3, size=200), 2 * rng.integers(3, size=50)
    x, z = brightness(rng, train, 0.2), brightness(rng, test, 0.2)
    predicted = baselines.intensity(x, train, z, 5)
    x, z = (np.log1p(table.drop(columns="n_cells")) for table in (x, z))
    center, scale = x.mean(), x.std(ddof=0)
    theirs = LogisticRegression(tol=1e-8, max_iter=1000).fit((x - center) / scale, train)
    np.testing.assert_allclose(
        predicted[:, [0, 2, 4]], theirs.predict_proba((z - center) / scale), atol=1e-3
    )
    np.testing.assert_array_equal(predicted[:, [1, 3]], 0)


def test_intensity_reports_missing_columns():
    table = pd.DataFrame({"mean_DNA": [1.0, np.nan], "n_cells": [1, 2]})
    with pytest.raises(baselines.BaselineUnavailable, match="missing for some sites"):
        baselines.intensity(table, np.array([0, 1]), table, 2)
    with pytest.raises(baselines.BaselineUnavailable, match="no columns mean_<channel>"):
        baselines.intensity(table[["n_cells"]], np.array([0, 1]), table, 2)


@pytest.mark.shared
def test_position_predicts_every_compound_of_shared_layout(shared):
    """The compound plates of CPJUMP1 share a layout, so position predicts held-out plates."""
    files = sorted((shared / "data" / "cpjump1_profiles").glob("*.csv.gz"))
    columns = ["Metadata_Plate", "Metadata_Well", "Metadata_pert_iname"]
    tables = [pd.read_csv(file, usecols=columns) for file in files]
    labels = pd.factorize(pd.concat(tables)["Metadata_pert_iname"])[0]
    index, test_sites = (
        pd.concat(tables, ignore_index=True),
        np.repeat(np.arange(len(files)), 384) == 0,
    )
    predicted = baselines.position(
        index[~test_sites], labels[~test_sites], index[test_sites], int(labels.max()) + 1
    )
    assert labels.max() + 1 == 303
    assert accuracy(predicted, labels[test_sites]) == 1.0
