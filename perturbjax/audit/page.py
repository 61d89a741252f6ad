"""The one page of an audit, and of a comparison: self-contained, its picture inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from perturbjax import pages
from perturbjax.audit.findings import Audit
from perturbjax.audit.verdict import verdict
from perturbjax.audit.views import notes, rows
from perturbjax.console import html_text
from perturbjax.evaluation import figures
from perturbjax.evaluation.judgement import cell
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.files import atomic
from perturbjax.pages.page import anchor
from perturbjax.splits import MEANING


def write_page(audit: Audit, out: Path) -> Path:
    """Write `audit.html` and the picture in it, `audit.png`; return the page."""
    found, words = verdict(audit), METRICS[HEADLINE].words
    levels = {answer.policy: answer.judgement.levels[0] for answer in audit.answers}
    picture = figures.plot_splits(levels, audit.model, out / "audit.png")
    differences = [
        (f"{one.weaker} minus {one.stricter}", str(one.sites), cell(one.estimate)) for one in audit.differences
    ]
    body = [
        f"<p>Asked: which <b>{html_text(audit.label)}</b> was this site given? <b>{html_text(audit.model)}</b> "
        f"answers, from {html_text(audit.what)}.</p>",
        *(f'<p class="headline"><b>{html_text(sentence)}</b></p>' for sentence in found.sentences),
        *(f"<p>{html_text(line)}</p>" for line in found.advice),
        f"<h2>Every split beside its controls: {words} by site</h2>",
        table(["", *levels], [(name, *cells) for name, cells in rows(audit)], bold=audit.model),
        pages.image(picture, f"{words}, with 95 % intervals. Blue: what is judged; grey: its controls."),
    ]
    if differences:
        body += [
            "<h2>The same sites under two splits</h2>",
            table(["weaker minus stricter", "sites", words], differences),
        ]
    body += ["<h2>What the splits mean</h2>"]
    body += [f"<p><b>{html_text(policy)}</b>: {html_text(MEANING.get(policy, policy))}.</p>" for policy in levels]
    body += [f"<p><small>{html_text(note)}</small></p>" for note in notes(audit)]
    return write_html(out / "audit.html", f"perturbjax audit: {audit.what}", body)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], bold: str = "") -> str:
    """An HTML table of texts; lines that begin with `bold` stand out."""
    values = pd.DataFrame(list(map(tuple, lines)), columns=list(head), dtype=object)
    strong = [bool(bold) and line[0] == bold for line in values.itertuples(index=False)]
    return pages.table(anchor("table", head), values, strong=strong)


def write_html(path: Path, title: str, body: Iterable[str]) -> Path:
    """A page from pieces of HTML, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(pages.page(title, "".join(body), ()), encoding="utf-8")
    return path
