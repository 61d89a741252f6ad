"""What mkdocs asks for while it builds the site: the commands' help, as they give it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Put every command's full help in the place of `MARK`."""
    return markdown.replace(MARK, _commands()) if MARK in markdown else markdown


def _commands() -> str:
    from perturbjax.cli import VERBS

    return "\n\n".join(f"## {name}\n\n```text\n{_help(name)}```" for name in VERBS)


def _help(verb: str) -> str:
    from perturbjax.cli import VERBS

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        VERBS[verb](["--help-all"])
    return said.getvalue()
