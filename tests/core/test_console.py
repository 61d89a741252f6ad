"""Escaping of text from data, and the end of commands: one line and an exit status."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import file_digest, read_json, write_csv
from perturbjax.core.messages import (
    PLOT_TEXT,
    PlainConsole,
    console,
    csv_text,
    csv_value,
    html_text,
)
from perturbjax.data.splits import ManifestConfig

HOSTILE = ["benzo[a]pyrene", "a[/b]", "[red]", ":smile:", "$x_{$", "=HYPERLINK(1)", "<b>"]


@pytest.mark.parametrize("text", HOSTILE)
def test_console_prints_markup_unchanged(capsys, text):
    console.print(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_console_replaces_control_characters(capsys):
    PlainConsole().print("a\x1b[2Jb\x07")
    assert capsys.readouterr().out == "a�[2Jb�\n"


def test_plot_text_is_not_parsed_as_formula(tmp_path):
    """With the default settings of matplotlib, `$x_{$` raises an error while drawing."""
    with matplotlib.rc_context(PLOT_TEXT):
        figure = Figure()
        figure.subplots().set_title("$x_{$")
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_html_text_escapes_quotes():
    assert html_text('<a title="\'">') == "&lt;a title=&quot;&#x27;&quot;&gt;"


def test_write_csv_escapes_formulas(tmp_path):
    table = pd.DataFrame(
        {"=1+1": ["=HYPERLINK(1)", "@x", "-SO3H", "-1.5", "DMSO"], "value": [-1.5, 2, 3, 4, np.nan]}
    )
    write_csv(tmp_path / "table.csv", table)
    back = pd.read_csv(tmp_path / "table.csv")
    assert list(back.iloc[:, 0]) == ["'=HYPERLINK(1)", "'@x", "'-SO3H", "-1.5", "DMSO"]
    assert back.columns[0] == "'=1+1" and back["value"][0] == -1.5
    assert csv_text(-3) == -3


@pytest.mark.parametrize(
    "text", ["=1", "'=1", "''-a", "'plain", "'", "-1.5", "'-1.5", "", "DMSO", "@x"]
)
def test_csv_value_inverts_csv_text(text):
    assert csv_value(csv_text(text)) == text


def run(capsys, command) -> tuple[int, str]:
    """Exit status and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        run_command(command)
    return end.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def full_disk_in_a_library() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard-0")
    except OSError as error:
        raise ValueError("message of a library") from error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (raising(InputError("two\nlines \x1b[2J")), "error: two lines �[2J\n"),
        (raising(OSError(errno.ENOSPC, "full", "/data/x")), "no space left on the disk of /data/x"),
        (
            raising(RuntimeError(f"RESOURCE_EXHAUSTED: {os.strerror(errno.ENOSPC)}")),
            "no space left on the disk. Free space",
        ),
        (full_disk_in_a_library, "no space left on the disk of shard-0"),
        (raising(MemoryError()), "out of memory"),
        (lambda: Path("x" * 300).is_file(), "…: the name is too long"),
    ],
)
def test_expected_errors_end_in_one_line(capsys, command, words):
    status, message = run(capsys, command)
    assert status == 2 and words in message and message.count("\n") == 1


def test_unexpected_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"]])
def test_closed_output_pipe_ends_without_traceback(words):
    """As in `perturbjax train --help | head -1`, with a pipe that is closed from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "perturbjax.cli", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_value_of_wrong_type_names_flag_and_value():
    words = ["--data", "d", "--out", "o", "--folds", "two"]
    with pytest.raises(InputError, match=r"^--folds: invalid int value: 'two' \(see .* --help\)"):
        parse_options(ManifestConfig, words, prog="perturbjax split")


def test_read_json_refuses_deep_nesting(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json: is nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf")
    with pytest.raises(InputError, match="none: cannot be read"):
        file_digest(Path(tmp_path / "none"))


def test_read_json_preserves_hostile_text(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(HOSTILE))
    assert read_json(tmp_path / "labels.json") == HOSTILE


@pytest.mark.parametrize("module", ["perturbjax.cli", "data_prep"])
def test_help_lists_commands_without_docstrings(module):
    done = subprocess.run(
        [sys.executable, "-OO", "-m", module, "--help"], capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and not done.stderr
        and ("build" in done.stdout)
        and "Traceback" not in done.stdout
    )
