"""A judgement shown to a person on the terminal, and written as tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbjax.core.files import make_folder, write_csv, write_json
from perturbjax.core.messages import PlainConsole, terminal_text
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
from perturbjax.evaluation.predictions import encode_labels
from perturbjax.evaluation.scores import METRICS, confusion_matrix, per_class
from perturbjax.evaluation.wells import well_ids

if TYPE_CHECKING:
    from rich.table import Table

#: Columns of the terminal from which an interval stands beside its value, and not below.
_WIDE = 105
_CONFIDENCE = ("calibration_error", "scaled_error", "temperature")


def print_evaluation(evaluation: EvaluationResult) -> None:
    """Show scores on stdout: subjects beside baselines, a block a level, and warnings."""
    from rich.text import Text

    console = PlainConsole(soft_wrap=False)
    console.print(describe_test_set(evaluation))
    gap = " " if console.width >= _WIDE + 15 * (len(evaluation.metrics) - 4) else "\n"
    for level in evaluation.displayed_levels:
        console.print((_one if len(evaluation.model_names) == 1 else _many)(evaluation, level, gap))
    whole = f"{evaluation.replicates} resamples of whole {evaluation.resample}s"
    dim = " Dim rows are baselines." if len(evaluation.model_names) > 1 else ""
    console.print(f"In brackets: 95 % intervals from {whole}.{dim}")
    for sentence in summary_sentences(evaluation):
        console.print(sentence, style="bold")
    if len(evaluation.model_names) == 1:
        console.print(describe_calibration(evaluation.confidence[evaluation.model_names[0]]))
    for name, why in evaluation.skipped.items():
        console.print(f"no {name}: {why}")
    for warning in evaluation.warnings():
        console.print(Text.assemble(("warning:", "yellow"), f" {terminal_text(warning)}"))


def _table(level: Level, words: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=f"{words} (n = {level.n})", title_justify="left", box=box.SIMPLE_HEAD)


def _one(evaluation: EvaluationResult, level: Level, gap: str) -> Table:
    """One subject above its baselines, and below them what it reaches on its training sites."""
    metrics, (subject,) = evaluation.metrics, evaluation.model_names
    table = _table(level, level.words)
    table.add_column("")
    for metric in metrics:
        table.add_column(METRICS[metric].words, justify="right")
    for row in level.rows:
        own = row.name == subject
        table.add_row(
            row.name, *_cells(row, metrics, gap), style="bold" if own else "", end_section=own
        )
    if level.name == "site" and (train := evaluation.train.get(subject)):
        table.add_section()
        table.add_row("on training", *(f"{train[metric]:.3f}" for metric in metrics))
    return table


def _many(evaluation: EvaluationResult, level: Level, gap: str) -> Table:
    """Subjects and baselines, best first; what subjects reach on training rows beside what they reach on test rows."""
    table = _table(level, LEVELS[level.name])
    words = " ".join(row.name for row in level.rows).split()
    table.add_column("", min_width=max(map(len, words)))  # names break between words, never inside
    for column in (
        "train accuracy",
        *(f"test {METRICS[metric].words}" for metric in evaluation.metrics),
    ):
        table.add_column(column, justify="right", max_width=None if gap == " " else len("balanced"))
    for row in rank_rows(level, [row.name for row in level.rows]):
        train = evaluation.train.get(row.name)
        shown = f"{train['accuracy']:.3f}" if train else ""
        table.add_row(
            row.name,
            shown,
            *_cells(row, evaluation.metrics, gap),
            style="dim" if row.baseline else "",
        )
    return table


def _cells(row: ModelScores, metrics: Sequence[str], gap: str) -> list[str]:
    return [format_estimate(row.scores.get(metric), gap) for metric in metrics]


def write_run_evaluation(
    evaluation: EvaluationResult,
    subject: ModelPredictions,
    fold: Fold,
    class_names: Sequence[str],
    out: Path,
) -> None:
    """One subject's `scores.json`, `scores.csv`, `per_class.csv` and `confusion.csv`, in the folder `out`.

    Args:
        judgement: of this subject and this fold alone.
    """
    make_folder(Path(out))
    labels, (probabilities,) = (
        encode_labels(fold.test["label"], class_names, "test sites"),
        subject.test,
    )
    wells = well_ids(fold.test)
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), len(class_names))
    tables = {
        "scores.csv": (long_scores_table(evaluation), False),
        "per_class.csv": (per_class(labels, probabilities, wells, class_names), False),
        "confusion.csv": (
            pd.DataFrame(matrix, index=pd.Index(class_names, name="true"), columns=class_names),
            True,
        ),
    }
    for name, (table, with_index) in tables.items():
        write_csv(Path(out) / name, table, index=with_index)
    write_json(Path(out) / "scores.json", to_json(evaluation))


def long_scores_table(evaluation: EvaluationResult) -> pd.DataFrame:
    """One row a number: level, subject, metric, value, low, high, n."""
    rows = [
        (level.name, row.name, metric, one.value, one.low, one.high, level.n)
        for level in evaluation.levels
        for row in level.rows
        for metric, one in row.scores.items()
    ]
    rows += [
        (
            "site",
            f"{name} on training sites",
            metric,
            value,
            np.nan,
            np.nan,
            evaluation.n.train_site,
        )
        for name, scores in evaluation.train.items()
        for metric, value in scores.items()
    ]
    return pd.DataFrame(rows, columns=["level", "model", "metric", "value", "low", "high", "n"])


def ranking_table(evaluation: EvaluationResult) -> pd.DataFrame:
    """One row a level and subject or baseline, best headline score first: `level`, `subject`, `baseline` (true or
    false), `n`, each metric of `METRICS` with `_low` and `_high`, and `train_<metric>`, the mean over folds of the
    score on the training rows. At the level of sites also `calibration_error`, what it is with one temperature fitted
    on other rows (`scaled_error`), and that `temperature`."""
    rows = []
    for level in evaluation.displayed_levels:
        for one in rank_rows(level, [row.name for row in level.rows]):
            row = {"level": level.name, "model": one.name, "baseline": one.baseline, "n": level.n}
            for metric, found in one.scores.items():
                row |= {
                    metric: found.value,
                    f"{metric}_low": found.low,
                    f"{metric}_high": found.high,
                }
            row |= {
                f"train_{metric}": value
                for metric, value in evaluation.train.get(one.name, {}).items()
            }
            if level.name == "site" and (sure := evaluation.confidence.get(one.name)):
                row |= dict(
                    zip(_CONFIDENCE, (sure.error, sure.scaled_error, sure.temperature), strict=True)
                )
            rows.append(row)
    columns = ["level", "model", "baseline", "n"]
    columns += [name for metric in METRICS for name in (metric, f"{metric}_low", f"{metric}_high")]
    return pd.DataFrame(rows).reindex(
        columns=[*columns, *(f"train_{metric}" for metric in METRICS), *_CONFIDENCE]
    )
