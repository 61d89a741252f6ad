"""The judge: predictions beside their baselines, with intervals, for sites and for wells.

A run is one subject and one fold; a table of classifiers is many of both. Baselines are fitted once a fold and
everything is resampled once a level, however many subjects there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.data.splits import TRAIN
from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation.baselines import BASELINES, Baseline, BaselineUnavailable
from perturbjax.evaluation.bootstrap import resample
from perturbjax.evaluation.calibration import confidence
from perturbjax.evaluation.evaluation_result import (
    MODEL,
    EvaluationResult,
    Level,
    ModelScores,
    SampleSizes,
)
from perturbjax.evaluation.predictions import encode_labels, select_predictions
from perturbjax.evaluation.scores import METRICS, check_probabilities, count, score
from perturbjax.evaluation.shortcuts import Overlap, overlap
from perturbjax.evaluation.wells import aggregate_wells, well_ids

#: Marks negative controls in a fold's test table; without it there is no level of treated sites.
NEGCON = "negcon"


@dataclasses.dataclass(frozen=True)
class Fold:
    """One way of dealing sites to training and judging.

    Both tables have `site_id`, `Metadata_Plate`, `Metadata_Well` and `label` (class name), and what baselines look at
    (`n_cells`, `mask_area`, `mean_<channel>` …); `test` may have `negcon` (true or false).
    """

    name: str
    train: pd.DataFrame
    test: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class ModelPredictions:
    """Who is judged: the probabilities that it gave to the sites of each fold, in the fold's order.

    `train` is empty where training sites were not predicted.
    """

    name: str
    test: tuple[Float[np.ndarray, "_test classes"], ...]
    train: tuple[Float[np.ndarray, "_train classes"], ...] = ()


def match_run_predictions(
    predictions: pd.DataFrame,
    train_index: pd.DataFrame,
    test_index: pd.DataFrame,
    class_names: Sequence[str],
) -> tuple[ModelPredictions, Fold]:
    """A run's table of predictions, checked against its split: one subject and one fold.

    Args:
        predictions: as `perturbjax predict` writes them; those of the training part may be missing.
        train_index, test_index: rows of the dataset's index; `train_index` also `label`, the class name.
        class_names: classes in logit order.

    Raises:
        InputError: as `predictions.select_predictions`, or an index lacks a column.
    """
    _require_columns("train_index", train_index, ("site_id", PLATE, WELL, "label"))
    _require_columns("test_index", test_index, ("site_id", PLATE, WELL))
    labels, test = select_predictions(predictions, test_index, class_names)
    train: tuple[np.ndarray, ...] = ()
    if "part" in predictions.columns and (predictions["part"] == TRAIN).any():
        train = (select_predictions(predictions, train_index, class_names, part=TRAIN)[1],)
    judged = test_index.reset_index(drop=True).assign(label=labels)
    return ModelPredictions(MODEL, (test,), train), Fold(
        MODEL, train_index.reset_index(drop=True), judged
    )


def _require_columns(name: str, index: pd.DataFrame, needed: Sequence[str]) -> None:
    if missing := [column for column in needed if column not in index.columns]:
        raise InputError(
            f"{name}: no column {missing[0]!r}; it has {', '.join(map(str, index.columns))}"
        )


def evaluate_predictions(
    model_names: Sequence[ModelPredictions],
    folds: Sequence[Fold],
    class_names: Sequence[str],
    *,
    split: str,
    seed: int = 0,
    replicates: int = 2000,
    whole: Literal["well", "plate"] = "well",
    baselines: Mapping[str, Baseline] = BASELINES,
) -> EvaluationResult:
    """Scores of every subject and baseline over the test sites of all folds together.

    Args:
        subjects: at least one; all answer the same folds.
        folds: at least one.
        class_names: classes in the order of the probabilities.
        split: site, well, plate, layout, compound, or the name of a file.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        whole: what the bootstrap draws whole. Plates give the wider, more cautious interval, and need several.
        baselines: what all are judged beside.

    Raises:
        InputError: a label is not one of `class_names`, probabilities are none, or a table lacks a column.
    """
    for fold in folds:
        for part, table in (("train", fold.train), ("test", fold.test)):
            _require_columns(f"{fold.name}: {part}", table, ("site_id", PLATE, WELL, "label"))
    panel = _Panel(model_names, folds, class_names, baselines, seed, replicates)
    test, wells = panel.test, panel.wells
    clusters = wells if whole == "well" else pd.factorize(test[PLATE])[0]
    levels = [panel.level("site", panel.answers, panel.labels, clusters)]
    treated = (
        ~test[NEGCON].to_numpy(dtype=bool)
        if NEGCON in test.columns
        else np.ones(len(test), dtype=bool)
    )
    if treated.any() and not treated.all():
        some = {name: answer[treated] for name, answer in panel.answers.items()}
        levels.append(
            panel.level("treated", some, panel.labels[treated], pd.factorize(clusters[treated])[0])
        )
    try:
        well_labels, together = panel.by_well()
        of_well = clusters[np.unique(wells, return_index=True)[1]]
        levels.append(panel.level("well", together, well_labels, of_well))
    except InputError as error:
        panel.skipped["well level"] = str(error)
    return EvaluationResult(
        split=split,
        folds=len(folds),
        n=SampleSizes(
            site=len(test),
            well=int(wells.max()) + 1,
            plate=int(test[PLATE].nunique()),
            train_site=round(np.mean([len(fold.train) for fold in folds])),
            classes=len(class_names),
            test_classes=len(np.unique(panel.labels)),
        ),
        levels=tuple(levels),
        train=dict(_train_scores(model_names, folds, class_names)),
        overlap=_mean_overlap(folds),
        skipped=panel.skipped,
        seed=seed,
        replicates=replicates,
        resample=whole,
        confidence={
            name: confidence(panel.labels, panel.answers[name], panel.parts)
            for name in panel.model_names
        },
    )


class _Panel:
    """What all subjects and baselines said of the test sites of all folds, baselines fitted once a fold."""

    def __init__(
        self,
        model_names: Sequence[ModelPredictions],
        folds: Sequence[Fold],
        class_names: Sequence[str],
        baselines: Mapping[str, Baseline],
        seed: int,
        replicates: int,
    ):
        self.model_names = tuple(subject.name for subject in model_names)
        self.classes, self.seed, self.replicates = len(class_names), seed, replicates
        self.baselines = baselines
        self.test = pd.concat([fold.test for fold in folds], ignore_index=True)
        self.wells = well_ids(self.test)
        self.parts = calibration_parts(folds, self.wells, seed)
        self.labels = encode_labels(self.test["label"], class_names, "test sites")
        in_training = [
            encode_labels(fold.train["label"], class_names, "training sites") for fold in folds
        ]
        self.train_labels = np.concatenate(in_training)
        self.answers = {subject.name: np.concatenate(subject.test) for subject in model_names}
        for answer in self.answers.values():
            check_probabilities(self.labels, answer, list(self.test["site_id"]))
        self.skipped: dict[str, str] = {}
        for name, baseline in baselines.items():
            if baseline.predict is None:
                continue
            try:
                parts = [
                    baseline.predict(fold.train, labels, fold.test, self.classes)
                    for fold, labels in zip(folds, in_training, strict=True)
                ]
            except BaselineUnavailable as reason:
                self.skipped[name] = str(reason)
            else:
                self.answers[name] = np.concatenate(parts)

    def by_well(
        self,
    ) -> tuple[Int[np.ndarray, " wells"], dict[str, Float[np.ndarray, "wells classes"]]]:
        """True class of each well, and what its sites say together by the name of who said it.

        Raises:
            InputError: the sites of one well have different labels.
        """
        together = {
            name: aggregate_wells(self.wells, self.labels, answer)
            for name, answer in self.answers.items()
        }
        return next(iter(together.values()))[0], {
            name: mean for name, (_, mean) in together.items()
        }

    def level(
        self,
        name: str,
        answers: dict[str, Float[np.ndarray, "n classes"]],
        labels: Int[np.ndarray, " n"],
        clusters: Int[np.ndarray, " n"],
    ) -> Level:
        """Everybody's scores and the subjects' leads where these rows are what is counted."""
        counts = {
            subject: count(labels, answers[subject], clusters) for subject in self.model_names
        }
        for baseline, how in self.baselines.items():
            if how.draw is not None:
                counts[baseline] = how.draw(
                    labels, self.train_labels, self.classes, clusters, seed=self.seed
                )
            elif baseline in answers:
                counts[baseline] = count(labels, answers[baseline], clusters)
        baselines = [one for one in counts if one not in self.model_names]
        found = resample(counts, replicates=self.replicates, seed=self.seed)
        rows = [
            ModelScores(
                one,
                False,
                found.scores(one),
                {other: found.lead(one, other) for other in baselines},
            )
            for one in self.model_names
        ]
        rows += [ModelScores(one, True, found.scores(one), {}) for one in baselines]
        return Level(name, len(labels), tuple(rows))


def calibration_parts(
    folds: Sequence[Fold], wells: Int[np.ndarray, " n"], seed: int
) -> Int[np.ndarray, " n"]:
    """What temperatures are fitted across: folds, or of a single fold two halves of its wells, dealt by luck."""
    if len(folds) > 1:
        return np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    return np.random.default_rng(seed).permutation(int(wells.max()) + 1)[wells] % 2


def _train_scores(
    model_names: Sequence[ModelPredictions], folds: Sequence[Fold], class_names: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each subject's mean scores over folds on what it was trained on, where it predicted that."""
    for subject in (subject for subject in model_names if subject.train):
        scores = [
            score(encode_labels(fold.train["label"], class_names, "training sites"), answer)
            for fold, answer in zip(folds, subject.train, strict=True)
        ]
        yield (
            subject.name,
            {metric: float(np.mean([one[metric] for one in scores])) for metric in METRICS},
        )


def _mean_overlap(folds: Sequence[Fold]) -> Overlap:
    shared = [dataclasses.astuple(overlap(fold.train, fold.test)) for fold in folds]
    return Overlap(*(float(share) for share in np.mean(shared, axis=0)))
