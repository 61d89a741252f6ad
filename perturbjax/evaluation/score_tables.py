"""Evaluation results on the terminal, and as CSV and JSON tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbjax.core.files import make_folder, write_csv, write_json
from perturbjax.core.messages import PlainConsole, terminal_text
from perturbjax.evaluation.conclusions import verdict
from perturbjax.evaluation.evaluate import Fold, ModelPredictions
from perturbjax.evaluation.evaluation_result import (
    LEVELS,
    EvaluationResult,
    Level,
    ModelScores,
    describe_calibration,
    describe_test_set,
    format_estimate,
    rank_rows,
    summary_sentences,
    to_json,
)
from perturbjax.evaluation.prediction_sets import describe_sets
from perturbjax.evaluation.predictions import encode_labels
from perturbjax.evaluation.scores import METRICS, confusion_matrix, per_class
from perturbjax.evaluation.wells import well_ids

if TYPE_CHECKING:
    from rich.table import Table

#: Terminal width from which intervals fit next to their values.
_WIDE = 105
_CONFIDENCE = ("calibration_error", "scaled_error", "temperature")


def print_evaluation(evaluation: EvaluationResult) -> None:
    """Print one table of scores per level, summary sentences and warnings."""
    from rich.text import Text

    console = PlainConsole(soft_wrap=False)
    console.print(describe_test_set(evaluation))
    gap = " " if console.width >= _WIDE + 15 * (len(evaluation.metrics) - 4) else "\n"
    single = len(evaluation.model_names) == 1
    for level in evaluation.displayed_levels:
        console.print((_single_table if single else _ranking)(evaluation, level, gap))
    unit = f"{evaluation.replicates} resamples of whole {evaluation.resample}s"
    dim = "" if single else " Dim rows are baselines."
    console.print(f"In brackets: 95 % intervals from {unit}.{dim}")
    sentences = [verdict(evaluation)] if single else summary_sentences(evaluation)
    for sentence in sentences:
        console.print(sentence, style="bold")
    if single:
        console.print(describe_calibration(evaluation.confidence[evaluation.model_names[0]]))
    if evaluation.prediction_sets is not None:
        console.print(" ".join(describe_sets(evaluation.prediction_sets)))
    for name, why in evaluation.skipped.items():
        console.print(f"info: {name} not available: {why}")
    for warning in evaluation.warnings():
        console.print(Text.assemble(("warning:", "yellow"), f" {terminal_text(warning)}"))


def _table(level: Level, words: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=f"{words} (n = {level.n})", title_justify="left", box=box.SIMPLE_HEAD)


def _single_table(evaluation: EvaluationResult, level: Level, gap: str) -> Table:
    """One model, its baselines, and its scores on the training sites."""
    metrics, (model,) = evaluation.metrics, evaluation.model_names
    table = _table(level, level.words)
    table.add_column("")
    for metric in metrics:
        table.add_column(METRICS[metric].words, justify="right")
    for row in level.rows:
        own, cells = row.name == model, _cells(row, metrics, gap)
        table.add_row(row.name, *cells, style="bold" if own else "", end_section=own)
    if level.name == "site" and (train := evaluation.train.get(model)):
        table.add_section()
        table.add_row("training sites", *(f"{train[metric]:.3f}" for metric in metrics))
    return table


def _ranking(evaluation: EvaluationResult, level: Level, gap: str) -> Table:
    """Models and baselines, highest score first, with training and test scores."""
    table = _table(level, LEVELS[level.name])
    words = " ".join(row.name for row in level.rows).split()
    table.add_column("", min_width=max(map(len, words)))  # wrap names between words only
    titles = ["train accuracy", *(f"test {METRICS[metric].words}" for metric in evaluation.metrics)]
    for title in titles:
        table.add_column(title, justify="right", max_width=None if gap == " " else len("balanced"))
    for row in rank_rows(level, [row.name for row in level.rows]):
        train = evaluation.train.get(row.name)
        accuracy = f"{train['accuracy']:.3f}" if train else ""
        cells = _cells(row, evaluation.metrics, gap)
        table.add_row(row.name, accuracy, *cells, style="dim" if row.baseline else "")
    return table


def _cells(row: ModelScores, metrics: Sequence[str], gap: str) -> list[str]:
    return [format_estimate(row.scores.get(metric), gap) for metric in metrics]


def write_run_evaluation(
    evaluation: EvaluationResult,
    model: ModelPredictions,
    fold: Fold,
    class_names: Sequence[str],
    out: Path,
) -> None:
    """Write `scores.json`, `scores.csv`, `per_class.csv` and `confusion.csv` of one model and fold.

    Args:
        evaluation: result of this model and this fold.
        model: its predictions.
        fold: its sites.
        class_names: classes in the order of the probabilities.
        out: folder.
    """
    out = make_folder(Path(out))
    labels = encode_labels(fold.test["label"], class_names, "test sites")
    (probabilities,) = model.test
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), len(class_names))
    classes = pd.Index(class_names, name="true")
    write_csv(out / "scores.csv", long_scores_table(evaluation))
    table = per_class(labels, probabilities, well_ids(fold.test), class_names)
    write_csv(out / "per_class.csv", table)
    confusion = pd.DataFrame(matrix, index=classes, columns=class_names)
    write_csv(out / "confusion.csv", confusion, index=True)
    write_json(out / "scores.json", to_json(evaluation))


def long_scores_table(evaluation: EvaluationResult) -> pd.DataFrame:
    """Scores in long format: level, model, metric, value, low, high, n."""
    rows = [
        (level.name, row.name, metric, one.value, one.low, one.high, level.n)
        for level in evaluation.levels
        for row in level.rows
        for metric, one in row.scores.items()
    ]
    # Training scores have no interval, so `low` and `high` are empty.
    sites = evaluation.n.train_site
    rows += [
        ("site", f"{name} on training sites", metric, value, np.nan, np.nan, sites)
        for name, scores in evaluation.train.items()
        for metric, value in scores.items()
    ]
    return pd.DataFrame(rows, columns=["level", "model", "metric", "value", "low", "high", "n"])


def ranking_table(evaluation: EvaluationResult) -> pd.DataFrame:
    """One row per level and model or baseline, highest balanced accuracy first.

    Columns: `level`, `model`, `baseline` (bool), `n`, each metric with `_low` and `_high`, and
    `train_<metric>` (mean training score over folds). Rows of sites also have
    `calibration_error`, `scaled_error` (after temperature scaling) and `temperature`.
    """
    rows = []
    for level in evaluation.displayed_levels:
        for one in rank_rows(level, [row.name for row in level.rows]):
            row = {"level": level.name, "model": one.name, "baseline": one.baseline, "n": level.n}
            for metric, score in one.scores.items():
                values = {"": score.value, "_low": score.low, "_high": score.high}
                row |= {metric + suffix: value for suffix, value in values.items()}
            train = evaluation.train.get(one.name, {})
            row |= {f"train_{metric}": value for metric, value in train.items()}
            confidence = evaluation.confidence.get(one.name)
            if level.name == "site" and confidence:
                errors = (confidence.error, confidence.scaled_error, confidence.temperature)
                row |= dict(zip(_CONFIDENCE, errors, strict=True))
            rows.append(row)
    # The table has the same columns for all evaluations.
    columns = ["level", "model", "baseline", "n"]
    columns += [metric + suffix for metric in METRICS for suffix in ("", "_low", "_high")]
    columns += [f"train_{metric}" for metric in METRICS]
    return pd.DataFrame(rows).reindex(columns=[*columns, *_CONFIDENCE])
