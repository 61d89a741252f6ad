"""One self-contained HTML file from sections; the data of every figure inside, for its script and as CSV."""

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

from perturbjax.core.messages import html_text

#: What the column of classes is called in the data of every figure.
CLASS = "class"
#: Rows of a table above which it scrolls in a box of its own and can be filtered.
_MANY = 20
#: Characters of a text that stays on one line of a table.
_SHORT = 24
#: Values of a data column are kept to so many digits.
_DIGITS = 5


@dataclass(frozen=True)
class Section:
    """A part of a page. `body` is HTML; an empty one is left out. The anchor is what links name."""

    anchor: str
    title: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: text.
        lead: HTML above all sections.
        sections: in their order; three or more are listed beside the page.
    """
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is fetched, and no script runs but this one, whatever a compound is called.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    shown = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{one.anchor}">{html_text(one.title)}</a></li>' for one in shown)
    contents = f'<nav aria-label="contents"><ol>{links}</ol></nav>' if len(shown) > 2 else ""
    body = "".join(
        f'<section id="{one.anchor}" aria-label="{html_text(one.title)}"><h2>{html_text(one.title)}</h2>{one.body}'
        "</section>"
        for one in shown
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{html_text(title)}</title>'
        f'<style>{style}</style></head><body><div class="page{" long" if contents else ""}"><header>'
        f'<button type="button" class="theme" aria-label="light or dark">◐</button><h1>{html_text(title)}</h1>{lead}'
        f"</header>{contents}<main>{body}</main></div><script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return files("perturbjax.report.pages").joinpath(name).read_text(encoding="utf-8")


def defined(word: str, meaning: str) -> str:
    """A word that says on hover, and to the keyboard, what it means."""
    return (
        f'<dfn tabindex="0" data-tip="{html_text(meaning)}">{html_text(word)}</dfn>'
        if meaning
        else html_text(word)
    )


def with_code(text: str) -> str:
    """Text whose commands stand between backticks, as HTML."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html_text(text))


def data(name: str, table: pd.DataFrame) -> str:
    """A table for scripts and for CSV, as JSON inside the page: {column: [values]}, repeated text as levels and codes.

    Args:
        name: of the element.
    """
    columns = {str(column): _column(table[column]) for column in table.columns}
    # `<` would let a compound's name end the element.
    text = json.dumps(columns, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{html_text(name)}">{text}</script>'


def _column(values: pd.Series) -> Any:
    if values.dtype.kind in "iu":
        return values.tolist()
    if values.dtype.kind == "b":
        return values.astype(int).tolist()
    if values.dtype.kind == "f":
        return [float(f"{v:.{_DIGITS}g}") if np.isfinite(v) else None for v in values.tolist()]
    codes, levels = pd.factorize(values.fillna("").astype(str))
    if 2 * len(levels) <= len(codes):
        return {"levels": list(levels), "codes": codes.tolist()}
    return values.fillna("").astype(str).tolist()


def csv_button(source: str, name: str) -> str:
    """A button that saves an element's table as NAME.csv."""
    return (
        f'<button type="button" data-csv="{html_text(source)}" data-name="{html_text(name)}" '
        f'aria-label="save {html_text(name)} as CSV">CSV</button>'
    )


def figure(name: str, drawing: str, caption: str, values: pd.DataFrame) -> str:
    """A drawing with its caption (text) and its data, which can be saved as NAME.csv."""
    source = f"{name}-data"
    return (
        f'<figure class="figure" id="{html_text(name)}">{drawing}<figcaption>{html_text(caption)}</figcaption>'
        f'<div class="tools">{csv_button(source, name)}</div>{data(source, values)}</figure>'
    )


def image(file: Path, caption: str) -> str:
    """A PNG inside the page, with its caption (text), which also says what is seen."""
    held = base64.b64encode(file.read_bytes()).decode()
    text = html_text(caption)
    return (
        f'<figure><img class="print" alt="{text}" src="data:image/png;base64,{held}"><figcaption>{text}</figcaption>'
        "</figure>"
    )


def widget(kind: str, source: str, label: str, **settings: Any) -> str:
    """A place that the page's script draws in: plates, confusion or scatter.

    Args:
        source: the name of the figure whose data it draws.
        label: what is seen, for those who do not.
        settings: `data-*` attributes; what is not text or a number is written as JSON.
    """
    plain = {
        k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in settings.items()
    }
    extra = "".join(
        f' data-{name.replace("_", "-")}="{html_text(value)}"' for name, value in plain.items()
    )
    return (
        f'<div data-widget="{kind}" data-table="{html_text(source)}-data" data-label="{html_text(label)}"{extra}></div>'
        f"<noscript><p>{html_text(label)} (drawn where scripts may run)</p></noscript>"
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
    """A table that sorts by a click on a column's name, and filters where it is long.

    Args:
        values: text and numbers; NaN is left empty. Numbers between -1 and 1 have three decimals.
        meanings: column → what its name means.
        links: one a row, the address that its first cell leads to; empty leads nowhere.
        strong: rows that stand out.
        rows: what a row is, in the plural; they are counted where they are many.
    """
    meanings = meanings or {}
    numeric = [values.dtypes.iloc[at].kind in "iuf" for at in range(values.shape[1])]
    heads = "".join(
        f'<th scope="col"{"" if number else " class=text"}><button type="button"'
        + (f' data-tip="{html_text(meanings[column])}"' if column in meanings else "")
        + f">{html_text(column)}</button></th>"
        for column, number in zip(values.columns, numeric, strict=True)
    )
    body = []
    for at, row in enumerate(values.itertuples(index=False)):
        cells = [_cell(value, number) for value, number in zip(row, numeric, strict=True)]
        if links and links[at]:
            cells[0] = (
                f'<td class="text{_short(row[0])}"><a href="{html_text(links[at])}">{html_text(row[0])}</a></td>'
            )
        css = ' class="model"' if strong is not None and strong[at] else ""
        body.append(f"<tr{css}>{''.join(cells)}</tr>")
    many = len(values) > _MANY
    find = (
        f'<label>find <input type="search" data-filter="#{html_text(name)} tbody tr"></label><output></output>'
        if many
        else ""
    )
    count = f"<span>{len(values)} {html_text(rows)}</span>" if many else ""
    tools = f'<div class="tools">{find}{count}{csv_button(name, name)}</div>'
    above, below = (tools, "") if many else ("", tools)
    drawn = (
        f'<table class="sortable" id="{html_text(name)}"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table>"
    )
    return f'{above}<div class="{"tall" if many else "wide"}" tabindex="0">{drawn}</div>{below}'


def _short(value: Any) -> str:
    return " short" if len(str(value)) <= _SHORT else ""


def _cell(value: Any, number: bool) -> str:
    if not number:
        return f'<td class="text{_short(value)}">{html_text(value)}</td>'
    if pd.isna(value):
        return "<td></td>"
    if isinstance(value, int | np.integer):
        return f"<td>{value}</td>"
    shown = f"{value:.3f}" if abs(value) <= 1 else f"{value:.4g}"
    return f'<td data-value="{value:.6g}">{shown}</td>'


def anchor(prefix: str, name: object) -> str:
    """An address inside the page for a name from the data."""
    text = str(name)
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    return (
        f"{prefix}-{clean}"
        if clean == text
        else f"{prefix}-{clean}-{hashlib.sha1(text.encode()).hexdigest()[:6]}"
    )
