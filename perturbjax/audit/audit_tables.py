"""An audit shown on the terminal, and written as JSON and CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.verdict import Verdict, verdict
from perturbjax.core.files import write_csv, write_json
from perturbjax.core.messages import PlainConsole
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS


def print_audit(audit: AuditResult) -> None:
    """Show the verdict, every split side by side, and why not the others, on stdout."""
    from rich import box
    from rich.table import Table

    console, found = PlainConsole(soft_wrap=False), verdict(audit)
    console.print(
        f"{audit.source}: {audit.label} by {audit.model}, {METRICS[HEADLINE].words} by site"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", *(answer.policy for answer in audit.splits)):
        table.add_column(title, justify="right" if title else "left", no_wrap=not title)
    gap = " " if console.width >= 24 + 22 * len(audit.splits) else "\n"
    for name, cells in rows(audit, gap):
        own = name == audit.model
        table.add_row(name, *cells, style="bold" if own else "", end_section=own)
    console.print(table)
    first = audit.splits[0].evaluation
    intervals = f"95 % intervals from {first.replicates} resamples of whole {first.resample}s"
    console.print(f"In brackets: {intervals}. p: labels exchanged between the wells of a plate.")
    for sentence in found.sentences:
        console.print(sentence, style="bold")
    for line in (*notes(audit), *found.advice):
        console.print(line)


def p_words(p: float) -> str:
    """`0.012`; what is less than a thousandth says so."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def rows(audit: AuditResult, gap: str = " ") -> Iterator[tuple[str, list[str]]]:
    """The model, every control, and what stands beside them, a cell a split; empty where a split has none."""
    yield audit.model, [format_estimate(answer.score, gap) for answer in audit.splits]
    for name in dict.fromkeys(name for answer in audit.splits for name in answer.controls):
        yield name, [format_estimate(answer.controls.get(name), gap) for answer in audit.splits]
    leads = [(answer.rival, answer.model.leads[answer.rival][HEADLINE]) for answer in audit.splits]
    yield "best control", [name for name, _ in leads]
    yield "lead over it", [format_estimate(lead, gap) for _, lead in leads]
    yield "p", ["" if answer.p is None else p_words(answer.p) for answer in audit.splits]
    sure = [answer.confidence for answer in audit.splits]
    yield "calibration error", [f"{one.error:.3f}" for one in sure]
    yield (
        "… with temperature",
        [f"{one.scaled_error:.3f}{gap}(T = {one.temperature:.2f})" for one in sure],
    )
    accuracy = [
        (answer.model.scores["accuracy"].value, answer.confidence) for answer in audit.splits
    ]
    yield (
        "accuracy, surer half",
        [f"{one.half_accuracy:.3f}{gap}(all {every:.3f})" for every, one in accuracy],
    )
    for size in ("site", "well", "plate"):
        yield (
            f"{size}s judged",
            [str(getattr(answer.evaluation.n, size)) for answer in audit.splits],
        )


def notes(audit: AuditResult) -> Iterator[str]:
    """Why splits, controls and p-values are absent."""
    for policy, why in audit.refused.items():
        yield f"no {policy} split: {why}."
    for answer in audit.splits:
        if answer.no_p:
            yield f"no p under the {answer.policy} split: {answer.no_p}."
    absent = {
        (name, why) for answer in audit.splits for name, why in answer.evaluation.skipped.items()
    }
    everywhere = {
        name for name in dict(absent) if all(name not in answer.controls for answer in audit.splits)
    }
    for name, why in sorted(absent):
        if name in everywhere:
            yield f"no {name}: {why}."


def write_tables(audit: AuditResult, out: Path) -> None:
    """`audit.json`, and `audit.csv` with one row a number."""
    write_json(out / "audit.json", as_json(audit, verdict(audit)))
    write_csv(out / "audit.csv", tidy(audit))


def as_json(audit: AuditResult, found: Verdict) -> dict[str, Any]:
    """The verdict; for each split scores of everybody, leads of the model, p, overlap and sizes; as plain values."""
    answers = {}
    for answer in audit.splits:
        evaluation = answer.evaluation
        levels = {
            level.name: {row.name: dataclasses.asdict(row) for row in level.rows}
            for level in evaluation.levels
        }
        answers[answer.policy] = {
            "p": answer.p,
            "no_p": answer.no_p,
            "unanswerable": answer.n_excluded,
            "leaks": answer.leaks,
            "confidence": dataclasses.asdict(answer.confidence),
            "n": dataclasses.asdict(evaluation.n),
            "overlap": dataclasses.asdict(evaluation.overlap),
            "skipped": evaluation.skipped,
            "levels": {
                level: {
                    name: {"scores": row["scores"], "leads": row["leads"]}
                    for name, row in of.items()
                }
                for level, of in levels.items()
            },
        }
    return {
        "what": audit.source,
        "label": audit.label,
        "model": audit.model,
        "verdict": dataclasses.asdict(found),
        "splits": answers,
        "differences": [dataclasses.asdict(one) for one in audit.differences],
        "refused": audit.refused,
    }


def tidy(audit: AuditResult) -> pd.DataFrame:
    """One row a number: split, level, who, metric, value, low, high, n.

    Leads stand as `who minus control`, differences of two splits as `split minus split`.
    """
    found: list[tuple] = []
    for answer in audit.splits:
        for level in answer.evaluation.levels:
            for row in level.rows:
                pairs = [
                    (row.name, row.scores),
                    *((f"{row.name} minus {b}", lead) for b, lead in row.leads.items()),
                ]
                for who, scores in pairs:
                    for metric, one in scores.items():
                        found.append(
                            (
                                answer.policy,
                                level.name,
                                who,
                                metric,
                                *dataclasses.astuple(one),
                                level.n,
                            )
                        )
    for pair in audit.differences:
        splits = f"{pair.weaker} minus {pair.stricter}"
        found.append(
            (splits, "site", audit.model, HEADLINE, *dataclasses.astuple(pair.estimate), pair.sites)
        )
    return pd.DataFrame(
        found, columns=["split", "level", "model", "metric", "value", "low", "high", "n"]
    )
