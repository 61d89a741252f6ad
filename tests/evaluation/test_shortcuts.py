"""A split's leaks are counted and told."""

from __future__ import annotations

import pandas as pd
import pytest

from perturbjax.evaluation.shortcuts import Overlap, overlap

from .conftest import evaluate_run, make_index, make_predictions


def table(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "label"])


def test_overlap_counts_what_stands_on_both_sides():
    train = table(("P", "A01", "DMSO"), ("P", "A02", "aspirin"), ("Q", "A03", "taxol"))
    test = table(
        ("P", "A01", "DMSO"),  # its well, plate, position with label
        ("R", "A02", "aspirin"),  # position with label
        ("Q", "B07", "taxol"),  # plate and label
        ("R", "A03", "nocodazole"),  # nothing: at A03 stands taxol
    )
    assert overlap(train, test) == Overlap(well=0.25, plate=0.5, position=0.5, label=0.75)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (Overlap(1, 1, 1, 1), "which well, not which treatment"),
        (Overlap(0, 0, 0.9, 1), "position alone can answer"),
        (Overlap(0, 1, 0.1, 0.75), "25.0% of the test sites have a label without training sites"),
    ],
)
def test_each_leak_is_told(shared, message):
    found = shared.warnings("plate")
    assert len(found) == 1 and message in found[0]


def test_a_clean_split_needs_no_warning():
    assert Overlap(0, 0, 0.1, 1).warnings("plate") == []


def test_a_model_no_better_than_its_baselines_is_told_so():
    index = make_index()
    test = index["Metadata_Plate"] == "P2"
    blind, seeing = (
        evaluate_run(
            make_predictions(index[test], skill=skill), index[~test], index[test]
        ).warnings()
        for skill in (0.0, 6.0)
    )
    assert any(
        "by site, " in warning and "not clearly above majority (0.125)" in warning
        for warning in blind
    )
    assert seeing == []


def test_under_a_site_split_position_alone_is_perfect_and_beats_the_model():
    index = make_index()
    test = index["Metadata_Site"] == "0"
    evaluation = evaluate_run(
        make_predictions(index[test], skill=1.0), index[~test], index[test], split="site"
    )
    assert evaluation.overlap.well == 1.0
    assert evaluation["site"]["position"].scores["accuracy"].value == 1.0
    found = evaluation.warnings()
    assert "which well, not which treatment" in found[0]
    assert any("balanced accuracy is below position (1.000)" in warning for warning in found)
