"""The sentence on top says yes, no or not shown, names the baseline that answers as well, and what to do next."""

from __future__ import annotations

import dataclasses

import pytest

from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.conclusions import (
    BASELINE_DESCRIPTIONS,
    advice,
    best_unbeaten_baseline,
    verdict,
)
from perturbjax.evaluation.evaluation_result import EvaluationResult
from perturbjax.evaluation.shortcuts import Overlap

from .conftest import evaluate_run, make_index, make_predictions


def judged(
    skill: float, *, split: str = "plate", skill_in_training: float | None = None
) -> EvaluationResult:
    index = make_index()
    test = index["Metadata_Plate"] == "P2"
    found = evaluate_run(
        make_predictions(index[test], skill=skill), index[~test], index[test], split=split
    )
    found = dataclasses.replace(found, skipped={})  # this screen has no intensities
    if skill_in_training is None:
        return found
    return dataclasses.replace(found, train={"model": {"balanced_accuracy": skill_in_training}})


def beside(evaluation: EvaluationResult, name: str) -> EvaluationResult:
    """The same with one baseline at the model's heels and all others far below."""

    def moved(row):
        gaps = {other: 0.0 if other == name else 0.5 for other in row.leads}
        leads = {
            other: {"balanced_accuracy": Estimate(gap, gap - 0.05, gap + 0.05)}
            for other, gap in gaps.items()
        }
        return dataclasses.replace(row, leads=leads) if not row.baseline else row

    levels = [
        dataclasses.replace(level, rows=tuple(map(moved, level.rows)))
        for level in evaluation.levels
    ]
    return dataclasses.replace(evaluation, levels=tuple(levels))


def test_what_clearly_beats_every_baseline_is_a_yes():
    said = verdict(judged(6.0))
    assert said.startswith(
        "Yes: on held-out plates, it tells classes apart with balanced accuracy 1.00 ("
    )
    assert "by well; the best baseline, " in said


def test_what_sees_nothing_has_shown_nothing():
    evaluation = judged(0.0)
    said, rival = (
        verdict(evaluation),
        best_unbeaten_baseline(
            evaluation.displayed_levels[-1], evaluation.displayed_levels[-1]["model"]
        ),
    )
    assert said.startswith("Not shown: on held-out plates") and "not clearly less" in said
    assert rival is not None and BASELINE_DESCRIPTIONS[rival.name] in said


def test_the_baseline_named_is_one_that_is_not_beaten():
    said = verdict(beside(judged(3.0), "position"))
    assert said.startswith("Not shown: ") and "but the place on the plate alone reaches " in said


def test_a_yes_says_which_baselines_could_not_be_asked():
    without = dataclasses.replace(
        judged(6.0), skipped={"intensity": "no such columns", "well level": "none"}
    )
    assert verdict(without).startswith("Yes, as far as asked: ")
    assert verdict(without).endswith("; brightness alone could not be asked.")


def test_a_baseline_that_is_more_accurate_is_warned_of_though_the_verdict_is_yes():
    evaluation = judged(6.0)

    def moved(row):
        lead = row.leads.get("position", {}) | {"accuracy": Estimate(-0.1, -0.2, -0.05)}
        return (
            row if row.baseline else dataclasses.replace(row, leads=row.leads | {"position": lead})
        )

    levels = [
        dataclasses.replace(level, rows=tuple(map(moved, level.rows)))
        for level in evaluation.levels
    ]
    found = dataclasses.replace(evaluation, levels=tuple(levels))
    assert verdict(found).startswith("Yes: ") and evaluation.warnings() == []
    assert (
        all("accuracy is below position (" in warning for warning in found.warnings())
        and len(found.warnings()) == 2
    )


def test_sites_of_wells_it_was_trained_on_show_nothing_of_a_treatment():
    leaky = dataclasses.replace(judged(6.0), overlap=Overlap(1, 1, 1, 1))
    assert verdict(leaky).startswith("Not shown for a treatment: ")
    assert "`--split well`" in advice(leaky, "run")


@pytest.mark.parametrize(
    ("judgement", "run", "said"),
    [
        (judged(6.0), "run", "`perturbjax audit --run run --out run/audit`"),
        (judged(6.0), None, "`perturbjax audit --features …`."),
        (judged(6.0, split="well"), "run", "a further plate"),
        (beside(judged(3.0, skill_in_training=0.0), "position"), "run", "Train longer (`--epochs`)"),
        (beside(judged(0.5, skill_in_training=0.99), "position"), "run", "by heart (0.99 there"),
        (beside(judged(3.0), "cell count"), "run", "Treatments change the number of cells too"),
        (beside(judged(3.0), "cell count"), None, "More wells narrow the interval."),
        (beside(judged(3.0), "position"), "run", "`perturbjax classify --preset linear`"),
    ],
)  # fmt: skip
def test_what_to_do_next_follows_from_what_was_found(evaluation, run, said):
    assert said in advice(evaluation, run)
