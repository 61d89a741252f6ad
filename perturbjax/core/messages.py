"""Messages to the terminal, and escaping of data for terminals, HTML pages, CSV files and plots."""

from __future__ import annotations

import html
import re
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

T = TypeVar("T")
#: Characters that move the cursor, change colors, clear a terminal, or end a line.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: First characters of text that a spreadsheet program evaluates as a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: matplotlib settings without formulas; by default it parses text between two `$` as a formula.
PLOT_TEXT: Any = {"text.parse_math": False}


def terminal_text(text: str) -> str:
    """Replace control characters by �, except line breaks and tabs."""
    return CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else "�", text)


def html_text(value: object) -> str:
    """Escape a value for HTML text and quoted HTML attributes."""
    return html.escape(str(value))


def csv_text(value: T) -> T | str:
    """Protect a CSV cell from evaluation as a spreadsheet formula.

    Text that a spreadsheet program would evaluate gets an apostrophe in front; numbers written as
    text do not. `csv_value` is the inverse. Tables that other programs write too (`load_data.csv`,
    feature tables) are not protected, because their values must not change.

    Args:
        value: cell of any type; only text is changed.
    """
    if not isinstance(value, str) or not value.lstrip("'").startswith(FORMULA):
        return value
    try:
        # A number such as -1.5 starts like a formula but is harmless.
        float(value)
    except ValueError:
        return "'" + value
    return value


def csv_value(cell: T) -> T | str:
    """Return the value that `csv_text` converted to a cell."""
    is_protected = (
        isinstance(cell, str) and cell.startswith("'") and cell.lstrip("'").startswith(FORMULA)
    )
    return cell[1:] if isinstance(cell, str) and is_protected else cell


class PlainConsole(Console):
    """A console that prints text unchanged: no markup, emoji codes or control characters."""

    def __init__(self, **settings: Any) -> None:
        settings = {"highlight": False, "soft_wrap": True, **settings}
        super().__init__(**settings, markup=False, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(terminal_text(text), **settings)


#: Progress, information and warnings go to stderr; stdout is for results.
console = PlainConsole(stderr=True)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 plate", "1,234 sites", "2 classes"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
