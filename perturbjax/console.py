"""How every command talks to a person: options that are checked, one-line errors, and progress that says what is left.

Text that comes from data (a compound's name, a path) is shown as it is: `console` knows no markup and no control
characters, and `PLOT_TEXT`, `html_text` and `csv_text` do the same for the three other places it is shown in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import html
import io
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

#: Characters that move a cursor, recolour or clear a terminal, or end a line.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: Seconds between progress lines where the output is a file or a pipe.
PLAIN_INTERVAL_S = 10.0
#: Beginnings of text that a spreadsheet runs as a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Settings of matplotlib's under which text is text; else what stands between two `$` is read as a formula.
PLOT_TEXT: Any = {"text.parse_math": False}
#: Whole numbers of options stay below this: more is a slip of the keyboard, and overflows somewhere.
LARGEST = 2**32
#: What a disk, a quota or a limit on a file's size says when it is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Exit statuses: as a shell reports the end by SIGINT and by SIGPIPE.
REFUSED, INTERRUPTED, NOBODY_READS = 2, 130, 141


def terminal_text(text: str) -> str:
    """Text for a terminal: control characters are shown as �, line breaks and tabs are kept."""
    return CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else "�", text)


def html_text(value: object) -> str:
    """Text for an HTML page, inside quotes too."""
    return html.escape(str(value))


def csv_text(value: T) -> T | str:
    """A cell for a CSV: text that a spreadsheet would run as a formula begins with an apostrophe instead.

    Numbers written as text stay as they are, and so does everything but text. `csv_value` reads it back. Tables that
    other programs write too (`load_data.csv`, tables of features) are not guarded: they must come back as they were.
    """
    if not isinstance(value, str) or not value.lstrip("'").startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value


def csv_value(cell: T) -> T | str:
    """What `csv_text` made a cell of."""
    guarded = isinstance(cell, str) and cell.startswith("'") and cell.lstrip("'").startswith(FORMULA)
    return cell[1:] if isinstance(cell, str) and guarded else cell


class PlainConsole(Console):
    """A console to which text is text: no markup, no emoji codes, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"highlight": False, "soft_wrap": True, **settings}, markup=False, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(terminal_text(text), **settings)


#: Everything a person reads while waiting goes to stderr; stdout carries results.
console = PlainConsole(stderr=True)


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, where, and what to do."""


class Terminated(BaseException):
    """SIGTERM came (Slurm, Kubernetes and `kill` send it). The message is one line: what was kept, and what to do."""


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run a command and leave: status 0, 2 after one line on stderr, 130 after Ctrl-C, 143 after SIGTERM.

    One line is said of an `InputError`, and of a disk or a memory that is full, wherever that is met. Where nobody
    reads the output any more (`… --help | head`) the command ends without a word, with status 141.
    """
    try:
        if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
            signal.signal(signal.SIGTERM, _terminate)
        try:
            command()
        finally:
            sys.stdout.flush()
    except InputError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more on leaving
        sys.exit(NOBODY_READS)
    except Terminated as error:
        print(f"terminated: {error}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except MemoryError as error:
        _refuse(f"out of memory ({error or 'no more is given'}); free some, or give a smaller --batch-size")
    except Exception as error:
        if (where := _full_disk(error)) is None:
            raise
        _refuse(f"no space left on {where}; free some, then run the same command again")
    sys.exit(0)


def _terminate(number: int, frame: object) -> NoReturn:
    """Unwind as after Ctrl-C, so that nothing is left half-written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
    raise Terminated("run the same command again to go on")


def _refuse(words: str) -> NoReturn:
    print(f"error: {terminal_text(' '.join(words.split()))}", file=sys.stderr)
    sys.exit(REFUSED)


def _full_disk(error: BaseException | None) -> str | None:
    """What is full, if that is what an error or one of its causes says; libraries in C++ say it in words alone."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(os.strerror(n) in str(error) for n in FULL):
            name = getattr(error, "filename", None)
            return f"the disk of {name}" if name else "the disk"
        error = error.__cause__ or error.__context__
    return None


def names_in(text: str) -> tuple[str, ...]:
    """The names of an option that takes several with commas between them; none of an empty text."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def require(flag: str, value: object, holds: bool, words: str) -> None:
    """Refuse an option's value unless `holds`.

    Raises:
        InputError: `--flag value: must be words`.
    """
    if not holds:
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(f"--{flag} {shown}: must be {words}")


def require_sound(options: Any) -> None:
    """Refuse what no option of a dataclass may be: a number that is not finite or is absurd, text that is no line, a
    name that is none of its choices.

    Called first in the `__post_init__` of every options dataclass, whose own rules (`require`) follow.

    Raises:
        InputError: names the flag, its value and what it may be.
    """
    kind: Any = type(options)
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        flag, choices = option.name.replace("_", "-"), _choices(kind).get(option.name)
        for one in value if isinstance(value, tuple) else (value,):
            if choices is not None:
                require(flag, value, one in choices, f"one of {', '.join(map(str, choices))}")
            elif isinstance(one, float):
                require(flag, value, math.isfinite(one), "a finite number")
            elif isinstance(one, int):
                require(flag, value, -LARGEST < one < LARGEST, "less than 2^32")
            elif isinstance(one, str | Path):
                require(flag, repr(str(one)), not CONTROL.search(str(one)), "text without control characters")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """What the options of a dataclass may be, where that is a `Literal`, alone or many times in a tuple.

    The command line refuses all else by itself; Python does not."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(inner) is Literal:
            found[name] = get_args(inner)
    return found


def require_output(path: Path, *suffixes: str) -> None:
    """Refuse an output that is no name of its own (`.`, `/`, empty), or is there and cannot be replaced (a device).

    With `suffixes` it is a file that ends in one of them, else a folder.

    Raises:
        InputError: names the flag `--out`.
    """
    require(
        "out",
        path,
        path.name not in ("", "..") and "\0" not in str(path),
        "the name of what to make, not a folder that is there",
    )
    is_kind, kind = (path.is_file, "a regular file") if suffixes else (path.is_dir, "a folder")
    require("out", path, is_kind() or not os.path.exists(path), f"a new name, or {kind}")
    if suffixes:
        require("out", path, path.suffix in suffixes, f"a name that ends in {' or '.join(suffixes)}")


def parse_options(kind: Any, argv: Sequence[str] | None = None, **settings: Any) -> Any:
    """An options dataclass from the words of a command line; `settings` are those of `tyro.cli`.

    Raises:
        InputError: a word is no flag, or a value does not fit it, in one line where tyro draws a box.
        SystemExit: after `--help`.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=None if argv is None else list(argv), **settings)
    except SystemExit as left:
        if not left.code:
            raise
        raise InputError(_out_of_box(said.getvalue())) from None


def _out_of_box(drawn: str) -> str:
    """The words in a box of tyro's: its lines without the frame, as one."""
    lines = [line.strip("│ ") for line in Text.from_ansi(drawn).plain.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((at for at, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    hint = next((line for line in lines[rule:] if line.startswith("For full helptext")), "")
    return " ".join([*lines[:rule], f"({hint[0].lower()}{hint[1:]})" if hint else ""]).strip()


def track(items: Iterable[T], *, total: int, label: str, unit: str, done: int = 0) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done, the rate and the time left.

    A live bar on a terminal; elsewhere a plain line every `PLAIN_INTERVAL_S` seconds, so that logs stay readable.
    `done` counts what an earlier run finished: it moves the bar, not the rate.
    """
    if console.is_terminal:
        yield from _track_live(items, total, label, unit, done)
    else:
        yield from _track_plain(items, total, label, unit, done)


def _track_live(items: Iterable[T], total: int, label: str, unit: str, done: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        start = time.monotonic()
        for finished, item in enumerate(items, start=1):
            yield item
            rate = finished / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done + finished, rate=f"{rate:.3g}/s")


def _track_plain(items: Iterable[T], total: int, label: str, unit: str, done: int) -> Iterator[T]:
    start = last = time.monotonic()
    finished = 0
    for finished, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            rate = finished / (now - start)
            left = (total - done - finished) / rate
            console.print(f"{label}: {done + finished}/{total} {unit}, {rate:.3g}/s, {clock(left)} left")
    took = time.monotonic() - start
    console.print(f"{label}: {done + finished}/{total} {unit} in {clock(took)}")


def clock(seconds: float) -> str:
    """`75.2` → `1:15`; under ten seconds one decimal is kept."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
