"""mkdocs hooks: insert the help of all commands, the table of preparations, and notebooks into
pages."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

COMMANDS, PREPARATIONS = "<!-- commands -->", "<!-- preparations -->"
NOTEBOOK = re.compile(r"<!-- notebook (\w+) -->")


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Replace the marks of a page by help texts, the table of preparations, or a notebook."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    if PREPARATIONS in markdown:
        markdown = markdown.replace(PREPARATIONS, _preparations())
    folder = Path(__file__).parent / "notebooks"
    return NOTEBOOK.sub(lambda match: _notebook(folder / f"{match[1]}.ipynb"), markdown)


def _commands() -> str:
    from perturbjax.cli import COMMANDS

    return "\n\n".join(f"## {name}\n\n```text\n{_help(name)}```" for name in COMMANDS)


def _help(command: str) -> str:
    from perturbjax.cli import parse_command

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        parse_command(command, ["--help-all"])
    return output.getvalue()


def _preparations() -> str:
    from perturbjax.profiles.profile_options import PREPARATIONS, Preparation

    default = Preparation()
    rows = ["| name | preparation | fields that differ from their defaults |", "|---|---|---|"]
    for name, preparation in PREPARATIONS.items():
        fields = {
            field: value
            for field, value in vars(preparation.steps).items()
            if value != getattr(default, field)
        }
        settings = ", ".join(f"`{field} = {json.dumps(v)}`" for field, v in fields.items())
        rows.append(f"| `{name}` | {preparation.help} | {settings} |")
    return "\n".join(rows)


def _notebook(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(part for cell in cells for part in _cell(cell))


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    language = "sh" if source.startswith("!") else "python"
    code = f"```{language}\n{source.removeprefix('!')}\n```"
    return [code, *(_output(output) for output in cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return "<div>" + "".join(data["text/html"]).replace("\n", " ") + "</div>"
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"<pre><code>{html.escape(text.rstrip())}</code></pre>".replace("\n\n", "\n&#8203;\n")
