"""Result of an evaluation as frozen records; tables, JSON and reports are views of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.core.messages import counted
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.calibration import Confidence
from perturbjax.evaluation.prediction_sets import SetSummary
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.evaluation.shortcuts import Overlap

#: Name of a run's network in the tables.
MODEL = "model"
#: Split of predictions whose model has unknown training sites.
UNKNOWN_TRAINING = "unknown training sites"
#: Unit that is counted at each level.
LEVELS = {
    "site": "every row",
    "treated": "rows that are not negative controls",
    "well": "wells: the mean of their rows' probabilities",
}


@dataclasses.dataclass(frozen=True)
class ModelScores:
    """Scores of one model or baseline at one level."""

    name: str
    baseline: bool
    scores: dict[str, Estimate]
    """{metric: estimate}."""
    leads: dict[str, dict[str, Estimate]]
    """Score of the model minus score of each baseline, {baseline: {metric: estimate}}."""


@dataclasses.dataclass(frozen=True)
class Level:
    """Scores of all models and baselines for one unit (site, treated site or well)."""

    name: str
    n: int
    rows: tuple[ModelScores, ...]
    """Models first, then baselines."""

    def __getitem__(self, name: str) -> ModelScores:
        return next(row for row in self.rows if row.name == name)

    @property
    def words(self) -> str:
        """Name for sentences and titles: "by site"."""
        return "by treated site" if self.name == "treated" else f"by {self.name}"

    @property
    def best_baseline(self) -> ModelScores:
        """Baseline with the highest balanced accuracy; the first if several tie."""
        baselines = (row for row in self.rows if row.baseline)
        return max(baselines, key=lambda row: row.scores[HEADLINE].value)


@dataclasses.dataclass(frozen=True)
class SampleSizes:
    """Number of test sites, wells, plates and classes, and of training sites."""

    site: int
    well: int
    plate: int
    train_site: int
    """Training sites of one fold (mean over folds)."""
    classes: int
    test_classes: int


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of models and baselines over the test sites of all folds together."""

    split: str
    """Split policy, or the name of a split file."""
    folds: int
    n: SampleSizes
    levels: tuple[Level, ...]
    train: dict[str, dict[str, float]]
    """{model: {metric: mean training score over folds}}, if training sites were predicted."""
    overlap: Overlap
    """Mean over folds."""
    skipped: dict[str, str]
    """Baselines (or the well level) that are not available, and the reason."""
    seed: int
    replicates: int
    resample: str
    """Unit of resampling: well or plate."""
    confidence: dict[str, Confidence]
    """Calibration of each model."""
    unplaced_wells: tuple[str, ...] = ()
    """Wells without a position in their name, excluded from the position-only baseline."""
    prediction_sets: SetSummary | None = None
    """Coverage and size of the prediction sets of a run; None for classifiers."""

    def __getitem__(self, level: str) -> Level:
        return next(one for one in self.levels if one.name == level)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Evaluated models in their order."""
        return tuple(row.name for row in self.levels[0].rows if not row.baseline)

    @property
    def displayed_levels(self) -> tuple[Level, ...]:
        """Levels without the well level of data with one site per well."""
        # With one site per well, the scores by well equal those by site.
        several = self.n.well < self.n.site
        return tuple(level for level in self.levels if level.name != "well" or several)

    @property
    def verdict_level(self) -> Level:
        """Level of the conclusions: wells if they have several sites, otherwise sites."""
        levels = {level.name: level for level in self.displayed_levels}
        return levels.get("well", levels["site"])

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that are informative for this number of classes."""
        present = {metric for level in self.levels for row in level.rows for metric in row.scores}
        return tuple(
            name
            for name, metric in METRICS.items()
            if name in present and self.n.classes >= metric.min_classes
        )

    @property
    def split_name(self) -> str:
        """Split policy, or the name of the split file without its folder."""
        return self.split if self.split in SPLIT_POLICIES else Path(self.split).name

    @property
    def split_meaning(self) -> str:
        """Consequence of the split for the scores."""
        if self.split == UNKNOWN_TRAINING:
            return "the score is valid only if the model was trained on none of these wells"
        policy = SPLIT_POLICIES.get(self.split)
        return policy.meaning if policy else "as given in a split file"

    def for_model(self, model: str) -> EvaluationResult:
        """Result of one model, renamed "model", next to the baselines, by site and by well."""
        levels = []
        for level in (level for level in self.levels if level.name in ("site", "well")):
            # The name of a network in a run, so that the same reader and report apply.
            own = dataclasses.replace(level[model], name=MODEL)
            rows = (own, *(row for row in level.rows if row.baseline))
            levels.append(dataclasses.replace(level, rows=rows))
        train = {MODEL: self.train[model]} if model in self.train else {}
        confidence = {MODEL: self.confidence[model]} if model in self.confidence else {}
        return dataclasses.replace(self, levels=tuple(levels), train=train, confidence=confidence)

    def warnings(self) -> list[str]:
        """Warnings for readers of the scores, the most important first."""
        if self.split == UNKNOWN_TRAINING:
            warnings = [f"{self.split}: {self.split_meaning}"]
        else:
            warnings = self.overlap.warnings(self.split)
        if "position" in self.skipped:
            warnings.append(f"not controlled for position: {self.skipped['position']}")
        if self.unplaced_wells:
            warnings.append(
                f"excluded from the position-only baseline: {', '.join(self.unplaced_wells)} "
                "(well name without a position)"
            )
        if len(self.model_names) > 1:
            return warnings + _unbeaten_baselines(self.levels[0])
        (model,) = self.model_names
        return warnings + _more_accurate_baselines(self.verdict_level, model)


def _more_accurate_baselines(level: Level, name: str) -> list[str]:
    """Warn of baselines with a higher accuracy than a model of higher balanced accuracy.

    The verdict compares the balanced accuracy, so no warning repeats that comparison.
    """
    model = level[name]
    if any(lead[HEADLINE].low <= 0 for lead in model.leads.values()):
        return []
    better = [
        f"{row.name} ({row.scores['accuracy'].value:.3f})"
        for row in level.rows
        if row.baseline and model.leads[row.name]["accuracy"].high < 0
    ]
    if not better:
        return []
    return [
        f"{level.words}, accuracy is below {', '.join(better)}: the gain in rare classes, which "
        f"{METRICS[HEADLINE].words} weights equally, costs accuracy in frequent classes"
    ]


def _unbeaten_baselines(level: Level) -> list[str]:
    """List the baselines that no model exceeds, one sentence each."""
    value = {row.name: row.scores[HEADLINE].value for row in level.rows}
    best = max((row.name for row in level.rows if not row.baseline), key=lambda name: value[name])
    return [
        f"the best model ({best}, {value[best]:.3f}) does not exceed the baseline '{row.name}' "
        f"({value[row.name]:.3f}) in {METRICS[HEADLINE].words}"
        for row in level.rows
        if row.baseline and value[row.name] >= value[best]
    ]


def to_json(evaluation: EvaluationResult) -> dict[str, Any]:
    """Content of `scores.json` for one model.

    Keys: `levels` {site|well: {model: {metric: {value, low, high}}}}, `leads` (model minus each
    baseline), `n`, `train`, `confidence` (see `calibration.Confidence`), `overlap`, `warnings`,
    `skipped` (baseline: reason), `unplaced_wells`, `prediction_sets` (see
    `prediction_sets.SetSummary`, or null), `split`, `seed`, `replicates`, `resample`.
    """
    (model,) = evaluation.model_names
    plain = dataclasses.asdict
    return {
        "split": evaluation.split,
        "split_words": evaluation.split_meaning,
        "n": plain(evaluation.n),
        "levels": {
            level.name: {row.name: plain(row)["scores"] for row in level.rows}
            for level in evaluation.levels
        },
        "leads": {level.name: plain(level[model])["leads"] for level in evaluation.levels},
        "train": evaluation.train.get(model, {}),
        "confidence": plain(evaluation.confidence[model]),
        "overlap": plain(evaluation.overlap),
        "skipped": evaluation.skipped,
        "unplaced_wells": list(evaluation.unplaced_wells),
        "prediction_sets": evaluation.prediction_sets and plain(evaluation.prediction_sets),
        "seed": evaluation.seed,
        "replicates": evaluation.replicates,
        "resample": evaluation.resample,
        "warnings": evaluation.warnings(),
    }


def read_evaluation(path: Path) -> EvaluationResult:
    """Read the `scores.json` of one model.

    Raises:
        InputError: the file is missing, not JSON, or not an evaluation result.
    """
    values = read_json(path)
    try:
        return _from_json(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: not an evaluation result ({error}); run `perturbjax evaluate` again"
        ) from error


def _from_json(values: dict[str, Any]) -> EvaluationResult:
    def estimates(scores: dict[str, dict[str, float]]) -> dict[str, Estimate]:
        return {
            metric: Estimate(**{name: float(value) for name, value in one.items()})
            for metric, one in scores.items()
            if metric in METRICS
        }

    def row(name: str, scores: dict, leads: dict) -> ModelScores:
        # Only the model has leads; baselines are not compared with each other.
        own = {other: estimates(lead) for other, lead in leads.items()} if name == MODEL else {}
        return ModelScores(name, name != MODEL, estimates(scores), own)

    levels = [
        Level(
            level,
            values["n"][level],
            tuple(row(name, scores, values["leads"][level]) for name, scores in rows.items()),
        )
        for level, rows in values["levels"].items()
    ]
    return EvaluationResult(
        split=values["split"],
        folds=1,
        n=SampleSizes(**values["n"]),
        levels=tuple(levels),
        train={MODEL: values["train"]} if values["train"] else {},
        overlap=Overlap(**values["overlap"]),
        confidence={MODEL: Confidence(**values["confidence"])},
        unplaced_wells=tuple(values.get("unplaced_wells", ())),
        prediction_sets=_sets_from_json(values.get("prediction_sets")),
        **{name: values[name] for name in ("skipped", "seed", "replicates", "resample")},
    )


def _sets_from_json(values: dict[str, Any] | None) -> SetSummary | None:
    return SetSummary(**{**values, "coverage": Estimate(**values["coverage"])}) if values else None


def describe_test_set(evaluation: EvaluationResult) -> str:
    """Describe the split and the size of the test set in one sentence."""
    n = evaluation.n
    sizes = {"site": n.site, "well": n.well, "plate": n.plate}
    tested = ", ".join(f"{counted(size, unit)}" for unit, size in sizes.items())
    folds = f"{evaluation.folds} folds, each " if evaluation.folds > 1 else ""
    about = "about " if evaluation.folds > 1 else ""
    if evaluation.split == UNKNOWN_TRAINING:
        return (
            f"Tested on {tested}, {n.test_classes} of {n.classes} classes; baselines trained on "
            f"{about}{n.train_site} sites. Training sites of the model are unknown."
        )
    return (
        f"Split by {evaluation.split_name}: {evaluation.split_meaning}. Tested on {tested}, "
        f"{n.test_classes} of {n.classes} classes; {folds}trained on {about}{n.train_site} sites."
    )


def summary_sentences(evaluation: EvaluationResult) -> list[str]:
    """Score of the (best) model and its lead over the best baseline, one sentence per level."""
    sentences = []
    for level in evaluation.displayed_levels:
        model = rank_rows(level, evaluation.model_names)[0]
        best = level.best_baseline.name
        name = f" of {model.name}" if len(evaluation.model_names) > 1 else ""
        sentences.append(
            f"{capitalize(METRICS[HEADLINE].words)} {level.words}{name} "
            f"{format_estimate(model.scores[HEADLINE])}; lead over the best baseline ({best}) "
            f"{format_estimate(model.leads[best][HEADLINE])}."
        )
    return sentences


def rank_rows(level: Level, names: Sequence[str]) -> list[ModelScores]:
    """Rows of these names by balanced accuracy, then accuracy, highest first."""
    rows = [row for row in level.rows if row.name in names]
    return sorted(
        rows, key=lambda row: (-row.scores[HEADLINE].value, -row.scores["accuracy"].value)
    )


def describe_calibration(confidence: Confidence) -> str:
    """Describe calibration error, temperature and accuracy of the confident half."""
    temperature = confidence.temperature
    return (
        f"Calibration error {confidence.error:.3f}; {confidence.scaled_error:.3f} after "
        f"temperature scaling (T = {temperature:.2f} from other test wells: the model is "
        f"{'over' if temperature > 1 else 'under'}confident). Accuracy in the more confident half "
        f"of the sites: {confidence.half_accuracy:.1%}."
    )


def format_estimate(estimate: Estimate | None, gap: str = " ") -> str:
    """Format as `0.712 [0.65, 0.77]`; empty if the score does not exist."""
    if estimate is None:
        return ""
    # The format option z prints -0.000 as 0.000.
    return f"{estimate.value:z.3f}{gap}[{estimate.low:z.2f}, {estimate.high:z.2f}]"


def capitalize(words: str) -> str:
    """Make the first letter upper case and keep the others."""
    return words[0].upper() + words[1:]
