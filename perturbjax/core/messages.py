"""Messages to the terminal, and escaping of text from data for terminals, HTML pages, CSV files and plots."""

from __future__ import annotations

import html
import re
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

T = TypeVar("T")
#: Characters that move a cursor, recolour or clear a terminal, or end a line.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: Beginnings of text that a spreadsheet runs as a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Settings of matplotlib's under which text is text; else what stands between two `$` is read as a formula.
PLOT_TEXT: Any = {"text.parse_math": False}


def terminal_text(text: str) -> str:
    """Text for a terminal: control characters are shown as �, line breaks and tabs are kept."""
    return CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else "�", text)


def html_text(value: object) -> str:
    """Text for an HTML page, inside quotes too."""
    return html.escape(str(value))


def csv_text(value: T) -> T | str:
    """A cell for a CSV: text that a spreadsheet would run as a formula begins with an apostrophe instead.

    Numbers written as text stay as they are, and so does everything but text. `csv_value` reads it back. Tables that
    other programs write too (`load_data.csv`, tables of features) are not guarded: they must come back as they were.
    """
    if not isinstance(value, str) or not value.lstrip("'").startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value


def csv_value(cell: T) -> T | str:
    """What `csv_text` made a cell of."""
    guarded = (
        isinstance(cell, str) and cell.startswith("'") and cell.lstrip("'").startswith(FORMULA)
    )
    return cell[1:] if isinstance(cell, str) and guarded else cell


class PlainConsole(Console):
    """A console to which text is text: no markup, no emoji codes, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{"highlight": False, "soft_wrap": True, **settings}, markup=False, emoji=False
        )

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(terminal_text(text), **settings)


#: Everything a person reads while waiting goes to stderr; stdout carries results.
console = PlainConsole(stderr=True)
