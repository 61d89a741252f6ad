"""Conclusions of an evaluation: is the score above every baseline, and which step comes next?

`evaluate`, `classify`, the report and `audit` share these sentences and names.
"""

from __future__ import annotations

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.evaluation.baselines import ALL_TECHNICAL
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.evaluation_result import (
    UNKNOWN_TRAINING,
    EvaluationResult,
    Level,
    ModelScores,
    capitalize,
    rank_rows,
)
from perturbjax.evaluation.scores import HEADLINE, METRICS

#: Minimum number of test wells for a conclusion, see `FEW_WELLS`.
MIN_TEST_WELLS = 10
FEW_WELLS = (
    "With fewer than 10 wells, a 95 % interval of an accuracy spans about 0.3 in both directions, "
    "and labels of two classes can be permuted in fewer than 100 ways, too few for p < 0.01."
)
#: Noun phrase for each baseline or control.
BASELINE_DESCRIPTIONS = {
    "majority": "the most frequent class",
    "chance": "random guessing",
    "position": "the well position",
    "plate": "the plate",
    "cell count": "the cell count",
    "intensity": "brightness",
    ALL_TECHNICAL: "technical covariates (position, plate, cell count, brightness)",
}
_LABEL_NAMES = {"pert_iname": "treatment", "moa": "mechanism"}
#: Training score minus test score from which a model is called overfitted.
_OVERFITTED = 0.2
_LINEAR = (
    "a linear model on features of a pretrained network (`perturbjax classify --preset linear`)"
)


def describe_test_sites(split: str) -> str:
    """Return the test sites of a split in one phrase: "on held-out plates"."""
    if split == UNKNOWN_TRAINING:
        return "on the predicted sites"
    return SPLIT_POLICIES[split].test_set if split in SPLIT_POLICIES else "on held-out sites"


def describe_baseline(name: str) -> str:
    """Return the noun phrase for a baseline."""
    return BASELINE_DESCRIPTIONS.get(name, name)


def name_label(column: str) -> str:
    """Return a readable name for a label column: `Metadata_moa` is "mechanism"."""
    name = column.removeprefix("Metadata_")
    return _LABEL_NAMES.get(name, name)


def compare_with_baseline(baseline: str, reached: float, lead: Estimate) -> str:
    """State the score of a baseline, and whether the model is above it.

    Args:
        baseline: name of the baseline.
        reached: its balanced accuracy.
        lead: balanced accuracy of the model minus that of the baseline.
    """
    name = describe_baseline(baseline)
    # The noun phrase of this baseline is plural.
    plural = baseline == ALL_TECHNICAL
    if lead.low > 0:
        return f"The best baseline, {name}, reaches {reached:.2f}."
    advantage = "no" if lead.high < 0 else "no clear"
    return (
        f"{capitalize(name)} reach{'' if plural else 'es'} {reached:.2f}, so image features show "
        f"{advantage} advantage over {'them' if plural else 'it'}."
    )


def describe_score(score: Estimate, words: str, split: str) -> str:
    """State the score of a model with its interval, unit and test set."""
    return (
        f"{capitalize(METRICS[HEADLINE].words)} {score.value:.2f} "
        f"(95 % CI {score.low:.2f}–{score.high:.2f}) {words} {describe_test_sites(split)}."
    )


def too_few_wells(wells: int) -> str:
    """State that there are too few test wells for a conclusion."""
    return f"Too few wells: {wells} test wells, {MIN_TEST_WELLS} are needed for a conclusion."


def best_unbeaten_baseline(level: Level, model: ModelScores) -> ModelScores | None:
    """Return the best baseline that the model is not clearly above, if any."""
    # An interval that includes 0 shows no clear advantage.
    names = [name for name, lead in model.leads.items() if lead[HEADLINE].low <= 0]
    return rank_rows(level, names)[0] if names else None


def _best(evaluation: EvaluationResult) -> tuple[Level, ModelScores]:
    """Return the level of the conclusion (wells if they have several sites) and the best model."""
    level = evaluation.verdict_level
    return level, rank_rows(level, evaluation.model_names)[0]


def short_verdict(evaluation: EvaluationResult) -> str:
    """State the conclusion in a few words, for table cells."""
    level, model = _best(evaluation)
    if evaluation.n.well < MIN_TEST_WELLS:
        return "Too few wells"
    # The checks are ordered: the first that applies is the conclusion.
    if any(lead[HEADLINE].high < 0 for lead in model.leads.values()):
        return "Below a baseline"
    if best_unbeaten_baseline(level, model) is not None:
        return "Not clearly above every baseline"
    if evaluation.overlap.well > 0:
        return "No valid score"
    if "position" in evaluation.skipped:
        return "Not controlled for position"
    return "Above every baseline"


def verdict(evaluation: EvaluationResult) -> str:
    """State the score of the (best) model, the decisive baseline and the conclusion."""
    level, model = _best(evaluation)
    score, conclusion = model.scores[HEADLINE], short_verdict(evaluation)
    sentence = describe_score(score, level.words, evaluation.split)
    if conclusion == "Too few wells":
        return f"{too_few_wells(evaluation.n.well)} {sentence}"
    if conclusion == "No valid score":
        return f"{conclusion}: the model was trained on other sites of the test wells. {sentence}"
    baseline = best_unbeaten_baseline(level, model) or level.best_baseline
    lead = model.leads[baseline.name][HEADLINE]
    comparison = compare_with_baseline(baseline.name, baseline.scores[HEADLINE].value, lead)
    names = ("position", "intensity", "cell count")
    missing = [name for name in names if name in evaluation.skipped]
    uncontrolled = f" Not controlled for {', '.join(missing)}." if missing else ""
    return f"{sentence} {comparison}{uncontrolled}"


def advice(evaluation: EvaluationResult, run: str | None) -> str:
    """State the next step in one sentence, with commands in backticks.

    Args:
        evaluation: the scores.
        run: name of the run directory; None for classifiers on features.
    """
    if evaluation.split == UNKNOWN_TRAINING:
        return "Name the training sites in the column `part`, or in a split file after the table."
    level, model = _best(evaluation)
    stronger = best_unbeaten_baseline(level, model)
    if evaluation.overlap.well > 0:
        return (
            "Use a split that holds out whole wells: `--split well`, or `--split plate` if there "
            "are several plates."
        )
    if evaluation.n.well < MIN_TEST_WELLS:
        return f"Add wells: the test set needs at least {MIN_TEST_WELLS}."
    if stronger is not None:
        return _improve(evaluation, model.name, stronger.name, run)
    if "position" in evaluation.skipped:
        return "Correct the well names in Metadata_Well (A01, A-01, r01c01) and evaluate again."
    # The next stricter test uses new plates.
    if evaluation.split == "well":
        if evaluation.n.plate > 1:
            return "Test whether the score holds on new plates: `--split plate`."
        return "Image the same treatments on a further plate to test whether the score holds there."
    if run is None:
        return "Compare all splits of these data: `perturbjax audit --features …`."
    return (
        "Train the recipe on every fold of every split and compare it with all controls: "
        f"`perturbjax audit --run {run} --train --out {run}/audit`; its verdict then appears here."
    )


def _improve(evaluation: EvaluationResult, model: str, baseline: str, run: str | None) -> str:
    """Suggest how to improve a model that is not clearly above a baseline."""
    level = evaluation.levels[0]
    test = level[model].scores[HEADLINE].value
    train = evaluation.train.get(model, {}).get(HEADLINE)
    network = run is not None
    # A training score that is not above the baseline means underfitting.
    if network and train is not None and train <= level[baseline].scores[HEADLINE].value:
        return (
            f"Train longer (`--epochs`): the training score is only {train:.2f}. Or use {_LINEAR}."
        )
    linear = f", or use {_LINEAR}" if network else ""
    if train is not None and train - test > _OVERFITTED:
        return (
            f"The model is overfitted (training {train:.2f}, test {test:.2f} by site). "
            f"Add wells and plates{linear}."
        )
    if baseline in ("cell count", "intensity"):
        return (
            f"The treatments change {describe_baseline(baseline)}: check whether they have other "
            f"effects. Add wells to narrow the interval{linear}."
        )
    return f"Add wells and plates to narrow the interval{linear}."
