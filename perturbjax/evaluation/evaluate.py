"""Evaluate predictions next to baselines, with confidence intervals, by site and by well.

A run is one model with one fold; `classify` passes several models and folds. Baselines are fitted
once per fold, and each level is resampled once for all models and baselines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.data.splits import TRAIN
from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation.baselines import (
    BASELINES,
    Baseline,
    BaselineUnavailable,
    list_unplaced_wells,
)
from perturbjax.evaluation.bootstrap import resample
from perturbjax.evaluation.calibration import confidence, halves_of_wells
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

#: Column that marks negative controls; without it there is no level of treated sites.
NEGCON = "negcon"
#: Probabilities of sites by the name of the model or baseline.
Probabilities = dict[str, Float[np.ndarray, "n classes"]]


@dataclasses.dataclass(frozen=True)
class Fold:
    """Training and test sites of one fold.

    Both tables have `site_id`, `Metadata_Plate`, `Metadata_Well`, `label` (class name), and the
    columns that baselines use (`n_cells`, `mask_area`, `mean_<channel>` and others). `test` can
    have `negcon` (bool).
    """

    name: str
    train: pd.DataFrame
    test: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class ModelPredictions:
    """Class probabilities of one model for the sites of each fold, in the order of the folds.

    `train` is empty if training sites were not predicted.
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
    """Match a run's table of predictions with its train/test split.

    Args:
        predictions: table of `perturbjax predict`; training sites are optional.
        train_index: index rows of the training sites, with `label` (class name).
        test_index: index rows of the test sites.
        class_names: classes in the order of the probabilities.

    Raises:
        InputError: as `predictions.select_predictions`, or a column is missing.
    """
    _require_columns("train_index", train_index, ("site_id", PLATE, WELL, "label"))
    _require_columns("test_index", test_index, ("site_id", PLATE, WELL))
    labels, test = select_predictions(predictions, test_index, class_names)
    train: tuple[np.ndarray, ...] = ()
    # Training predictions are optional; they give the training score.
    if "part" in predictions.columns and (predictions["part"] == TRAIN).any():
        train = (select_predictions(predictions, train_index, class_names, part=TRAIN)[1],)
    test_table = test_index.reset_index(drop=True).assign(label=labels)
    fold = Fold(MODEL, train_index.reset_index(drop=True), test_table)
    return ModelPredictions(MODEL, (test,), train), fold


def _require_columns(name: str, index: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in index.columns]:
        available = ", ".join(map(str, index.columns))
        raise InputError(f"{name}: no column {missing[0]!r} (available: {available})")


def evaluate_predictions(
    models: Sequence[ModelPredictions],
    folds: Sequence[Fold],
    class_names: Sequence[str],
    *,
    split: str,
    seed: int = 0,
    replicates: int = 2000,
    whole: Literal["well", "plate"] = "well",
    baselines: Mapping[str, Baseline] = BASELINES,
) -> EvaluationResult:
    """Score models and baselines over the test sites of all folds together.

    Args:
        models: at least one; all predict the same folds.
        folds: at least one.
        class_names: classes in the order of the probabilities.
        split: site, well, plate, layout, compound, or the name of a split file.
        seed: seed of the bootstrap.
        replicates: number of bootstrap replicates.
        whole: resampling unit. "plate" gives wider intervals and requires several plates.
        baselines: baselines by name.

    Raises:
        InputError: a label is not in `class_names`, probabilities are invalid, or a table lacks a
            column.
    """
    for fold in folds:
        for part, table in (("train", fold.train), ("test", fold.test)):
            _require_columns(f"{fold.name}: {part}", table, ("site_id", PLATE, WELL, "label"))
    panel = _Panel(models, folds, class_names, baselines, seed, replicates)
    test = panel.test
    clusters = panel.wells if whole == "well" else pd.factorize(test[PLATE])[0]
    levels = tuple(panel.levels(clusters))
    sites = pd.concat([*(fold.train for fold in folds), test], ignore_index=True)
    unplaced = list_unplaced_wells(sites) if "position" in panel.probabilities else ()
    return EvaluationResult(
        split=split,
        folds=len(folds),
        n=SampleSizes(
            site=len(test),
            well=int(panel.wells.max()) + 1,
            plate=int(test[PLATE].nunique()),
            train_site=round(np.mean([len(fold.train) for fold in folds])),
            classes=len(class_names),
            test_classes=len(np.unique(panel.labels)),
        ),
        levels=levels,
        train={
            model.name: _mean_train_scores(model, panel.train_labels)
            for model in models
            if model.train
        },
        overlap=_mean_overlap(folds),
        skipped=panel.skipped,
        seed=seed,
        replicates=replicates,
        resample=whole,
        confidence={
            model.name: confidence(panel.labels, panel.probabilities[model.name], panel.parts)
            for model in models
        },
        unplaced_wells=unplaced,
    )


class _Panel:
    """Probabilities of all models and baselines for the test sites of all folds."""

    def __init__(
        self,
        models: Sequence[ModelPredictions],
        folds: Sequence[Fold],
        class_names: Sequence[str],
        baselines: Mapping[str, Baseline],
        seed: int,
        replicates: int,
    ):
        self.models = tuple(model.name for model in models)
        self.classes, self.seed, self.replicates = len(class_names), seed, replicates
        self.baselines = baselines
        self.test = pd.concat([fold.test for fold in folds], ignore_index=True)
        self.wells = well_ids(self.test)
        self.parts = calibration_parts(folds, self.wells, seed)
        self.labels = encode_labels(self.test["label"], class_names, "test sites")
        self.train_labels = [
            encode_labels(fold.train["label"], class_names, "training sites") for fold in folds
        ]
        self.probabilities = {model.name: np.concatenate(model.test) for model in models}
        for probabilities in self.probabilities.values():
            check_probabilities(self.labels, probabilities, list(self.test["site_id"]))
        self.skipped: dict[str, str] = {}
        for name, baseline in baselines.items():
            # Random baselines have expected counts instead of probabilities, see `_level`.
            if baseline.predict is None:
                continue
            try:
                self.probabilities[name] = np.concatenate(
                    [
                        baseline.predict(fold.train, labels, fold.test, self.classes)
                        for fold, labels in zip(folds, self.train_labels, strict=True)
                    ]
                )
            except BaselineUnavailable as reason:
                self.skipped[name] = str(reason)

    def levels(self, clusters: Int[np.ndarray, " n"]) -> list[Level]:
        """Score by site, by treated site and by well, as far as the data allow."""
        # Levels in the order of the tables: site, treated site, well.
        levels = [self._level("site", self.probabilities, self.labels, clusters)]
        if NEGCON in self.test.columns:
            treated = ~self.test[NEGCON].to_numpy(dtype=bool)
            if treated.any() and not treated.all():
                subset = {name: one[treated] for name, one in self.probabilities.items()}
                # Renumber the clusters, since some may contain negative controls only.
                own_clusters = pd.factorize(clusters[treated])[0]
                levels.append(self._level("treated", subset, self.labels[treated], own_clusters))
        try:
            wells = {
                name: aggregate_wells(self.wells, self.labels, one)
                for name, one in self.probabilities.items()
            }
        except InputError as error:
            self.skipped["well level"] = error.message
            return levels
        # The true classes of the wells are the same for all models.
        labels = next(iter(wells.values()))[0]
        # Cluster of each well, read from its first site.
        own_clusters = clusters[np.unique(self.wells, return_index=True)[1]]
        means = {name: mean for name, (_, mean) in wells.items()}
        return [*levels, self._level("well", means, labels, own_clusters)]

    def _level(
        self,
        name: str,
        probabilities: Probabilities,
        labels: Int[np.ndarray, " n"],
        clusters: Int[np.ndarray, " n"],
    ) -> Level:
        counts = {model: count(labels, probabilities[model], clusters) for model in self.models}
        for other, baseline in self.baselines.items():
            if baseline.draw is not None:
                # Class frequencies of the training sets of all folds together.
                train_labels = np.concatenate(self.train_labels)
                counts[other] = baseline.draw(
                    labels, train_labels, self.classes, clusters, seed=self.seed
                )
            elif other in probabilities:
                counts[other] = count(labels, probabilities[other], clusters)
        baselines = [one for one in counts if one not in self.models]
        # One resampling for all models and baselines gives paired differences.
        resampled = resample(counts, replicates=self.replicates, seed=self.seed)
        rows = [
            ModelScores(
                one,
                one in baselines,
                resampled.scores(one),
                {}
                if one in baselines
                else {other: resampled.lead(one, other) for other in baselines},
            )
            for one in counts
        ]
        return Level(name, len(labels), tuple(rows))


def calibration_parts(
    folds: Sequence[Fold], wells: Int[np.ndarray, " n"], seed: int
) -> Int[np.ndarray, " n"]:
    """Parts between which temperatures are cross-fitted: folds, or two random halves of wells."""
    if len(folds) > 1:
        return np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    return halves_of_wells(wells, seed)


def _mean_train_scores(
    model: ModelPredictions, train_labels: Sequence[np.ndarray]
) -> dict[str, float]:
    """Average the training scores over folds."""
    scores = [score(*one) for one in zip(train_labels, model.train, strict=True)]
    return {metric: float(np.mean([one[metric] for one in scores])) for metric in METRICS}


def _mean_overlap(folds: Sequence[Fold]) -> Overlap:
    fractions = [dataclasses.astuple(overlap(fold.train, fold.test)) for fold in folds]
    return Overlap(*(float(fraction) for fraction in np.mean(fractions, axis=0)))
