"""Workflows and container: their commands parse, and their files have the expected structure."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from accepted import accept

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"


def commands_in(text):
    """The words of every `perturbjax COMMAND ...`, with 2 in place of `{names}`."""
    joined = re.sub(r'"\s*\n\s*"', "", text)  # adjacent strings are one
    return [
        shlex.split(re.sub(r"\$?\{[^}]*\}", "2", line))
        for line in re.findall(r"perturbjax ([a-z][^\"\n]*--\S[^\"\n]*)", joined)
    ]


@pytest.mark.parametrize(
    ("name", "count"), [("Snakefile", 3), ("main.nf", 3), ("../Dockerfile", 1)]
)
def test_commands_of_the_workflows_parse(name, count):
    commands = commands_in((EXAMPLES / name).read_text())
    assert len(commands) == count
    for command, *words in commands:
        words = [
            "cells" if (before, word) == ("--preset", "2") else word
            for before, word in zip(["", *words], words, strict=False)
        ]
        accept(command, words)


def test_commands_of_the_script_parse():
    """`tests/e2e/test_folder_to_report.py` runs it."""
    text = (EXAMPLES / "folder_to_report.sh").read_text()
    commands = re.findall(r"^perturbjax (.*)$", text, flags=re.MULTILINE)
    assert len(commands) == 5
    for line in commands:
        # Optional flags are left out, and names of variables take the place of their values.
        plain = re.sub(r"\$\{[^}]*\}", "", line).replace("$", "")
        command, *words = shlex.split(plain)
        accept(command, words)


def test_snakefile_has_valid_rules():
    """A Snakefile is Python with `rule NAME:` blocks of `part: expression, ...`."""
    head, *rules = re.split(
        r"^rule (\w+):\n", (EXAMPLES / "Snakefile").read_text(), flags=re.MULTILINE
    )
    ast.parse(head)
    assert rules[::2] == ["all", "build", "train", "evaluate"]
    for body in rules[1::2]:
        parts = re.split(r"^    (input|output|params|threads|shell):", body, flags=re.MULTILINE)
        for part in parts[2::2]:
            ast.parse(f"f({part.strip()})")


def test_nextflow_script_has_balanced_brackets():
    text = (EXAMPLES / "main.nf").read_text()
    assert [text.count(mark) % 2 for mark in ('"""', "'")] == [0, 0]
    assert text.count("{") == text.count("}") and text.count("(") == text.count(")")
    processes = re.findall(r"^process (\w+) \{(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in processes] == ["BUILD", "TRAIN", "EVALUATE"]
    assert all({"input:", "output:", "script:"} <= set(body.split()) for _, body in processes)


def test_dockerfile_copies_existing_files():
    lines = [
        line
        for line in (REPOSITORY / "Dockerfile").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert {line.split()[0] for line in lines} <= {
        "FROM",
        "ARG",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "ENTRYPOINT",
        "CMD",
    }
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert all((REPOSITORY / source).exists() for source in copied)
    allowed = (REPOSITORY / ".dockerignore").read_text()
    assert all(f"!{source}\n" in allowed for source in copied)
