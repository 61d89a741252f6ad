"""Warnings of `inspect` and `build` about layouts, labels and bit depths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from data_prep.layout_warnings import (
    bit_depth_warnings,
    design_warnings,
    layout_warnings,
    position_warnings,
)
from perturbjax.core.plates import shared_layouts, well_name
from perturbjax.data import splits
from perturbjax.training.setup import warn_about_positions

LABEL = "Metadata_pert_iname"


def table(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    """One row per (plate, well, label)."""
    return pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", LABEL])


def full_plates(
    label: Callable[[int, int], object], shape: tuple[int, int] = (8, 12), plates: int = 1
) -> pd.DataFrame:
    """Plates with a label for every well: a function of row and column."""
    return table(
        [
            (f"P{plate}", well_name(row, column), str(label(row, column)))
            for plate in range(plates)
            for row in range(shape[0])
            for column in range(shape[1])
        ]
    )


@pytest.mark.parametrize(
    ("label", "predictor"),
    [
        (lambda row, column: f"treatment {column // 3}", "the column predicts"),
        (lambda row, column: f"treatment {row}", "the row predicts"),
        (lambda row, column: column, "the column predicts"),  # doses in adjacent columns
        (lambda row, column: f"block {row // 2} {column // 2}", "the label of adjacent wells"),
        (
            lambda row, column: "DMSO" if row in (0, 7) or column in (0, 11) else row * column % 20,
            "the distance from the edge predicts whether a well contains DMSO",
        ),
    ],
)
def test_position_warnings_name_the_best_predictor(label, predictor):
    (warning,) = position_warnings(full_plates(label), LABEL)
    assert warning.startswith(predictor) and "position-only baseline" in warning


@pytest.mark.parametrize("line", ["row", "column"])
def test_position_warnings_combine_quadrants(line):
    """Rows and columns are those of the 384-well plate, whose four source plates alternate."""
    shape = (16, 24)
    spots = full_plates(lambda row, column: {"row": row, "column": column}[line], shape)
    names = [
        f"Q{1 + 2 * (row % 2) + column % 2}-{well_name(row // 2, column // 2)}"
        for row in range(shape[0])
        for column in range(shape[1])
    ]
    (warning,) = position_warnings(spots.assign(Metadata_Well=names), LABEL)
    assert warning.startswith(f"the {line} predicts")
    (warning,) = position_warnings(spots, LABEL)
    assert warning.startswith(f"the {line} predicts")


def test_position_warnings_report_score_and_chance():
    (warning,) = position_warnings(full_plates(lambda row, column: column // 3), LABEL)
    assert "balanced accuracy 1.00 (chance 0.2" in warning


def test_design_warnings_report_doses_in_adjacent_columns():
    rng = np.random.default_rng(0)
    sites = full_plates(lambda row, column: rng.integers(4))
    columns = sites["Metadata_Well"].str[1:].astype(int)
    sites["Metadata_dose"] = (2**columns).astype(str).where(columns < 12, "")
    (warning,) = design_warnings(sites, LABEL)
    assert warning.startswith("the column predicts Metadata_dose of a well")
    assert not design_warnings(sites.assign(Metadata_dose=""), LABEL)


def test_train_warns_about_the_sites_of_its_split(capsys):
    sites = full_plates(lambda row, column: f"treatment {column // 3}")
    sites["site_id"] = sites["Metadata_Well"]
    warn_about_positions(sites, sites, LABEL)
    assert "warning: the column predicts Metadata_pert_iname" in capsys.readouterr().err
    warn_about_positions(sites, sites[:10], LABEL)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_position_warnings_accept_random_layouts(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(8), 12)).reshape(8, 12)
    assert not position_warnings(full_plates(lambda row, column: labels[row, column]), LABEL)


def test_position_warnings_accept_a_screen_with_single_wells_and_scattered_controls():
    labels = np.array(["DMSO"] * 64 + [f"compound {k}" for k in range(320)])
    labels = np.random.default_rng(0).permutation(labels).reshape(16, 24)
    sites = full_plates(lambda row, column: labels[row, column], (16, 24), plates=3)
    assert not position_warnings(sites, LABEL)


@pytest.mark.parametrize("wells", [["A01", "A02"], ["x1"] * 40])
def test_position_warnings_need_enough_valid_wells(wells):
    rows = [
        ("P", f"{well}-{k}" if well == "x1" else well, str(k % 2)) for k, well in enumerate(wells)
    ]
    assert not position_warnings(table(rows), LABEL)


def test_design_warnings_report_labels_that_differ_in_case():
    sites = table(
        [("p", "A01", "DMSO"), ("p", "A02", "dmso"), ("p", "A03", "Dmso"), ("p", "A04", "x")]
    )
    (warning,) = design_warnings(sites, LABEL)
    assert f"{LABEL}: DMSO, Dmso, dmso differ only in upper and lower case" in warning


def test_bit_depth_warnings_name_the_plates():
    (warning,) = bit_depth_warnings(["P1", "P2", "P3"], ["uint8", "uint16", "uint8"], "sites")
    assert (
        "sites have different data types (uint16 on plate P2, uint8 on plate P1 and more)"
        in warning
    )
    assert not bit_depth_warnings(["P1", "P2"], ["uint16", "uint16"], "sites")


def test_layout_warnings_report_classes_in_a_single_well():
    sites = table(
        [("p", "A01", "DMSO"), ("p", "A02", "DMSO"), ("p", "A03", "x"), ("p", "A04", "y")]
    )
    assert any(
        "2 of 3 classes" in text and "one well only" in text
        for text in layout_warnings(sites, LABEL)
    )


def test_layout_warnings_report_plates_with_the_same_layout():
    layout = [("A01", "DMSO"), ("A02", "x"), ("A03", "y")]
    sites = table([(plate, well, label) for plate in ("p", "q") for well, label in layout])
    assert shared_layouts(sites) == [["p", "q"]]
    text = "\n".join(layout_warnings(sites, LABEL))
    assert "2 plates share one layout (p, q)" in text
    assert "treatment and position effects cannot be distinguished" in text
    shifted = [("q", "A01", "x"), ("q", "A02", "y"), ("q", "A03", "DMSO")]
    assert shared_layouts(pd.concat([sites[:3], table(shifted)])) == []


def test_layout_warnings_and_split_by_layout_agree_if_a_plate_lacks_wells():
    layout = [(f"A{column:02d}", f"compound-{column}") for column in range(1, 13)]
    rows = [("p", *well) for well in layout] + [("q", *well) for well in layout[:-2]]
    rows += [("r", well, f"other-{well}") for well, _ in layout]
    sites = table(rows)
    assert "2 plates share one layout (p, q)" in "\n".join(layout_warnings(sites, LABEL))
    groups = dict(zip(sites["Metadata_Plate"], splits.assign_groups(sites, "layout"), strict=True))
    assert groups == {"p": "p", "q": "p", "r": "r"}
