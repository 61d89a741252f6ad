"""What is shown is what was meant, wherever text comes from; and no end of a command is a traceback."""

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
from perturbjax.core.options import parse_options
from perturbjax.data.splits import ManifestConfig

HOSTILE = ["benzo[a]pyrene", "a[/b]", "[red]", ":smile:", "$x_{$", "=HYPERLINK(1)", "<b>"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_on_a_terminal_is_shown_as_it_is(capsys, text):
    console.print(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_control_characters_do_not_reach_the_terminal(capsys):
    PlainConsole().print("a\x1b[2Jb\x07")
    assert capsys.readouterr().out == "a�[2Jb�\n"


def test_a_plot_reads_no_formula(tmp_path):
    """Outside these settings `$x_{$` raises while drawing, and loses the figure."""
    with matplotlib.rc_context(PLOT_TEXT):
        figure = Figure()
        figure.subplots().set_title("$x_{$")
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_html_is_escaped_inside_quotes_too():
    assert html_text('<a title="\'">') == "&lt;a title=&quot;&#x27;&quot;&gt;"


def test_a_spreadsheet_runs_nothing_of_a_table(tmp_path):
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
def test_what_is_guarded_for_spreadsheets_is_read_back(text):
    assert csv_value(csv_text(text)) == text


def left(capsys, command) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_command(command)
    return ended.value.code, capsys.readouterr().err


def raises(error: BaseException):
    def command() -> None:
        raise error

    return command


def wrapped() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard-0")
    except OSError as error:
        raise ValueError("a library's own words") from error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (raises(InputError("two\nlines \x1b[2J")), "error: two lines �[2J\n"),
        (raises(OSError(errno.ENOSPC, "full", "/data/x")), "no space left on the disk of /data/x"),
        (
            raises(RuntimeError(f"RESOURCE_EXHAUSTED: {os.strerror(errno.ENOSPC)}")),
            "no space left on the disk;",
        ),
        (wrapped, "no space left on the disk of shard-0"),
        (raises(MemoryError()), "out of memory"),
    ],
)
def test_what_nobody_planned_ends_in_one_line(capsys, command, words):
    status, said = left(capsys, command)
    assert status == 2 and words in said and said.count("\n") == 1


def test_a_fault_of_our_own_is_still_a_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raises(ZeroDivisionError()))


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"]])
def test_a_reader_that_leaves_is_no_traceback(words):
    """As `perturbjax train --help | head -1`, with a pipe that is closed before anything is written."""
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


def test_a_word_that_does_not_fit_is_said_without_a_box():
    with pytest.raises(
        InputError, match=r"^Error parsing --folds: .*'two'.*run perturbjax split --help\)|--folds"
    ):
        parse_options(
            ManifestConfig, ["--data", "d", "--out", "o", "--folds", "two"], prog="perturbjax split"
        )


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json: is nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_a_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf")
    with pytest.raises(InputError, match="none: cannot be read"):
        file_digest(Path(tmp_path / "none"))


def test_names_of_classes_come_through_json_as_they_are(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(HOSTILE))
    assert read_json(tmp_path / "labels.json") == HOSTILE


@pytest.mark.parametrize("module", ["perturbjax.cli", "data_prep"])
def test_commands_are_listed_where_python_drops_docstrings_and_assertions(module):
    done = subprocess.run(
        [sys.executable, "-OO", "-m", module, "--help"], capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and not done.stderr
        and ("build" in done.stdout)
        and "Traceback" not in done.stdout
    )
