"""The one page of an audit, and of a comparison: self-contained, without scripts, its picture inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from perturbjax.audit.findings import Audit
from perturbjax.audit.verdict import verdict
from perturbjax.audit.views import notes, rows
from perturbjax.console import html_text
from perturbjax.evaluation import figures
from perturbjax.evaluation.judgement import cell
from perturbjax.evaluation.report import _STYLE, _figure, _table
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.files import atomic
from perturbjax.splits import MEANING


def write_page(audit: Audit, out: Path) -> Path:
    """Write `audit.html` and the picture in it, `audit.png`; return the page."""
    found, words = verdict(audit), METRICS[HEADLINE].words
    levels = {answer.policy: answer.judgement.levels[0] for answer in audit.answers}
    picture = figures.plot_splits(levels, audit.model, out / "audit.png")
    lead = [
        f"<p>Asked: which <b>{html_text(audit.label)}</b> was this site given? <b>{html_text(audit.model)}</b> "
        f"answers, from {html_text(audit.what)}.</p>",
        f'<p class="headline"><b>{html_text(found.sentences[0])}</b></p>',
        *(f"<p><b>{html_text(sentence)}</b></p>" for sentence in found.sentences[1:]),
        *(f"<p>{html_text(line)}</p>" for line in found.advice),
    ]
    every = html_table(["", *levels], [(name, *cells) for name, cells in rows(audit)], strong=audit.model)
    caption = f"{words}, with 95 % intervals. Blue: what is judged; grey: its controls."
    differences = [
        (f"{one.weaker} minus {one.stricter}", str(one.sites), cell(one.estimate)) for one in audit.differences
    ]
    meanings = [f"<p><b>{html_text(one)}</b>: {html_text(MEANING.get(one, one))}.</p>" for one in levels]
    absent = [f"<p><small>{html_text(note)}</small></p>" for note in notes(audit)]
    sections = {
        f"Every split beside its controls: {words} by site": every + _figure(picture, caption),
        "What the splits mean": "".join((*meanings, *absent)),
    }
    if differences:
        sections["The same sites under two splits"] = html_table(["weaker minus stricter", "sites", words], differences)
    return write_html(out / "audit.html", f"perturbjax audit: {audit.what}", "".join(lead), sections)


def html_table(head: Sequence[str], lines: Iterable[Sequence[str]], strong: str = "") -> str:
    """An HTML table of texts; lines that begin with `strong` stand out."""
    return _table(head, [([html_text(text) for text in line], "model" if line[0] == strong else "") for line in lines])


def write_html(path: Path, title: str, lead: str, sections: Mapping[str, str]) -> Path:
    """A page of HTML under its title (text) and sections by their titles (text), atomically."""
    body = "".join(f"<h2>{html_text(name)}</h2>{section}" for name, section in sections.items())
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{html_text(title)}</h1>{lead}{body}</body></html>\n"
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
