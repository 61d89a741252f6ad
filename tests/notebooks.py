"""Run notebooks without Jupyter: Python cells in one namespace, `!` lines in a shell.

    python tests/notebooks.py NOTEBOOK [FOLDER]

runs a notebook in FOLDER and stores its output in the file. Names in braces in `!` lines are
replaced by the values of Python variables.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def execute(notebook: Path, folder: Path) -> list[dict[str, Any]]:
    """Run every code cell in a folder; return the cells with their outputs."""
    cells = json.loads(notebook.read_text())["cells"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = (cell for cell in cells if cell["cell_type"] == "code")
    with contextlib.chdir(folder):
        for number, cell in enumerate(code, start=1):
            cell["execution_count"] = number
            cell["outputs"] = _run("".join(cell["source"]), namespace, number)
    return cells


def _run(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    if source.startswith("!"):
        return _stream(_shell(source[1:].format(**namespace)))
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    results = [] if value is None else [_result(value, number)]
    return _stream(printed.getvalue()) + results


def _shell(line: str) -> str:
    command = line.replace("perturbjax ", f"{sys.executable} -m perturbjax ", 1)
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command, shell=True, text=True, env=environment, capture_output=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def _stream(text: str) -> list[dict[str, Any]]:
    if not text:
        return []
    return [{"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}]


def _result(value: Any, number: int) -> dict[str, Any]:
    html = getattr(value, "_repr_html_", lambda: None)()
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if html:
        data["text/html"] = html.splitlines(keepends=True)
    return {
        "output_type": "execute_result",
        "execution_count": number,
        "metadata": {},
        "data": data,
    }


if __name__ == "__main__":
    path = Path(sys.argv[1]).absolute()
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    notebook = json.loads(path.read_text()) | {"cells": execute(path, folder)}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
