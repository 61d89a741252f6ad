"""The pages `audit.html` and `compare.html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.audit_tables import missing_parts, table_rows
from perturbjax.audit.compare import Comparison, explain_intervals, summarize, table_header
from perturbjax.audit.compare import table_rows as comparison_rows
from perturbjax.audit.verdict import verdict
from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.messages import html_text
from perturbjax.evaluation import figures
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report import pages
from perturbjax.report.pages.page import anchor, with_code, write_html


def write_page(audit: AuditResult, out: Path) -> Path:
    """Write `audit.html` and its figure `audit.png`.

    Args:
        audit: result of the audit.
        out: folder.

    Returns:
        Path of the page.
    """
    conclusion, metric = verdict(audit), METRICS[HEADLINE].words
    levels = {split.policy: split.level for split in audit.splits}
    picture = figures.plot_splits(levels, audit.model, out / "audit.png")
    source = Path(audit.source).name
    lead = [
        f'<p class="verdict">{html_text(conclusion.headline)}</p>',
        *(f"<p>{html_text(sentence)}</p>" for sentence in conclusion.sentences),
        *(f'<p class="next"><b>Next:</b> {with_code(line)}</p>' for line in conclusion.advice),
        f"<p>Task: predict <b>{html_text(audit.label.removeprefix('Metadata_'))}</b> from "
        f"{html_text(source)}. Model: <b>{html_text(audit.model)}</b>.</p>",
    ]
    scores = html_table(
        ["split by", *levels],
        [(name, *cells) for name, cells in table_rows(audit)],
        strong=audit.model,
    )
    caption = f"{metric}, with 95 % intervals. Blue: the model; gray: its controls."
    notes = "".join(
        f"<p><small>{with_code(note[0].upper() + note[1:])}</small></p>"
        for note in missing_parts(audit)
    )
    meanings = "".join(
        f"<p><b>{html_text(policy)}</b>: {html_text(_meaning(policy))}.</p>" for policy in levels
    )
    sections = {
        f"Scores by split and control ({metric}, {audit.words})": scores
        + pages.image(picture, caption),
        "Splits": meanings + notes,
    }
    differences = [
        (f"{one.weaker} minus {one.stricter}", str(one.sites), format_estimate(one.estimate))
        for one in audit.differences
    ]
    if differences:
        heading = ["weaker minus stricter split", "sites", metric]
        sections["Same sites under two splits"] = html_table(heading, differences)
    return write_html(out / "audit.html", f"perturbjax audit: {source}", "".join(lead), sections)


def _meaning(policy: str) -> str:
    return SPLIT_POLICIES[policy].meaning if policy in SPLIT_POLICIES else policy


def html_table(heading: Sequence[str], rows: Iterable[Sequence[str]], strong: str = "") -> str:
    """Return a table of texts as HTML.

    Args:
        heading: column names.
        rows: texts.
        strong: rows that begin with this text are highlighted.
    """
    values = pd.DataFrame(list(map(tuple, rows)), columns=list(heading), dtype=object)
    highlight = [bool(strong) and row[0] == strong for row in values.itertuples(index=False)]
    return pages.table(anchor("table", heading), values, strong=highlight)


def write_comparison_page(comparison: Comparison, out: Path) -> Path:
    """Write `compare.html`.

    Args:
        comparison: result of `perturbjax compare`.
        out: folder.

    Returns:
        Path of the page.
    """
    lead = (
        f'<p class="verdict">{html_text(summarize(comparison))}</p>'
        f"<p>All runs were evaluated on the same {comparison.sites} test sites in "
        f"{comparison.wells} wells.</p>"
        f"<p><small>{html_text(explain_intervals(comparison))}</small></p>"
    )
    sections = {
        f"By {level}": html_table(
            table_header(comparison, level), comparison_rows(comparison, level)
        )
        for level in comparison.levels
    }
    return write_html(out / "compare.html", "perturbjax compare", lead, sections)
