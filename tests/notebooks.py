"""Runs notebooks without Jupyter: Python cells in one namespace, `!` lines in a shell with {names} filled in.

python tests/notebooks.py NOTEBOOK [FOLDER]     runs one in FOLDER, and keeps what it showed in the file
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
    """Run every code cell in `folder`; the notebook's cells, with what each showed."""
    cells = json.loads(notebook.read_text())["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for number, cell in enumerate(
            (cell for cell in cells if cell["cell_type"] == "code"), start=1
        ):
            cell["execution_count"], cell["outputs"] = (
                number,
                _run("".join(cell["source"]), names, number),
            )
    return cells


def _run(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    if source.startswith("!"):
        return _stream(_shell(source[1:].format(**names)))
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = (
            None
            if last is None
            else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        )
    return _stream(said.getvalue()) + ([] if value is None else [_result(value, number)])


def _shell(line: str) -> str:
    command = line.replace("perturbjax ", f"{sys.executable} -m perturbjax ", 1)
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command, shell=True, text=True, env=environment, capture_output=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def _stream(text: str) -> list[dict[str, Any]]:
    return (
        [{"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}]
        if text
        else []
    )


def _result(value: Any, number: int) -> dict[str, Any]:
    shown = getattr(value, "_repr_html_", lambda: None)()
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if shown:
        data["text/html"] = shown.splitlines(keepends=True)
    return {
        "output_type": "execute_result",
        "execution_count": number,
        "metadata": {},
        "data": data,
    }


if __name__ == "__main__":
    path = Path(sys.argv[1]).absolute()
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    whole = json.loads(path.read_text())
    path.write_text(
        json.dumps({**whole, "cells": execute(path, folder)}, indent=1, ensure_ascii=False) + "\n"
    )
