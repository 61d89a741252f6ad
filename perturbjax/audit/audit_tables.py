"""Audit results on the terminal, and as JSON and CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.audit.audit_result import OTHER_SPLIT, AuditResult
from perturbjax.audit.verdict import Verdict, format_p, verdict
from perturbjax.core.files import write_csv, write_json
from perturbjax.core.messages import PlainConsole
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS


def print_audit(audit: AuditResult) -> None:
    """Print all splits next to each other, the verdict, and reasons for missing parts."""
    from rich import box
    from rich.table import Table

    console, conclusion = PlainConsole(soft_wrap=False), verdict(audit)
    console.print(
        f"{audit.source}: {audit.label} by {audit.model}, {METRICS[HEADLINE].words} {audit.words}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", *(split.policy for split in audit.splits)):
        table.add_column(title, justify="right" if title else "left", no_wrap=not title)
    # A score with interval takes 22 columns. In a narrow terminal the interval is on a second
    # line.
    gap = " " if console.width >= 24 + 22 * len(audit.splits) else "\n"
    for name, cells in table_rows(audit, gap):
        own = name == audit.model
        table.add_row(name, *cells, style="bold" if own else "", end_section=own)
    console.print(table)
    first = audit.splits[0].evaluation
    console.print(
        f"In brackets: 95 % intervals from {first.replicates} resamples of whole "
        f"{first.resample}s. p: permutation of the labels of wells within plates."
    )
    for sentence in (conclusion.headline, *conclusion.sentences):
        console.print(sentence, style="bold")
    for line in (*missing_parts(audit), *conclusion.advice):
        console.print(line)


def table_rows(audit: AuditResult, gap: str = " ") -> Iterator[tuple[str, list[str]]]:
    """Yield name and cells (one per split) of the model, each control, and further numbers."""
    splits = audit.splits
    yield audit.model, [format_estimate(split.score, gap) for split in splits]
    for name in dict.fromkeys(name for split in splits for name in split.controls):
        yield name, [format_estimate(split.controls.get(name), gap) for split in splits]
    leads = [split.model.leads[split.best_control][HEADLINE] for split in splits]
    yield "best control", [split.best_control for split in splits]
    yield "lead over it", [format_estimate(lead, gap) for lead in leads]
    p_values = ["" if split.p is None else format_p(split.p) for split in splits]
    yield "p", [p.removeprefix("= ") for p in p_values]
    confidences = [split.confidence for split in splits]
    yield "calibration error", [f"{one.error:.3f}" for one in confidences]
    yield (
        "… with temperature",
        [f"{one.scaled_error:.3f}{gap}(T = {one.temperature:.2f})" for one in confidences],
    )
    # Confidence refers to sites.
    accuracies = [
        split.evaluation["site"][split.model.name].scores["accuracy"].value for split in splits
    ]
    yield (
        "accuracy, confident half",
        [
            f"{one.half_accuracy:.3f}{gap}(all {accuracy:.3f})"
            for one, accuracy in zip(confidences, accuracies, strict=True)
        ],
    )
    for unit in ("site", "well", "plate"):
        yield f"test {unit}s", [str(getattr(split.evaluation.n, unit)) for split in splits]


def missing_parts(audit: AuditResult) -> Iterator[str]:
    """Yield the reason for each missing split, p-value, control and well position."""
    others = [policy for policy, why in audit.refused.items() if why == OTHER_SPLIT]
    if others:
        yield (
            f"info: the network was trained on one split. To audit it under {', '.join(others)}: "
            f"perturbjax audit --run {audit.source} --train --out DIR"
        )
    for policy, why in audit.refused.items():
        if policy not in others:
            yield f"info: no {policy} split: {why}."
    for split in audit.splits:
        if split.no_p:
            yield f"info: no p-value for the {split.policy} split: {split.no_p}."
    skipped = {item for split in audit.splits for item in split.evaluation.skipped.items()}
    for name, why in sorted(skipped):
        if all(name not in split.controls for split in audit.splits):
            yield f"info: no control {name}: {why}."
    wells = sorted({well for split in audit.splits for well in split.evaluation.unplaced_wells})
    if wells:
        yield (
            f"info: excluded from the position-only control: {', '.join(wells)} (well name "
            "without a position)."
        )


def write_tables(audit: AuditResult, out: Path) -> None:
    """Write `audit.json`, and `audit.csv` with one number per row."""
    write_json(out / "audit.json", as_json(audit, verdict(audit)))
    write_csv(out / "audit.csv", long_scores_table(audit))


def as_json(audit: AuditResult, conclusion: Verdict) -> dict[str, Any]:
    """Convert to plain values: verdict, and for each split scores, leads, p, overlap and sizes."""
    splits = {}
    for split in audit.splits:
        evaluation = split.evaluation
        splits[split.policy] = {
            "p": split.p,
            "no_p": split.no_p,
            "unanswerable": split.n_excluded,
            "leaks": split.leaks,
            "confidence": dataclasses.asdict(split.confidence),
            "n": dataclasses.asdict(evaluation.n),
            "overlap": dataclasses.asdict(evaluation.overlap),
            "skipped": evaluation.skipped,
            "unplaced_wells": evaluation.unplaced_wells,
            "levels": {
                level.name: {
                    row.name: {
                        key: value
                        for key, value in dataclasses.asdict(row).items()
                        if key in ("scores", "leads")
                    }
                    for row in level.rows
                }
                for level in evaluation.levels
            },
        }
    return {
        "what": audit.source,
        "label": audit.label,
        "model": audit.model,
        "verdict": {
            "finding": conclusion.finding,
            "honest": conclusion.is_valid,
            "leaky": conclusion.has_leak,
            "headline": conclusion.headline,
            "sentences": conclusion.sentences,
            "advice": conclusion.advice,
        },
        "splits": splits,
        "differences": [dataclasses.asdict(one) for one in audit.differences],
        "refused": audit.refused,
    }


def long_scores_table(audit: AuditResult) -> pd.DataFrame:
    """Scores in long format: split, level, model, metric, value, low, high, n.

    The model of a lead is `model minus control`; the split of a difference is `split minus split`.
    """
    rows: list[tuple] = []
    for split in audit.splits:
        for level in split.evaluation.levels:
            for row in level.rows:
                leads = {f"{row.name} minus {name}": lead for name, lead in row.leads.items()}
                rows += [
                    (split.policy, level.name, name, metric, *dataclasses.astuple(one), level.n)
                    for name, scores in ({row.name: row.scores} | leads).items()
                    for metric, one in scores.items()
                ]
    for pair in audit.differences:
        splits = f"{pair.weaker} minus {pair.stricter}"
        estimate = dataclasses.astuple(pair.estimate)
        unit = audit.strictest.level.name
        n = pair.wells if unit == "well" else pair.sites
        rows.append((splits, unit, audit.model, HEADLINE, *estimate, n))
    columns = ["split", "level", "model", "metric", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)
