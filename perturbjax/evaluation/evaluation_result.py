"""What the judge found, as plain frozen records; everything that is shown or written is a view of a `EvaluationResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.calibration import Confidence
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.evaluation.shortcuts import Overlap

#: What a run's network is called beside its baselines.
MODEL = "model"
#: What is counted once, in words.
LEVELS = {
    "site": "every row",
    "treated": "rows that are not negative controls",
    "well": "wells: the mean of their rows' probabilities",
}


@dataclasses.dataclass(frozen=True)
class ModelScores:
    """One subject or baseline at one level."""

    name: str
    baseline: bool
    scores: dict[str, Estimate]
    """By the name of the metric; one that the answer does not allow is absent."""
    leads: dict[str, dict[str, Estimate]]
    """Of a subject: its scores minus those of each baseline, {baseline: {metric: …}}."""


@dataclasses.dataclass(frozen=True)
class Level:
    """All subjects and baselines where the same thing is counted once."""

    name: str
    n: int
    rows: tuple[ModelScores, ...]
    """Subjects first, then baselines."""

    def __getitem__(self, subject: str) -> ModelScores:
        return next(row for row in self.rows if row.name == subject)

    @property
    def words(self) -> str:
        """`by site`, as sentences and titles say it."""
        return "by treated row" if self.name == "treated" else f"by {self.name}"

    @property
    def best_baseline(self) -> ModelScores:
        """The baseline with the best headline score; the first of equals."""
        return max(
            (row for row in self.rows if row.baseline), key=lambda row: row.scores[HEADLINE].value
        )


@dataclasses.dataclass(frozen=True)
class SampleSizes:
    """How much was judged."""

    site: int
    well: int
    plate: int
    train_site: int
    """Of one fold; the mean of several."""
    classes: int
    test_classes: int


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Every subject beside every baseline, over the test sites of all folds together."""

    split: str
    """How the folds were dealt: a policy of `splits`, or the name of a file."""
    folds: int
    n: SampleSizes
    levels: tuple[Level, ...]
    train: dict[str, dict[str, float]]
    """{subject: {metric: mean over folds of the score on training sites}}, where training sites were predicted."""
    overlap: Overlap
    """Mean over folds."""
    skipped: dict[str, str]
    """Baselines (or the well level) that are absent, and why."""
    seed: int
    replicates: int
    resample: str
    """What was resampled whole: well or plate."""
    confidence: dict[str, Confidence]
    """Of each subject: whether its probabilities mean what they say, as they are and with a temperature."""

    def __getitem__(self, level: str) -> Level:
        return next(one for one in self.levels if one.name == level)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Who was judged, in the order of asking."""
        return tuple(row.name for row in self.levels[0].rows if not row.baseline)

    @property
    def displayed_levels(self) -> tuple[Level, ...]:
        """Levels worth a table: that of wells where they hold several sites."""
        return tuple(
            level for level in self.levels if level.name != "well" or self.n.well < self.n.site
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics worth a column."""
        found = {metric for level in self.levels for row in level.rows for metric in row.scores}
        return tuple(
            m for m, what in METRICS.items() if m in found and self.n.classes >= what.min_classes
        )

    @property
    def split_name(self) -> str:
        """What the split is called: a file without its folders."""
        return self.split if self.split in SPLIT_POLICIES else Path(self.split).name

    @property
    def split_words(self) -> str:
        """What the split means."""
        policy = SPLIT_POLICIES.get(self.split)
        return policy.meaning if policy else "as given in a split file"

    def for_model(self, subject: str) -> EvaluationResult:
        """One subject, called "model", beside the baselines, by site and by well: as a run is judged."""
        levels = []
        for level in (level for level in self.levels if level.name in ("site", "well")):
            rows = (
                dataclasses.replace(level[subject], name=MODEL),
                *(row for row in level.rows if row.baseline),
            )
            levels.append(dataclasses.replace(level, rows=rows))
        train = {MODEL: self.train[subject]} if subject in self.train else {}
        sure = {MODEL: self.confidence[subject]} if subject in self.confidence else {}
        return dataclasses.replace(self, levels=tuple(levels), train=train, confidence=sure)

    def warnings(self) -> list[str]:
        """What a reader of the scores has to know, most damaging first; empty if nothing was found."""
        found = self.overlap.warnings(self.split)
        if len(self.model_names) == 1:
            return found + [
                sentence
                for level in self.displayed_levels
                if (sentence := _beaten(level, level[self.model_names[0]]))
            ]
        return found + _unbeaten(self.levels[0])


def _beaten(level: Level, subject: ModelScores) -> str:
    """One sentence on the baselines that the subject does not clearly beat at this level, or which are clearly more
    accurate though it does, if any."""
    value = {row.name: row.scores[HEADLINE].value for row in level.rows}
    leads = {f"{name} ({value[name]:.3f})": lead[HEADLINE] for name, lead in subject.leads.items()}
    below = [name for name, lead in leads.items() if lead.high < 0]
    unclear = [name for name, lead in leads.items() if lead.low <= 0 <= lead.high]
    parts = [
        f"{verb} {', '.join(names)}"
        for verb, names in (("below", below), ("not clearly above", unclear))
        if names
    ]
    words = METRICS[HEADLINE].words
    if parts:
        return f"{level.words}, the {subject.name}'s {words} is {' and '.join(parts)}"
    better = [
        row for row in level.rows if row.baseline and subject.leads[row.name]["accuracy"].high < 0
    ]
    if not better:
        return ""
    told = ", ".join(f"{row.name} ({row.scores['accuracy'].value:.3f})" for row in better)
    return (
        f"{level.words}, accuracy is below {told}: what it gains in rare classes it loses in frequent ones, which "
        f"{words} counts the same"
    )


def _unbeaten(level: Level) -> list[str]:
    """One sentence for each baseline that the best of several subjects does not beat."""
    value = {row.name: row.scores[HEADLINE].value for row in level.rows}
    best = max((row.name for row in level.rows if not row.baseline), key=lambda name: value[name])
    return [
        f"the baseline '{row.name}' ({value[row.name]:.3f}) is not beaten by the best model "
        f"({best}, {value[best]:.3f}) in {METRICS[HEADLINE].words}"
        for row in level.rows
        if row.baseline and value[row.name] >= value[best]
    ]


def to_json(evaluation: EvaluationResult) -> dict[str, Any]:
    """What `scores.json` holds of one subject: `levels` {site|well: {subject: {metric: {value, low, high}}}}, `leads`
    (model minus each baseline), `n`, `train`, `confidence` (see `calibration.Confidence`), `overlap`, `warnings`,
    `skipped` (baseline: why), `split`, `seed`, `replicates`."""
    (subject,) = evaluation.model_names
    plain = dataclasses.asdict
    return {
        "split": evaluation.split,
        "split_words": evaluation.split_words,
        "n": plain(evaluation.n),
        "levels": {
            level.name: {row.name: plain(row)["scores"] for row in level.rows}
            for level in evaluation.levels
        },
        "leads": {level.name: plain(level[subject])["leads"] for level in evaluation.levels},
        "train": evaluation.train.get(subject, {}),
        "confidence": plain(evaluation.confidence[subject]),
        "overlap": plain(evaluation.overlap),
        "skipped": evaluation.skipped,
        "seed": evaluation.seed,
        "replicates": evaluation.replicates,
        "resample": evaluation.resample,
        "warnings": evaluation.warnings(),
    }


def read_evaluation(path: Path) -> EvaluationResult:
    """The judgement of one subject that a `scores.json` holds.

    Raises:
        InputError: the file is missing, is not JSON, or is not a judgement.
    """
    found = read_json(path)
    try:
        return _from_json(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is no judgement ({error}); run `perturbjax evaluate` again"
        ) from error


def _from_json(found: dict[str, Any]) -> EvaluationResult:
    def estimates(of: dict[str, dict[str, float]]) -> dict[str, Estimate]:
        return {metric: Estimate(**one) for metric, one in of.items()}

    def row(name: str, scores: dict, leads: dict) -> ModelScores:
        leads = {other: estimates(lead) for other, lead in leads.items()} if name == MODEL else {}
        return ModelScores(name, name != MODEL, estimates(scores), leads)

    levels = [
        Level(
            level,
            found["n"][level],
            tuple(row(name, of, found["leads"][level]) for name, of in model_names.items()),
        )
        for level, model_names in found["levels"].items()
    ]
    return EvaluationResult(
        split=found["split"],
        folds=1,
        n=SampleSizes(**found["n"]),
        levels=tuple(levels),
        train={MODEL: found["train"]} if found["train"] else {},
        overlap=Overlap(**found["overlap"]),
        confidence={MODEL: Confidence(**found["confidence"])},
        **{name: found[name] for name in ("skipped", "seed", "replicates", "resample")},
    )


def describe_test_set(evaluation: EvaluationResult) -> str:
    """One sentence: how the split was made, and how much the test part holds."""
    n = evaluation.n
    sizes = {"site": n.site, "well": n.well, "plate": n.plate}
    tested = ", ".join(
        f"{count} {what}{'' if count == 1 else 's'}" for what, count in sizes.items()
    )
    trained = (
        "trained on"
        if evaluation.folds == 1
        else f"{evaluation.folds} folds, each trained on about"
    )
    return (
        f"Split by {evaluation.split_name}: {evaluation.split_words}. Tested on {tested}, "
        f"{n.test_classes} of {n.classes} classes; {trained} {n.train_site} sites."
    )


def summary_sentences(evaluation: EvaluationResult) -> list[str]:
    """For each level one sentence: the (best) subject's headline score, and its lead over the best baseline."""
    sentences = []
    for level in evaluation.displayed_levels:
        subject = rank_rows(level, evaluation.model_names)[0]
        best = level.best_baseline.name
        of = f" of {subject.name}" if len(evaluation.model_names) > 1 else ""
        sentences.append(
            f"{_capital(METRICS[HEADLINE].words)} {level.words}{of} {format_estimate(subject.scores[HEADLINE])}; lead over the "
            f"best baseline ({best}) {format_estimate(subject.leads[best][HEADLINE])}."
        )
    return sentences


def rank_rows(level: Level, names: Sequence[str]) -> list[ModelScores]:
    """The rows of these names, best headline score first; of equals the more accurate, then the first."""
    rows = [row for row in level.rows if row.name in names]
    return sorted(
        rows, key=lambda row: (-row.scores[HEADLINE].value, -row.scores["accuracy"].value)
    )


def describe_calibration(confidence: Confidence) -> str:
    """One sentence: how far stated probabilities lie from what is reached, before and after one temperature."""
    hot = confidence.temperature
    says = "surer than it is right" if hot > 1 else "less sure than it could be"
    return (
        f"Calibration error {confidence.error:.3f} as it is; {confidence.scaled_error:.3f} with one temperature fitted "
        f"on other held-out wells ({hot:.2f}: it is {says}). Of the half that it is then surest of, "
        f"{confidence.half_accuracy:.1%} are right."
    )


def format_estimate(estimate: Estimate | None, gap: str = " ") -> str:
    """`0.712 [0.65, 0.77]`; empty where there is no such score."""
    return (
        ""
        if estimate is None
        else f"{estimate.value:z.3f}{gap}[{estimate.low:z.2f}, {estimate.high:z.2f}]"
    )


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
