"""Names of arguments and flags in messages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from perturbjax.core.errors import argument_names


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--folds 1: must be 2 or more", "folds 1: must be 2 or more"),
        ("--label-column x: pass --init-from", "label_column x: pass init_from"),
        (
            "--data: run `perturbjax build --out x` first",
            "data: run `perturbjax build --out x` first",
        ),
        ("well A--1 and a - b", "well A--1 and a - b"),
    ],
)
def test_argument_names_replace_flags_outside_commands(message, expected):
    assert argument_names(message) == expected


def test_python_errors_name_arguments_and_the_command_line_names_flags():
    code = "import perturbjax\ntry: perturbjax.preset('x')\nexcept Exception as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("preset x: unknown; choose one of paper")
    words = ["train", "--preset", "x", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "perturbjax", *words], capture_output=True, text=True, timeout=60
    )
    assert done.stderr.startswith("error: --preset x: unknown; choose one of paper")
