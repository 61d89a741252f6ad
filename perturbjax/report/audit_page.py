"""The one page of an audit, and of a comparison: self-contained, its picture inside."""

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
from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text
from perturbjax.evaluation import figures
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.report import pages
from perturbjax.report.pages.page import anchor, with_code


def write_page(audit: AuditResult, out: Path) -> Path:
    """Write `audit.html` and the picture in it, `audit.png`; return the page."""
    found, words = verdict(audit), METRICS[HEADLINE].words
    levels = {split.policy: split.evaluation.levels[0] for split in audit.splits}
    picture = figures.plot_splits(levels, audit.model, out / "audit.png")
    what = Path(audit.source).name
    lead = [
        f'<p class="verdict">{html_text(found.headline)}</p>',
        *(f"<p>{html_text(sentence)}</p>" for sentence in found.sentences),
        *(f'<p class="next"><b>Next:</b> {with_code(line)}</p>' for line in found.advice),
        f"<p>Asked: which <b>{html_text(audit.label.removeprefix('Metadata_'))}</b> does an image show? "
        f"<b>{html_text(audit.model)}</b> answers, from {html_text(what)}.</p>",
    ]
    every = html_table(
        ["split by", *levels],
        [(name, *cells) for name, cells in table_rows(audit)],
        strong=audit.model,
    )
    caption = f"{words}, with 95 % intervals. Blue: what is judged; grey: its controls."
    differences = [
        (f"{one.weaker} minus {one.stricter}", str(one.sites), format_estimate(one.estimate))
        for one in audit.differences
    ]
    meanings = [
        f"<p><b>{html_text(one)}</b>: {html_text(SPLIT_POLICIES[one].meaning if one in SPLIT_POLICIES else one)}.</p>"
        for one in levels
    ]
    absent = [
        f"<p><small>{with_code(note[0].upper() + note[1:])}</small></p>"
        for note in missing_parts(audit)
    ]
    sections = {
        f"Every split beside its controls: {words} by site": every + pages.image(picture, caption),
        "What the splits mean": "".join((*meanings, *absent)),
    }
    if differences:
        sections["The same sites under two splits"] = html_table(
            ["weaker minus stricter", "sites", words], differences
        )
    return write_html(out / "audit.html", f"perturbjax audit: {what}", "".join(lead), sections)


def html_table(head: Sequence[str], lines: Iterable[Sequence[str]], strong: str = "") -> str:
    """An HTML table of texts; lines that begin with `strong` stand out."""
    values = pd.DataFrame(list(map(tuple, lines)), columns=list(head), dtype=object)
    stand_out = [bool(strong) and line[0] == strong for line in values.itertuples(index=False)]
    return pages.table(anchor("table", head), values, strong=stand_out)


def write_html(path: Path, title: str, lead: str, sections: Mapping[str, str]) -> Path:
    """A page of HTML under its title (text) and sections by their titles (text), atomically."""
    parts = [pages.Section(anchor("part", name), name, body) for name, body in sections.items()]
    with atomic(path) as temporary:
        temporary.write_text(pages.page(title, lead, parts), encoding="utf-8")
    return path


def write_comparison_page(comparison: Comparison, out: Path) -> Path:
    """Write `compare.html`; return the page."""
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
