"""Runs beside each other, and the models of `perturbjax classify`: one page that compares them and leads to theirs."""

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
from perturbjax.evaluation.conclusions import short_verdict
from perturbjax.evaluation.evaluation_result import EvaluationResult, ModelScores
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import CLASS, Section, figure, page, table
from perturbjax.report.run_page import REPORT, write_report
from perturbjax.report.run_results import Evidence, read_evidence
from perturbjax.report.svg import Chart, ticks

_BEWARE = (
    '<p class="warning">A higher score may only mean easier sites; <code>--split-file</code> trains on a given '
    "split.</p>"
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
    """The report of one run, or the page of several; what was written.

    A folder that `perturbjax classify` wrote stands for all of its models. Of several, each gets its own report too.

    Args:
        out: of the page of several runs. Those of one `classify` are compared in its own folder.

    Raises:
        InputError: a folder holds no run that was evaluated, or two have one name.
    """
    models = [model for run in runs for model in models_of(run)]
    if len(models) == 1:
        return write_report(models[0])
    if len(runs) == 1:
        out = Path(runs[0]) / REPORT
    found = {name: read_evidence(model) for name, model in zip(_names(models), models, strict=True)}
    for name, one in found.items():
        if one.evaluation is None:
            raise InputError(
                f"{models[list(found).index(name)]}: was not evaluated; run `perturbjax evaluate` first"
            )
    reports = [write_report(model) for model in models]
    links = [Path(os.path.relpath(report, out.parent)).as_posix() for report in reports]
    with atomic(out) as temporary:
        temporary.write_text(index_page(found, links), encoding="utf-8")
    return out


def models_of(run: Path) -> list[Path]:
    """The run itself, or the folders of the models that `classify` judged in it."""
    return sorted(file.parent for file in (Path(run) / EVALUATION).glob("*/scores.json")) or [
        Path(run)
    ]


def _names(models: Sequence[Path]) -> list[str]:
    """As few of the last parts of their paths as tell them apart.

    Raises:
        InputError: one is named twice.
    """
    paths = [model.resolve() for model in models]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path.name}: is named twice; give each run once")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [
            "/".join(part for part in path.parts[-parts:] if part != EVALUATION) for path in paths
        ]
        if len(set(names)) == len(names):
            return names
    return [path.name for path in paths]


def index_page(found: dict[str, Evidence], links: Sequence[str]) -> str:
    """The page of several runs, by their names."""
    judged = {name: one.evaluation for name, one in found.items() if one.evaluation is not None}
    order = sorted(judged, key=lambda name: -_subject(judged[name]).scores[HEADLINE].value)
    best = order[0]
    one = _subject(judged[best]).scores[HEADLINE]
    same, words = _same_sites(found), METRICS[HEADLINE].words
    first = "the best is" if same else f"not judged on the same sites, the highest {words} is of"
    reached = f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f}) by site"
    told = f"Of {len(found)} {first} {html_text(best)}: {f'{words} ' if same else ''}{reached}."
    lead = f'<p class="verdict">{told}</p>{"" if same else _BEWARE}'
    sections = [
        Section("runs", "Runs", _ranking(judged, order, dict(zip(found, links, strict=True)))),
        Section("scores", "Scores", _whiskers(judged, order)),
        Section("differences", "What differs", _differences(found)),
        Section("classes", "Recall by class", _classes(found)),
    ]
    return page("perturbjax: runs side by side", lead, sections)


def _subject(evaluation: EvaluationResult, level: str = "site") -> ModelScores:
    return evaluation[level][evaluation.model_names[0]]


def _same_sites(found: dict[str, Evidence]) -> bool:
    """Whether all were judged on the same sites: else their scores do not compare."""
    sites = {
        frozenset(one.answers.table["site_id"].astype(str))
        if one.answers is not None
        else frozenset()
        for one in found.values()
    }
    return len(sites) == 1 and frozenset() not in sites


def _ranking(
    judged: dict[str, EvaluationResult], order: Sequence[str], links: dict[str, str]
) -> str:
    rows = []
    for name in order:
        evaluation = judged[name]
        last = evaluation.displayed_levels[-1]
        row: dict[str, Any] = {
            "run": name,
            "split": evaluation.split_name,
            "sites": evaluation.n.site,
        }
        for shown in evaluation.displayed_levels:
            value = shown[evaluation.model_names[0]].scores[HEADLINE]
            row[f"{METRICS[HEADLINE].words} {shown.words}"] = value.value
        others = [metric for metric in evaluation.metrics if metric != HEADLINE]
        scores = _subject(evaluation).scores
        row |= {
            METRICS[metric].words: scores[metric].value for metric in others if metric in scores
        }
        row[f"best baseline {last.words}"] = (
            f"{last.best_baseline.name} {last.best_baseline.scores[HEADLINE].value:.3f}"
        )
        row["verdict"] = short_verdict(evaluation)
        rows.append(row)
    meanings = MEANINGS | {
        "verdict": "Whether it clearly beats every baseline, by well where wells hold several sites."
    }
    return table(
        "runs-table",
        pd.DataFrame(rows),
        meanings=meanings,
        links=[links[name] for name in order],
        rows="runs",
    )


def _whiskers(judged: dict[str, EvaluationResult], order: Sequence[str]) -> str:
    rows = [(name, _subject(judged[name]).scores[HEADLINE], "train") for name in order]
    rows += [
        (f"{baseline.name} ({order[0]})", baseline.scores[HEADLINE], "other")
        for baseline in judged[order[0]]["site"].rows
        if baseline.baseline
    ]
    high = max(one.high for _, one, _ in rows)
    words = METRICS[HEADLINE].words
    left = 14 + 7 * min(38, max(len(name) for name, _, _ in rows))
    chart = Chart(
        (0, high * 1.04), (len(rows) - 0.5, -0.5), f"{words} by site",
        f"{words} by site: " + "; ".join(f"{name} {one.value:.3f}" for name, one, _ in rows),
        width=left + 400, height=64 + 22 * len(rows), left=left, bottom=34,
    )  # fmt: skip
    chart.grid(ticks(0, high, 6), ())
    for at, (name, one, css) in enumerate(rows):
        chart.text(
            left - 6, chart.at(0, at)[1] + 4, name if len(name) < 38 else name[:36] + "…", "end"
        )
        chart.line([one.low, one.high], [at, at], css)
        chart.dots(
            [one.value], [at], css, [f"{name}: {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"]
        )
    values = pd.DataFrame([(name, one.value, one.low, one.high) for name, one, _ in rows],
                          columns=["run", words, "low", "high"])  # fmt: skip
    return figure(
        "comparison",
        chart.svg(),
        "Bars are 95 % intervals; baselines (grey) are those of the best run.",
        values,
    )


def _differences(found: dict[str, Evidence]) -> str:
    """Settings and facts that are not the same in all."""
    flat = {name: dict(_flat(one.config)) for name, one in found.items() if one.config}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [
        {"setting": key, **{name: flat[name].get(key, "") for name in flat}}
        for key in keys
        if len({values.get(key) for values in flat.values()}) > 1
    ]
    return table("differences-table", pd.DataFrame(rows), rows="settings") if rows else ""


def _flat(config: dict[str, Any]) -> list[tuple[str, str]]:
    entries = [
        (f"{section}.{key}".rstrip("."), str(value))
        for section, values in (config.get("recipe") or {}).items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    facts = config.get("facts", {})
    return entries + [
        (key, str(facts[key])[:16]) for key in ("label_column", "split_fingerprint") if key in facts
    ]


def _classes(found: dict[str, Evidence]) -> str:
    tables = {
        name: one.csv("per_class.csv", "precision", "recall", "f1") for name, one in found.items()
    }
    recalls = {
        name: of.set_index("class")["recall"] for name, of in tables.items() if of is not None
    }
    if not recalls:
        return ""
    shown = pd.DataFrame(recalls).rename_axis(CLASS).reset_index()
    return table("recall-table", shown, rows="classes")
