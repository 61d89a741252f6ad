"""Charts of scores, training curves and calibration, each with its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.messages import html_text
from perturbjax.evaluation.baselines import BASELINES
from perturbjax.evaluation.calibration import (
    BINS,
    calibration_error,
    confident_accuracies,
    half_of,
)
from perturbjax.evaluation.calibration import confidence_bins as bins_of_confidence
from perturbjax.evaluation.evaluation_result import (
    EvaluationResult,
    describe_calibration,
    format_estimate,
)
from perturbjax.evaluation.prediction_sets import describe_sets
from perturbjax.evaluation.score_tables import long_scores_table
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import figure, table
from perturbjax.report.run_results import TestPredictions
from perturbjax.report.svg import Chart, ticks

#: Style class of each level.
_LEVEL = {"site": "train", "treated": "other", "well": "test"}


def scores(evaluation: EvaluationResult) -> str:
    """Return one chart per metric and one table per level as HTML."""
    first, *rest = score_charts(evaluation)
    charts = first.svg()
    others = "".join(chart.svg() for chart in rest)
    resampled = f"{evaluation.replicates} resamples of whole {evaluation.resample}s"
    drawn = figure(
        "scores",
        f'<div class="row">{charts}</div>{_more_metrics(others)}',
        f"Bars are 95 % intervals from {resampled}.",
        long_scores_table(evaluation),
    )
    tables = (_table(evaluation, level.name) for level in evaluation.displayed_levels)
    return f"{drawn}{''.join(tables)}{_notes(evaluation)}"


def score_charts(evaluation: EvaluationResult) -> list[Chart]:
    """Draw one chart per metric, that of the headline first."""
    metrics = sorted(evaluation.metrics, key=lambda metric: metric != HEADLINE)
    return [_panel(evaluation, metric) for metric in metrics]


def _more_metrics(charts: str) -> str:
    """Further metrics, folded: they nearly always agree with the headline."""
    if not charts:
        return ""
    return f'<details><summary>Other metrics</summary><div class="row">{charts}</div></details>'


def _panel(evaluation: EvaluationResult, metric: str) -> Chart:
    """Scores of the model and the baselines in one metric, with intervals."""
    rows, levels, name = (
        evaluation.levels[0].rows,
        evaluation.displayed_levels,
        METRICS[metric].words,
    )
    values = [row.scores[metric] for level in levels for row in level.rows if metric in row.scores]
    low = min(0.0, *(value.low for value in values))
    # The axis must have a positive length, even if all scores are 0.
    high = max(max(value.high for value in values), 1e-3)
    text = "; ".join(
        f"{row.name} {row.scores[metric].value:.3f}"
        for row in levels[0].rows
        if metric in row.scores
    )
    chart = Chart(
        (low, high * 1.04),
        # Reversed axis: the first row is at the top.
        (len(rows) - 0.5, -0.5),
        name,
        f"{name} {levels[0].words}: {text}",
        width=390,
        height=64 + 26 * len(rows),
        left=110,
        bottom=34,
    )
    chart.grid(ticks(low, high, 5), ())
    for number, row in enumerate(rows):
        _, py = chart.pixel(0, number)
        chart.text(104, py + 4, row.name, "end", "" if row.baseline else "strong")
    for order, level in enumerate(levels):
        # The levels of one row are drawn below each other.
        offset, css = 0.3 * (order - (len(levels) - 1) / 2), _LEVEL[level.name]
        for number, row in enumerate(level.rows):
            score = row.scores.get(metric)
            if score is None:
                continue
            chart.line([score.low, score.high], [number + offset] * 2, css)
            tip = f"{row.name} {level.words}: {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
            chart.dots([score.value], [number + offset], css, [tip])
        if len(levels) > 1:
            px = chart.width - 20 - 74 * (len(levels) - 1 - order)
            chart.legend_entry(px, 10, level.words, css)
    return chart


def _table(evaluation: EvaluationResult, name: str) -> str:
    """Scores of one level; at site level also the scores on the training set."""
    level = evaluation[name]
    heading = f"{level.words} (n = {level.n})"
    rows = []
    for row in level.rows:
        entry: dict[str, Any] = {heading: row.name}
        for metric in evaluation.metrics:
            score = row.scores.get(metric)
            entry[METRICS[metric].words] = format_estimate(score) if score else ""
        rows.append(entry)
    if name == "site":
        for model, train in evaluation.train.items():
            values = {
                METRICS[metric].words: f"{train[metric]:.3f}"
                for metric in evaluation.metrics
                if np.isfinite(train.get(metric, np.nan))
            }
            rows.append({heading: f"{model}, on training sites", **values})
    strong = [not row.baseline for row in level.rows]
    strong += [False] * (len(rows) - len(strong))
    return table(f"scores-{name}", pd.DataFrame(rows).fillna(""), meanings=MEANINGS, strong=strong)


def _notes(evaluation: EvaluationResult) -> str:
    names = {row.name for row in evaluation.levels[0].rows}
    words = " ".join(f"{name}: {BASELINES[name].words}." for name in BASELINES if name in names)
    skipped = "".join(
        f" No {html_text(name)}: {html_text(reason)}."
        for name, reason in evaluation.skipped.items()
    )
    return (
        '<p class="note">The prediction of a well is the mean of its sites\' probabilities. '
        f"Baselines: {html_text(words)}{skipped}</p>"
    )


def training(metrics: list[dict[str, Any]]) -> str:
    """Return loss, accuracy and learning rate by epoch as HTML; empty without metrics."""
    columns, charts = training_charts(metrics)
    if not charts:
        return ""
    drawn = "".join(chart.svg() for chart in charts)
    caption = "A loss that falls on training sites and rises on test sites indicates overfitting."
    return figure("curves", f'<div class="row">{drawn}</div>', caption, columns)


def training_charts(metrics: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[Chart]]:
    """Draw loss, accuracy and learning rate by epoch; return their data and the charts."""
    rows = pd.DataFrame(metrics)
    names = {
        "loss": "loss (cross-entropy, nats)",
        "accuracy": "accuracy",
        "learning_rate": "learning rate",
    }
    names = {key: name for key, name in names.items() if key in rows and rows[key].notna().any()}
    if not names:
        return rows, []
    columns = rows[["epoch", *(["split"] if "split" in rows else []), *names]]
    # Metrics without a column `split` come from the training set.
    columns = columns.assign(split=columns.get("split", "train"))
    return columns, [_curve(columns, key, name) for key, name in names.items()]


def _curve(rows: pd.DataFrame, key: str, name: str) -> Chart:
    present = rows[rows[key].notna()]
    # A maximum of 0 gives an axis from 0 to 1.
    top, last = float(present[key].max()) * 1.05 or 1.0, int(present["epoch"].max())
    ends = ", ".join(
        f"{split} ends at {part[key].iloc[-1]:.3g}" for split, part in present.groupby("split")
    )
    chart = Chart(
        (min(1, last), max(last, 2)),
        (0, top),
        name,
        f"{name} over {last} epochs: {ends}",
        "epoch",
        width=400,
    )
    chart.grid([tick for tick in ticks(1, last, 6) if tick == int(tick)], ticks(0, top, 5))
    for split in ("train",) if key == "learning_rate" else ("train", "test"):
        line = present[present["split"] == split]
        epochs, values = line["epoch"].tolist(), line[key].tolist()
        css = "other" if key == "learning_rate" else split
        if len(line) > 1:
            chart.line(epochs, values, css)
        tips = [
            f"{split}, epoch {epoch}: {value:.4g}"
            for epoch, value in zip(epochs, values, strict=True)
        ]
        chart.dots(epochs, values, css, tips, 2.5 if len(line) > 40 else 3)
    if key == "loss":
        chart.legend([("training sites", "train"), ("test sites", "test")])
    return chart


def calibration(test: TestPredictions, evaluation: EvaluationResult | None) -> str:
    """Return the reliability diagram and the accuracy of confident predictions as HTML."""
    bins, error = confidence_bins(test)
    fraction, reached = coverage(test)
    covered = pd.DataFrame({"fraction": fraction, "accuracy": reached})
    reliability, curve = calibration_charts(test)
    first = figure(
        "calibration",
        reliability.svg(),
        "Points above the dashed line: the model is underconfident; below: overconfident. "
        f"Calibration error {error:.3f}. Bars: number of sites.",
        bins,
    )
    second = figure(
        "coverage",
        curve.svg(),
        "Accuracy of the most confident predictions, by the fraction of sites that is included.",
        covered,
    )
    text = ""
    if evaluation is not None:
        confidence_of_model = evaluation.confidence[evaluation.model_names[0]]
        text = f"<p>{html_text(describe_calibration(confidence_of_model))}</p>"
        if evaluation.prediction_sets is not None:
            sentences = " ".join(describe_sets(evaluation.prediction_sets))
            text += f"<p>{html_text(sentences)}</p>"
    return f'{text}<div class="row">{first}{second}</div>'


def calibration_charts(test: TestPredictions) -> tuple[Chart, Chart]:
    """Draw the reliability diagram, and the accuracy of confident predictions."""
    fraction, reached = coverage(test)
    covered = pd.DataFrame({"fraction": fraction, "accuracy": reached})
    return _reliability(*confidence_bins(test)), _coverage(covered)


def confidence_bins(test: TestPredictions) -> tuple[pd.DataFrame, float]:
    """Return confidence, accuracy and sites of each bin, and the calibration error."""
    columns = zip(
        ("confidence", "accuracy", "sites"),
        bins_of_confidence(test.labels, test.probabilities),
        strict=True,
    )
    error = calibration_error(test.labels, test.probabilities)
    return pd.DataFrame(dict(columns)), error


def coverage(test: TestPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Return fractions of the sites, most confident first, and the accuracy of each (100 steps)."""
    accuracy = confident_accuracies(test.labels, test.probabilities)
    n = len(accuracy)
    # The accuracy of fewer than five sites is too noisy for a curve. The half is always a point.
    steps = np.unique([half_of(n), *np.linspace(min(5, n), n, 100).astype(int)])
    return steps / n, accuracy[steps - 1]


def _reliability(bins: pd.DataFrame, error: float) -> Chart:
    chart = Chart(
        (0, 1),
        (0, 1),
        "accuracy by confidence",
        f"Calibration of test sites, mean error {error:.3f}",
        "confidence (probability of the predicted class)",
        width=400,
        height=320,
    )
    chart.grid(ticks(0, 1, 5), ticks(0, 1, 5))
    most = bins["sites"].max()
    for row in bins.itertuples():
        # Left edge of the bin that contains this mean confidence.
        left = min(int(row.confidence * BINS), BINS - 1) / BINS
        # The highest bar takes 22 % of the height, so that bars hide little of the curve.
        chart.bar(left, left + 1 / BINS, 0.22 * row.sites / most, f"{row.sites} sites")
    chart.line([0, 1], [0, 1], "dashed", 1)
    confidence, accuracy = bins["confidence"].tolist(), bins["accuracy"].tolist()
    chart.line(confidence, accuracy, "test")
    tips = [
        f"confidence {row.confidence:.2f}, accuracy {row.accuracy:.2f} ({row.sites} sites)"
        for row in bins.itertuples()
    ]
    chart.dots(confidence, accuracy, "test", tips, 4)
    return chart


def _coverage(covered: pd.DataFrame) -> Chart:
    def point(fraction: float) -> pd.Series:
        """Last point up to a fraction, or the first one."""
        return covered.iloc[max(int((covered["fraction"] <= fraction).sum()) - 1, 0)]

    total, half = point(1.0)["accuracy"], point(0.5)["accuracy"]
    chart = Chart(
        (0, 1),
        (0, 1),
        "accuracy of the most confident sites",
        f"Accuracy {total:.2f} of all sites, {half:.2f} of the more confident half",
        "fraction of sites, most confident first",
        width=400,
        height=320,
    )
    chart.grid(ticks(0, 1, 5), ticks(0, 1, 5))
    chart.line(covered["fraction"].tolist(), covered["accuracy"].tolist(), "test")
    marks = pd.DataFrame([point(fraction) for fraction in (0.25, 0.5, 1.0)]).drop_duplicates()
    tips = [
        f"most confident {row.fraction:.0%}: accuracy {row.accuracy:.3f}"
        for row in marks.itertuples()
    ]
    chart.dots(marks["fraction"].tolist(), marks["accuracy"].tolist(), "test", tips, 4)
    return chart
