"""What mkdocs asks for while it builds the site: the commands' help as they give it, and notebooks as pages."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

COMMANDS = "<!-- commands -->"
NOTEBOOK = re.compile(r"<!-- notebook (\w+) -->")


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Put every command's full help, or a notebook with what it showed, in the place of its mark."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    return NOTEBOOK.sub(
        lambda found: _notebook(Path(__file__).parent / f"notebooks/{found[1]}.ipynb"), markdown
    )


def _commands() -> str:
    from perturbjax.cli import COMMANDS

    return "\n\n".join(f"## {name}\n\n```text\n{_help(name)}```" for name in COMMANDS)


def _help(verb: str) -> str:
    from perturbjax.cli import COMMANDS

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        COMMANDS[verb](["--help-all"])
    return said.getvalue()


def _notebook(path: Path) -> str:
    return "\n\n".join(
        part for cell in json.loads(path.read_text())["cells"] for part in _cell(cell)
    )


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    shell = source.startswith("!")
    code = f"```{'sh' if shell else 'python'}\n{source.removeprefix('!')}\n```"
    return [code, *(_shown(output) for output in cell["outputs"])]


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return "<div>" + "".join(data["text/html"]).replace("\n", " ") + "</div>"
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"<pre><code>{html.escape(text.rstrip())}</code></pre>".replace("\n\n", "\n&#8203;\n")
