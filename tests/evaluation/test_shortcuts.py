"""Overlap of training and test set, and warnings."""

from __future__ import annotations

import pandas as pd
import pytest

from perturbjax.evaluation.shortcuts import Overlap, overlap

from .conftest import evaluate_run, make_index, make_predictions


def table(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "label"])


def test_overlap_counts_shared_properties():
    train = table(("P", "A01", "DMSO"), ("P", "A02", "aspirin"), ("Q", "A03", "taxol"))
    test = table(
        ("P", "A01", "DMSO"),  # its well, plate, position with label
        ("R", "A02", "aspirin"),  # position with label
        ("Q", "B07", "taxol"),  # plate and label
        ("R", "A03", "nocodazole"),  # nothing: A03 contains taxol
    )
    assert overlap(train, test) == Overlap(well=0.25, plate=0.5, position=0.5, label=0.75)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (Overlap(1, 1, 1, 1), "recognition of wells, not of treatments"),
        (Overlap(0, 0, 0.9, 1), "the position predicts the label"),
        (Overlap(0, 1, 0.1, 0.75), "25.0% of the test sites have a label without training sites"),
    ],
)
def test_overlap_warns_of_each_shortcut(shared, message):
    found = shared.warnings("plate")
    assert len(found) == 1 and message in found[0]


def test_overlap_without_shortcut_has_no_warning():
    assert Overlap(0, 0, 0.1, 1).warnings("plate") == []


def test_warnings_do_not_repeat_the_verdict():
    index = make_index()
    test = index["Metadata_Plate"] == "P2"
    chance, accurate = (
        evaluate_run(
            make_predictions(index[test], skill=skill), index[~test], index[test]
        ).warnings()
        for skill in (0.0, 6.0)
    )
    assert chance == accurate == []


def test_position_is_perfect_under_site_split():
    index = make_index()
    test = index["Metadata_Site"] == "0"
    evaluation = evaluate_run(
        make_predictions(index[test], skill=1.0), index[~test], index[test], split="site"
    )
    assert evaluation.overlap.well == 1.0
    assert evaluation["site"]["position"].scores["accuracy"].value == 1.0
    found = evaluation.warnings()
    assert "recognition of wells, not of treatments" in found[0]
    assert len(found) == 1
