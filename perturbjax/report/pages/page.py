"""One self-contained HTML file from sections, with the data of every figure as CSV."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text

#: Column of the class in the data of every figure.
CLASS = "class"
#: Tables with more rows scroll in a box and have a search field.
_MANY = 20
#: Texts up to this number of characters stay on one line of a table.
_SHORT = 24
#: Significant digits of numbers in embedded data.
_DIGITS = 5


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: target of links.
        title: heading, text.
        body: HTML; a section with an empty body is left out.
        folded: show the heading only; a click or a link opens the section.
    """

    anchor: str
    title: str
    body: str
    folded: bool = False


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the complete HTML file.

    Args:
        title: heading, text.
        lead: HTML above all sections.
        sections: in order; three or more are listed in a table of contents.
    """
    # Style and script are embedded, so the page works without other files.
    style, script = _asset("page.css"), _asset("page.js") + _asset("viewer.js")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser loads nothing and runs no other script, whatever a compound is called.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{checksum}'"
    )
    filled = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{s.anchor}">{html_text(s.title)}</a></li>' for s in filled)
    contents = f'<nav aria-label="contents"><ol>{links}</ol></nav>' if len(filled) > 2 else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{html_text(title)}</title>'
        f'<style>{style}</style></head><body><div class="page{" long" if contents else ""}">'
        '<header><button type="button" class="theme" aria-label="light or dark">◐</button>'
        f"<h1>{html_text(title)}</h1>{lead}</header>{contents}"
        f"<main>{''.join(map(_section, filled))}</main></div><script>{script}</script></body>"
        "</html>\n"
    )


def write_html(path: Path, title: str, lead: str, sections: Mapping[str, str]) -> Path:
    """Write a page atomically.

    Args:
        path: file to write.
        title: heading, text.
        lead: HTML above the sections.
        sections: title (text) -> HTML; sections without HTML are left out.

    Returns:
        `path`.
    """
    parts = [Section(anchor("part", name), name, body) for name, body in sections.items()]
    with atomic(path) as temporary:
        temporary.write_text(page(title, lead, parts), encoding="utf-8")
    return path


def _section(section: Section) -> str:
    title = html_text(section.title)
    content = f"<h2>{title}</h2>{section.body}"
    if section.folded:
        content = f"<details><summary><h2>{title}</h2></summary>{section.body}</details>"
    return f'<section id="{section.anchor}" aria-label="{title}">{content}</section>'


def _asset(name: str) -> str:
    return files("perturbjax.report.pages").joinpath(name).read_text(encoding="utf-8")


def with_tooltip(word: str, meaning: str) -> str:
    """Return a word as HTML with its meaning on hover and keyboard focus; without one, the word."""
    if not meaning:
        return html_text(word)
    return f'<dfn tabindex="0" data-tip="{html_text(meaning)}">{html_text(word)}</dfn>'


def with_code(text: str) -> str:
    """Return text as HTML, with commands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html_text(text))


def data(name: str, table: pd.DataFrame, *, levels: bool = True) -> str:
    """Embed a table as JSON: {column: [values]}; repeated text as levels and codes if `levels`.

    Args:
        name: id of the element.
        table: text and numbers; infinite values and NaN become null.
    """
    columns = {str(column): _column(table[column], levels) for column in table.columns}
    # An unescaped `<` in a compound's name could end the element.
    text = json.dumps(columns, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{html_text(name)}">{text}</script>'


def _column(values: pd.Series, levels: bool) -> Any:
    if values.dtype.kind in "iu":
        return values.tolist()
    if values.dtype.kind == "b":
        return values.astype(int).tolist()
    if values.dtype.kind == "f":
        return [float(f"{v:.{_DIGITS}g}") if np.isfinite(v) else None for v in values.tolist()]
    # Repeated text is stored as codes, which makes the page smaller.
    codes, distinct = pd.factorize(values.fillna("").astype(str))
    if levels and 2 * len(distinct) <= len(codes):
        return {"levels": list(distinct), "codes": codes.tolist()}
    return values.fillna("").astype(str).tolist()


def csv_button(source: str, name: str) -> str:
    """Return a button that saves the table of an element as NAME.csv."""
    name = html_text(name)
    return (
        f'<button type="button" data-csv="{html_text(source)}" data-name="{name}" '
        f'aria-label="save {name} as CSV">Save {name}.csv</button>'
    )


def figure(name: str, drawing: str, caption: str, values: pd.DataFrame) -> str:
    """Return a drawing with its caption and its data.

    Args:
        name: id of the figure and name of the CSV file.
        drawing: HTML or SVG.
        caption: text.
        values: data of the figure.
    """
    source = f"{name}-data"
    if drawing.startswith("<svg"):
        # A wide chart scrolls on a narrow screen, where its text would be too small to read.
        drawing = f'<div class="wide chart" tabindex="0">{drawing}</div>'
    return (
        f'<figure class="figure" id="{html_text(name)}">{drawing}'
        f"<figcaption>{html_text(caption)}</figcaption>"
        f'<div class="tools">{csv_button(source, name)}</div>{data(source, values)}</figure>'
    )


def widget(kind: str, source: str, label: str, **settings: Any) -> str:
    """Return an element that the script of the page draws in.

    Args:
        kind: plates, confusion or scatter.
        source: name of the figure with the data.
        label: description for screen readers.
        settings: `data-*` attributes; lists and mappings are written as JSON.
    """
    plain = {
        k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in settings.items()
    }
    extra = "".join(
        f' data-{name.replace("_", "-")}="{html_text(value)}"' for name, value in plain.items()
    )
    label = html_text(label)
    return (
        f'<div data-widget="{kind}" data-table="{html_text(source)}-data" data-label="{label}"'
        f"{extra}></div><noscript><p>{label} (needs JavaScript)</p></noscript>"
    )


def table(
    name: str,
    values: pd.DataFrame,
    *,
    meanings: Mapping[str, str] | None = None,
    links: Sequence[str] | None = None,
    strong: Sequence[bool] | None = None,
    rows: str = "rows",
) -> str:
    """Return a table that sorts by a click on a column heading; long tables have a search field.

    Args:
        name: id of the table and name of the CSV file.
        values: text and numbers; NaN is empty. Numbers from -1 to 1 have three decimals, tiny
            ones one digit.
        meanings: column -> explanation on hover.
        links: one per row, target of the first cell; empty for none.
        strong: rows to highlight.
        rows: plural name of a row, for the count above long tables.
    """
    # By position, because column names can repeat.
    numeric = [values.dtypes.iloc[i].kind in "iuf" for i in range(values.shape[1])]
    columns = zip(values.columns, numeric, strict=True)
    heads = "".join(_heading(column, number, meanings or {}) for column, number in columns)
    body = []
    for index, row in enumerate(values.itertuples(index=False)):
        cells = [_cell(value, number) for value, number in zip(row, numeric, strict=True)]
        if links and links[index]:
            link = f'<a href="{html_text(links[index])}">{html_text(row[0])}</a>'
            cells[0] = f'<td class="text{_short(row[0])}">{link}</td>'
        css = ' class="model"' if strong is not None and strong[index] else ""
        body.append(f"<tr{css}>{''.join(cells)}</tr>")
    # Long tables have the tools above, short ones below.
    many = len(values) > _MANY
    search = (
        f'<label>find <input type="search" data-filter="#{html_text(name)} tbody tr"></label>'
        f"<output></output><span>{len(values)} {html_text(rows)}</span>"
        if many
        else ""
    )
    tools = f'<div class="tools">{search}{csv_button(name, name)}</div>'
    above, below = (tools, "") if many else ("", tools)
    return (
        f'{above}<div class="{"tall" if many else "wide"}" tabindex="0">'
        f'<table class="sortable" id="{html_text(name)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{below}"
    )


def _heading(column: Any, number: bool, meanings: Mapping[str, str]) -> str:
    tip = f' data-tip="{html_text(meanings[column])}"' if column in meanings else ""
    css = "" if number else " class=text"
    return f'<th scope="col"{css}><button type="button"{tip}>{html_text(column)}</button></th>'


def _short(value: Any) -> str:
    return " short" if len(str(value)) <= _SHORT else ""


def _cell(value: Any, number: bool) -> str:
    if not number:
        return f'<td class="text{_short(value)}">{html_text(value)}</td>'
    if pd.isna(value):
        return "<td></td>"
    if isinstance(value, int | np.integer):
        return f"<td>{value}</td>"
    text = f"{value:.3f}" if abs(value) <= 1 else f"{value:.4g}"
    # Small p-values are not 0.
    text = f"{value:.0e}" if 0 < abs(value) < 5e-4 else text
    return f'<td data-value="{value:.6g}">{text}</td>'


def anchor(prefix: str, name: object) -> str:
    """Return an anchor for a name from the data; names with special characters get a checksum."""
    text = str(name)
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if clean == text:
        return f"{prefix}-{clean}"
    return f"{prefix}-{clean}-{hashlib.sha1(text.encode()).hexdigest()[:6]}"
