"""Conclusions: verdict, decisive baseline and next step."""

from __future__ import annotations

import dataclasses

import pytest

from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.conclusions import (
    MIN_TEST_WELLS,
    advice,
    best_unbeaten_baseline,
    describe_baseline,
    short_verdict,
    verdict,
)
from perturbjax.evaluation.evaluation_result import EvaluationResult
from perturbjax.evaluation.shortcuts import Overlap

from .conftest import evaluate_run, make_index, make_predictions


def evaluate(
    skill: float, *, split: str = "plate", training_score: float | None = None
) -> EvaluationResult:
    """Evaluate simulated predictions; the missing intensity baseline is not reported."""
    index = make_index()
    test = index["Metadata_Plate"] == "P2"
    predictions = make_predictions(index[test], skill=skill)
    result = evaluate_run(predictions, index[~test], index[test], split=split)
    result = dataclasses.replace(result, skipped={})
    if training_score is None:
        return result
    return dataclasses.replace(result, train={"model": {"balanced_accuracy": training_score}})


def replace_leads(evaluation: EvaluationResult, leads) -> EvaluationResult:
    """Replace the leads of the model at all levels; `leads` maps a row to its new leads."""
    levels = []
    for level in evaluation.levels:
        rows = (
            row if row.baseline else dataclasses.replace(row, leads=leads(row))
            for row in level.rows
        )
        levels.append(dataclasses.replace(level, rows=tuple(rows)))
    return dataclasses.replace(evaluation, levels=tuple(levels))


def equal_to(evaluation: EvaluationResult, name: str) -> EvaluationResult:
    """Set the lead over one baseline to 0, and over all others to 0.5."""

    def leads(row):
        gaps = {other: 0.0 if other == name else 0.5 for other in row.leads}
        return {
            other: {"balanced_accuracy": Estimate(gap, gap - 0.05, gap + 0.05)}
            for other, gap in gaps.items()
        }

    return replace_leads(evaluation, leads)


def test_verdict_of_accurate_model_names_best_baseline():
    evaluation = evaluate(6.0)
    assert verdict(evaluation).startswith("Balanced accuracy 1.00 (95 % CI ")
    assert "by well on held-out plates. The best baseline, " in verdict(evaluation)
    assert short_verdict(evaluation) == "Above every baseline"


def test_verdict_of_random_model_shows_no_advantage():
    evaluation = evaluate(0.0)
    level = evaluation.displayed_levels[-1]
    baseline = best_unbeaten_baseline(level, level["model"])
    assert baseline is not None and describe_baseline(baseline.name) in verdict(evaluation).lower()
    assert "image features show no clear advantage over " in verdict(evaluation)
    assert short_verdict(evaluation) == "Not clearly above every baseline"


def test_verdict_names_an_unbeaten_baseline():
    assert "The well position reaches " in verdict(equal_to(evaluate(3.0), "position"))


def test_verdict_lists_missing_baselines():
    skipped = {"intensity": "no such columns", "well level": "none"}
    evaluation = dataclasses.replace(evaluate(6.0), skipped=skipped)
    assert verdict(evaluation).endswith(" Not controlled for intensity.")


def test_verdict_requires_position_control():
    evaluation = dataclasses.replace(evaluate(6.0), skipped={"position": "no well names"})
    assert short_verdict(evaluation) == "Not controlled for position"
    assert verdict(evaluation).endswith(" Not controlled for position.")
    assert "Correct the well names" in advice(evaluation, "run")


def test_verdict_requires_enough_wells():
    evaluation = evaluate(6.0)
    sizes = dataclasses.replace(evaluation.n, well=2)
    evaluation = dataclasses.replace(evaluation, n=sizes)
    assert verdict(evaluation).startswith(
        f"Too few wells: 2 test wells, {MIN_TEST_WELLS} are needed for a conclusion."
    )
    assert advice(evaluation, "run").startswith("Add wells: ")


def test_warnings_name_more_accurate_baseline():
    evaluation = evaluate(6.0)

    def leads(row):
        lead = row.leads.get("position", {}) | {"accuracy": Estimate(-0.1, -0.2, -0.05)}
        return row.leads | {"position": lead}

    changed = replace_leads(evaluation, leads)
    assert short_verdict(changed) == "Above every baseline" and evaluation.warnings() == []
    warnings = changed.warnings()
    assert len(warnings) == 1 and "by well, accuracy is below position (" in warnings[0]


def test_verdict_rejects_shared_wells():
    leaky = dataclasses.replace(evaluate(6.0), overlap=Overlap(1, 1, 1, 1))
    assert verdict(leaky).startswith("No valid score: ")
    assert "`--split well`" in advice(leaky, "run")


@pytest.mark.parametrize(
    ("evaluation", "run", "expected"),
    [
        (evaluate(6.0), "run", "`perturbjax audit --run run --train --out run/audit`"),
        (evaluate(6.0), None, "`perturbjax audit --features …`."),
        (evaluate(6.0, split="well"), "run", "a further plate"),
        (
            equal_to(evaluate(3.0, training_score=0.0), "position"),
            "run",
            "Train longer (`--epochs`)",
        ),
        (
            equal_to(evaluate(0.5, training_score=0.99), "position"),
            "run",
            "overfitted (training 0.99",
        ),
        (equal_to(evaluate(3.0), "cell count"), "run", "The treatments change the cell count"),
        (equal_to(evaluate(3.0), "cell count"), None, "Add wells to narrow the interval."),
        (equal_to(evaluate(3.0), "position"), "run", "`perturbjax classify --preset linear`"),
    ],
)
def test_advice_follows_from_the_result(evaluation, run, expected):
    assert expected in advice(evaluation, run)
