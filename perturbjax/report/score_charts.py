"""Scores beside baselines, curves of training, calibration and coverage, as drawings with their data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.messages import html_text
from perturbjax.evaluation.baselines import BASELINES
from perturbjax.evaluation.evaluation_result import (
    EvaluationResult,
    describe_calibration,
    format_estimate,
)
from perturbjax.evaluation.score_tables import long_scores_table
from perturbjax.evaluation.scores import METRICS
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import figure, table
from perturbjax.report.run_results import Answers
from perturbjax.report.svg import Chart, ticks

_LEVEL = {"site": "train", "treated": "other", "well": "test"}
_BINS = 10


def scores(evaluation: EvaluationResult) -> str:
    """A panel a metric, and the numbers as tables."""
    drawing = "".join(_panel(evaluation, metric) for metric in evaluation.metrics)
    resampled = f"{evaluation.replicates} resamples of whole {evaluation.resample}s"
    drawn = figure(
        "scores",
        f'<div class="row">{drawing}</div>',
        f"Bars are 95 % intervals from {resampled}.",
        long_scores_table(evaluation),
    )
    return (
        drawn
        + "".join(
            _table(evaluation, name)
            for name in (level.name for level in evaluation.displayed_levels)
        )
        + _notes(evaluation)
    )


def _panel(evaluation: EvaluationResult, metric: str) -> str:
    rows, levels, what = evaluation.levels[0].rows, evaluation.displayed_levels, METRICS[metric]
    known = [row.scores[metric] for level in levels for row in level.rows if metric in row.scores]
    low, high = min(0.0, *(one.low for one in known)), max(max(one.high for one in known), 1e-3)
    said = "; ".join(
        f"{row.name} {row.scores[metric].value:.3f}"
        for row in levels[0].rows
        if metric in row.scores
    )
    chart = Chart(
        (low, high * 1.04), (len(rows) - 0.5, -0.5), what.words, f"{what.words} {levels[0].words}: {said}",
        width=390, height=64 + 26 * len(rows), left=110, bottom=34,
    )  # fmt: skip
    chart.grid(ticks(low, high, 5), ())
    for at, row in enumerate(rows):
        _, py = chart.at(0, at)
        chart.text(104, py + 4, row.name, "end", "" if row.baseline else "strong")
    for order, level in enumerate(levels):
        offset = 0.3 * (order - (len(levels) - 1) / 2)
        for at, row in enumerate(level.rows):
            if (one := row.scores.get(metric)) is None:
                continue
            chart.line([one.low, one.high], [at + offset] * 2, _LEVEL[level.name])
            tip = f"{row.name} {level.words}: {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
            chart.dots([one.value], [at + offset], _LEVEL[level.name], [tip])
    if len(levels) > 1:
        for order, level in enumerate(levels):
            px = chart.width - 20 - 74 * (len(levels) - 1 - order)
            chart.entry(px, 10, level.words, _LEVEL[level.name])
    return chart.svg()


def _table(evaluation: EvaluationResult, name: str) -> str:
    level = evaluation[name]
    rows = []
    for row in level.rows:
        entry: dict[str, Any] = {f"{level.words} (n = {level.n})": row.name}
        for metric in evaluation.metrics:
            one = row.scores.get(metric)
            entry[METRICS[metric].words] = format_estimate(one) if one else ""
        rows.append(entry)
    if name == "site":
        for subject, train in evaluation.train.items():
            own = {
                METRICS[m].words: f"{train[m]:.3f}"
                for m in evaluation.metrics
                if np.isfinite(train.get(m, np.nan))
            }
            rows.append({f"{level.words} (n = {level.n})": f"{subject}, on training sites", **own})
    shown = pd.DataFrame(rows).fillna("")
    strong = [not row.baseline for row in level.rows] + [False] * (len(shown) - len(level.rows))
    return table(f"scores-{name}", shown, meanings=MEANINGS, strong=strong)


def _notes(evaluation: EvaluationResult) -> str:
    there = {row.name for row in evaluation.levels[0].rows}
    words = " ".join(
        f"{name}: {baseline.words}." for name, baseline in BASELINES.items() if name in there
    )
    skipped = "".join(
        f" No {html_text(name)}: {html_text(why)}." for name, why in evaluation.skipped.items()
    )
    return (
        "<p class=\"note\">A well's prediction is the mean of its sites' probabilities. Baselines: "
        f"{html_text(words)}{skipped}</p>"
    )


def training(metrics: list[dict[str, Any]]) -> str:
    """Loss and accuracy against the epoch, and the learning rate behind them; empty where nothing was kept."""
    rows = pd.DataFrame(metrics)
    names = {
        "loss": "loss (cross-entropy, nats)",
        "accuracy": "accuracy",
        "learning_rate": "learning rate",
    }
    names = {key: words for key, words in names.items() if key in rows and rows[key].notna().any()}
    if not names:
        return ""
    kept = rows[["epoch", *(["split"] if "split" in rows else []), *names]]
    kept = kept.assign(split=kept.get("split", "train"))
    drawing = "".join(_curve(kept, key, words) for key, words in names.items())
    caption = "Loss falling on training sites while it rises on held-out ones is learning by heart."
    return figure("curves", f'<div class="row">{drawing}</div>', caption, kept)


def _curve(rows: pd.DataFrame, key: str, words: str) -> str:
    known = rows[rows[key].notna()]
    top = float(known[key].max()) * 1.05 or 1.0
    last = int(known["epoch"].max())
    ends = ", ".join(
        f"{part} ends at {part_rows[key].iloc[-1]:.3g}"
        for part, part_rows in known.groupby("split")
    )
    chart = Chart(
        (min(1, last), max(last, 2)),
        (0, top),
        words,
        f"{words} over {last} epochs: {ends}",
        "epoch",
        width=400,
    )
    chart.grid([tick for tick in ticks(1, last, 6) if tick == int(tick)], ticks(0, top, 5))
    for part in ("train",) if key == "learning_rate" else ("train", "test"):
        line = known[known["split"] == part]
        css = "other" if key == "learning_rate" else part
        if len(line) > 1:
            chart.line(line["epoch"].tolist(), line[key].tolist(), css)
        tips = [
            f"{part}, epoch {epoch}: {value:.4g}"
            for epoch, value in zip(line["epoch"], line[key], strict=True)
        ]
        chart.dots(
            line["epoch"].tolist(), line[key].tolist(), css, tips, 2.5 if len(line) > 40 else 3
        )
    if key == "loss":
        chart.key([("training sites", "train"), ("held-out sites", "test")])
    return chart.svg()


def calibration(answers: Answers, evaluation: EvaluationResult | None) -> str:
    """How sure it says it is and how often it is right, before and after one temperature; and what is left when unsure
    answers are dropped."""
    edges = np.linspace(0, 1, _BINS + 1)
    where = np.clip(np.digitize(answers.confidence, edges) - 1, 0, _BINS - 1)
    sites = np.bincount(where, minlength=_BINS)
    filled = sites > 0
    stated = np.bincount(where, answers.confidence, _BINS)[filled] / sites[filled]
    reached = np.bincount(where, answers.right, _BINS)[filled] / sites[filled]
    error = float((np.abs(stated - reached) * sites[filled]).sum() / len(where))
    bins = pd.DataFrame({"stated": stated, "right": reached, "sites": sites[filled]})
    share, right = coverage(answers)
    kept = pd.DataFrame({"answered": share, "right": right})
    first = figure(
        "calibration",
        _reliability(bins, error),
        f"Above the dashed line it knows more than it says, below less. Mean distance (calibration error) {error:.3f}. "
        "Bars: how many sites.",
        bins,
    )
    second = figure(
        "coverage",
        _coverage(kept),
        "Accuracy of the answers that it is surest of, as fewer are asked for.",
        kept,
    )
    told = (
        ""
        if evaluation is None
        else f"<p>{html_text(describe_calibration(evaluation.confidence[evaluation.model_names[0]]))}</p>"
    )
    return f'{told}<div class="row">{first}{second}</div>'


def coverage(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Share of the sites that are answered, surest first, and the share of those that is right; at most 100 steps."""
    order = np.argsort(-answers.confidence, kind="stable")
    right = np.cumsum(answers.right[order]) / np.arange(1, len(order) + 1)
    steps = np.unique(np.linspace(min(5, len(order)), len(order), 100).astype(int)) - 1
    return (steps + 1) / len(order), right[steps]


def _reliability(bins: pd.DataFrame, error: float) -> str:
    chart = Chart(
        (0, 1), (0, 1), "share right, by how sure it is", f"Calibration of held-out sites, mean error {error:.3f}",
        "confidence (probability of the predicted class)", width=400, height=320,
    )  # fmt: skip
    chart.grid(ticks(0, 1, 5), ticks(0, 1, 5))
    most = bins["sites"].max()
    for row in bins.itertuples():
        at = min(int(row.stated * _BINS), _BINS - 1) / _BINS
        chart.bar(at, at + 1 / _BINS, 0.22 * row.sites / most, f"{row.sites} sites")
    chart.line([0, 1], [0, 1], "dashed", 1)
    chart.line(bins["stated"].tolist(), bins["right"].tolist(), "test")
    tips = [
        f"says {row.stated:.2f}, is right {row.right:.2f} ({row.sites} sites)"
        for row in bins.itertuples()
    ]
    chart.dots(bins["stated"].tolist(), bins["right"].tolist(), "test", tips, 4)
    return chart.svg()


def _coverage(kept: pd.DataFrame) -> str:
    half = float(np.interp(0.5, kept["answered"], kept["right"]))
    chart = Chart(
        (0, 1), (0, 1), "share right, if only the surest are answered",
        f"Accuracy {kept['right'].iloc[-1]:.2f} of all sites, {half:.2f} of the surer half",
        "share of sites answered, surest first", width=400, height=320,
    )  # fmt: skip
    chart.grid(ticks(0, 1, 5), ticks(0, 1, 5))
    chart.line(kept["answered"].tolist(), kept["right"].tolist(), "test")
    ends = [at for at in (0.25, 0.5, 1.0) if at >= kept["answered"].iloc[0]]
    values = [float(np.interp(at, kept["answered"], kept["right"])) for at in ends]
    chart.dots(
        ends,
        values,
        "test",
        [f"surest {at:.0%}: {value:.3f} right" for at, value in zip(ends, values, strict=True)],
        4,
    )
    return chart.svg()
