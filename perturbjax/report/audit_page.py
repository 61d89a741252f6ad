"""The pages `audit.html` and `compare.html`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.audit_tables import missing_parts, table_rows
from perturbjax.audit.compare import Comparison, explain_intervals, summarize, table_header
from perturbjax.audit.compare import table_rows as comparison_rows
from perturbjax.audit.verdict import verdict
from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.messages import html_text
from perturbjax.evaluation.evaluation_result import Level, format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report import pages
from perturbjax.report.chart_files import write_charts
from perturbjax.report.pages.page import with_code, write_html
from perturbjax.report.svg import Chart, ticks


def write_page(audit: AuditResult, out: Path) -> Path:
    """Write `audit.html` and its figure as `audit.svg` and `audit.png`.

    Args:
        audit: result of the audit.
        out: folder.

    Returns:
        Path of the page.
    """
    conclusion, metric = verdict(audit), METRICS[HEADLINE].words
    levels = {split.policy: split.level for split in audit.splits}
    charts = split_charts(levels, audit.model)
    write_charts(charts, out / "audit")
    source = Path(audit.source).name
    lead = [
        f'<p class="verdict">{html_text(conclusion.headline)}</p>',
        *(f"<p>{html_text(sentence)}</p>" for sentence in conclusion.sentences),
        *(f'<p class="next"><b>Next:</b> {with_code(line)}</p>' for line in conclusion.advice),
        f"<p>Task: predict <b>{html_text(audit.label.removeprefix('Metadata_'))}</b> from "
        f"{html_text(source)}. Model: <b>{html_text(audit.model)}</b>.</p>",
    ]
    scores = html_table(
        "audit-scores",
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
        + _drawing(charts, caption),
        "Splits": meanings + notes,
    }
    differences = [
        (f"{one.weaker} minus {one.stricter}", str(one.sites), format_estimate(one.estimate))
        for one in audit.differences
    ]
    if differences:
        heading = ["weaker minus stricter split", "sites", metric]
        rows = html_table("audit-differences", heading, differences)
        sections["Same sites under two splits"] = rows
    return write_html(out / "audit.html", f"perturbjax audit: {source}", "".join(lead), sections)


def _meaning(policy: str) -> str:
    return SPLIT_POLICIES[policy].meaning if policy in SPLIT_POLICIES else policy


def split_charts(levels: Mapping[str, Level], model: str) -> list[Chart]:
    """Draw the scores of a model and its controls, one chart per split."""
    names = list(dict.fromkeys(row.name for level in levels.values() for row in level.rows))
    charts = []
    for split, level in levels.items():
        title = f"split by {split} (n = {level.n})"
        text = "; ".join(f"{row.name} {row.scores[HEADLINE].value:.3f}" for row in level.rows)
        chart = Chart(
            (0, 1),
            # Reversed axis: the first row is at the top.
            (len(names) - 0.5, -0.5),
            title,
            f"{METRICS[HEADLINE].words}, {title}: {text}",
            METRICS[HEADLINE].words,
            width=390,
            height=74 + 22 * len(names),
            left=124,
        )
        chart.grid(ticks(0, 1, 5), ())
        for row in level.rows:
            number, score = names.index(row.name), row.scores[HEADLINE]
            own = row.name == model
            css = "train" if own else "other"
            chart.text(118, chart.pixel(0, number)[1] + 4, row.name, "end", "strong" if own else "")
            chart.line([max(score.low, 0), score.high], [number] * 2, css)
            tip = f"{row.name}: {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
            chart.dots([score.value], [number], css, [tip])
        charts.append(chart)
    return charts


def _drawing(charts: Sequence[Chart], caption: str) -> str:
    drawn = "".join(chart.svg() for chart in charts)
    text = html_text(caption)
    return f'<figure><div class="row">{drawn}</div><figcaption>{text}</figcaption></figure>'


def html_table(
    name: str, heading: Sequence[str], rows: Iterable[Sequence[str]], strong: str = ""
) -> str:
    """Return a table of texts as HTML.

    Args:
        name: id of the table and name of its CSV file.
        heading: column names.
        rows: texts.
        strong: rows that begin with this text are highlighted.
    """
    values = pd.DataFrame(list(map(tuple, rows)), columns=list(heading), dtype=object)
    highlight = [bool(strong) and row[0] == strong for row in values.itertuples(index=False)]
    return pages.table(name, values, strong=highlight)


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
            f"comparison-by-{level}",
            table_header(comparison, level),
            comparison_rows(comparison, level),
        )
        for level in comparison.levels
    }
    return write_html(out / "compare.html", "perturbjax compare", lead, sections)
