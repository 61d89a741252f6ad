"""The page that compares several runs, or the classifiers of `perturbjax classify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text
from perturbjax.core.options import positional, require_output, require_sound
from perturbjax.evaluation.apply import EVALUATION
from perturbjax.evaluation.conclusions import verdict
from perturbjax.evaluation.evaluation_result import EvaluationResult, ModelScores
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import CLASS, Section, figure, page, table
from perturbjax.report.run_page import REPORT, write_report
from perturbjax.report.run_results import RunResults, read_run_results
from perturbjax.report.svg import Chart, ticks

_CAUTION = (
    '<p class="warning">The runs were not evaluated on the same sites: a higher score may '
    "only mean easier sites. <code>--split-file</code> trains several runs on one split.</p>"
)


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html."""

    runs: tuple[Path, ...] = positional()
    """Evaluated runs, or folders from `perturbjax classify`; several are compared."""
    out: Path = Path("report.html")
    """Page that compares several runs; the page of one run is written into its folder."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".html")
        if not self.runs:
            raise InputError("report: no run given. Pass one or more run directories.")


def write_reports(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of one run, or the reports of several runs and the page that compares them.

    Args:
        runs: run directories, or folders of `perturbjax classify`, which stand for their
            classifiers.
        out: page that compares several runs; the classifiers of one folder are compared there.

    Returns:
        Path of the report or of the comparison.

    Raises:
        InputError: a folder has no evaluated run, or two runs have one name.
    """
    models = [model for run in runs for model in models_of(run)]
    if len(models) == 1:
        return write_report(models[0])
    if len(runs) == 1:
        # The comparison of the classifiers of one folder is the report of that folder.
        out = Path(runs[0]) / REPORT
    names = _short_names(models)
    results = {name: read_run_results(m) for name, m in zip(names, models, strict=True)}
    for name, model in zip(names, models, strict=True):
        if results[name].evaluation is None:
            raise InputError(f"{model}: was not evaluated. Run `perturbjax evaluate` first.")
    reports = [write_report(model) for model in models]
    # Relative links remain valid if the whole folder is moved.
    links = [Path(os.path.relpath(report, out.parent)).as_posix() for report in reports]
    with atomic(out) as temporary:
        temporary.write_text(comparison_page(results, links), encoding="utf-8")
    return out


def models_of(run: Path) -> list[Path]:
    """Return the run, or the folders of its classifiers if `classify` wrote it."""
    files = (Path(run) / EVALUATION).glob("*/scores.json")
    return sorted(file.parent for file in files) or [Path(run)]


def _short_names(models: Sequence[Path]) -> list[str]:
    """As few trailing parts of the paths as distinguish them.

    Raises:
        InputError: a path occurs twice.
    """
    paths = [model.resolve() for model in models]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path.name}: is given twice. Pass each run once.")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [
            "/".join(part for part in path.parts[-parts:] if part != EVALUATION) for path in paths
        ]
        if len(set(names)) == len(names):
            return names
    return [path.name for path in paths]


def comparison_page(results: dict[str, RunResults], links: Sequence[str]) -> str:
    """Return the page as HTML.

    Args:
        results: results by the name of the run.
        links: addresses of the reports.
    """
    evaluations = {
        name: one.evaluation for name, one in results.items() if one.evaluation is not None
    }
    order = sorted(evaluations, key=lambda name: -_scores(evaluations[name]).scores[HEADLINE].value)
    best, words = order[0], METRICS[HEADLINE].words
    score = _scores(evaluations[best]).scores[HEADLINE]
    headline = (
        f"Highest {words} of {len(results)} runs: {html_text(best)} with {score.value:.2f} "
        f"({score.low:.2f} to {score.high:.2f}) by site."
    )
    caution = "" if _have_same_sites(results) else _CAUTION
    report_links = dict(zip(results, links, strict=True))
    sections = [
        Section("runs", "Runs", _ranking(evaluations, order, report_links)),
        Section("scores", "Scores", _intervals(evaluations, order)),
        Section("differences", "Different settings", _differences(results)),
        Section("classes", "Recall by class", _classes(results)),
    ]
    lead = f'<p class="verdict">{headline}</p>{caution}'
    return page("perturbjax: comparison of runs", lead, sections)


def _scores(evaluation: EvaluationResult) -> ModelScores:
    """Scores of the only model at site level."""
    return evaluation["site"][evaluation.model_names[0]]


def _have_same_sites(results: dict[str, RunResults]) -> bool:
    sites = {
        frozenset(one.test.table["site_id"].astype(str)) if one.test is not None else frozenset()
        for one in results.values()
    }
    # An empty set means that a run has no predictions, so its sites are unknown.
    return len(sites) == 1 and frozenset() not in sites


def _ranking(
    evaluations: dict[str, EvaluationResult], order: Sequence[str], links: dict[str, str]
) -> str:
    """Table of runs with their scores and the conclusion."""
    rows = []
    for name in order:
        evaluation = evaluations[name]
        levels = evaluation.displayed_levels
        row: dict[str, Any] = {
            "run": name,
            "split": evaluation.split_name,
            "sites": evaluation.n.site,
        }
        for level in levels:
            score = level[evaluation.model_names[0]].scores[HEADLINE]
            row[f"{METRICS[HEADLINE].words} {level.words}"] = score.value
        scores = _scores(evaluation).scores
        for metric in evaluation.metrics:
            if metric != HEADLINE and metric in scores:
                row[METRICS[metric].words] = scores[metric].value
        best = levels[-1].best_baseline
        row[f"best baseline {levels[-1].words}"] = f"{best.name} {best.scores[HEADLINE].value:.3f}"
        row["conclusion"] = verdict(evaluation)
        rows.append(row)
    meaning = (
        "Whether the score clearly exceeds every baseline; by well if wells have several sites."
    )
    return table(
        "runs-table",
        pd.DataFrame(rows),
        meanings=MEANINGS | {"conclusion": meaning},
        links=[links[name] for name in order],
        rows="runs",
    )


def _intervals(evaluations: dict[str, EvaluationResult], order: Sequence[str]) -> str:
    """Chart of the headline score of every run and of the baselines of the best run."""
    rows = [(name, _scores(evaluations[name]).scores[HEADLINE], "train") for name in order]
    rows += [
        (f"{row.name} ({order[0]})", row.scores[HEADLINE], "other")
        for row in evaluations[order[0]]["site"].rows
        if row.baseline
    ]
    high, words = max(score.high for _, score, _ in rows), METRICS[HEADLINE].words
    # About 7 pixels per character of the longest label.
    left = 14 + 7 * min(38, max(len(name) for name, _, _ in rows))
    chart = Chart(
        (0, high * 1.04),
        (len(rows) - 0.5, -0.5),
        f"{words} by site",
        f"{words} by site: " + "; ".join(f"{name} {score.value:.3f}" for name, score, _ in rows),
        width=left + 400,
        height=64 + 22 * len(rows),
        left=left,
        bottom=34,
    )
    chart.grid(ticks(0, high, 6), ())
    for number, (name, score, css) in enumerate(rows):
        label = name if len(name) < 38 else name[:36] + "…"
        chart.text(left - 6, chart.pixel(0, number)[1] + 4, label, "end")
        chart.line([score.low, score.high], [number, number], css)
        tip = f"{name}: {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
        chart.dots([score.value], [number], css, [tip])
    values = pd.DataFrame(
        [(name, score.value, score.low, score.high) for name, score, _ in rows],
        columns=["run", words, "low", "high"],
    )
    caption = "Bars are 95 % intervals. Gray: baselines of the best run."
    return figure("comparison", chart.svg(), caption, values)


def _differences(results: dict[str, RunResults]) -> str:
    """Table of settings that differ between the runs."""
    settings = {name: dict(_settings(one.config)) for name, one in results.items() if one.config}
    # dict.fromkeys removes duplicates and preserves the order.
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    rows = [
        {"setting": key, **{name: settings[name].get(key, "") for name in settings}}
        for key in keys
        if len({values.get(key) for values in settings.values()}) > 1
    ]
    return table("differences-table", pd.DataFrame(rows), rows="settings") if rows else ""


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    entries = [
        # Settings outside of sections, such as the seed, have no key after the dot.
        (f"{section}.{key}".rstrip("."), str(value))
        for section, values in (config.get("recipe") or {}).items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    facts = config.get("facts", {})
    names = [name for name in ("label_column", "split_fingerprint") if name in facts]
    return entries + [(name, str(facts[name])[:16]) for name in names]


def _classes(results: dict[str, RunResults]) -> str:
    """Table of the recall of every class in every run."""
    tables = {name: one.csv("per_class.csv") for name, one in results.items()}
    recalls = {
        name: rows.set_index("class")["recall"] for name, rows in tables.items() if rows is not None
    }
    if not recalls:
        return ""
    rows = pd.DataFrame(recalls).rename_axis(CLASS).reset_index()
    return table("recall-table", rows, rows="classes")
