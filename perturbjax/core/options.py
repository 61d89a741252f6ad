"""Checks of option values, and parsing of options dataclasses from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.text import Text

from perturbjax.core.errors import InputError
from perturbjax.core.messages import CONTROL

#: Whole numbers of options stay below this: more is a slip of the keyboard, and overflows somewhere.
LARGEST = 2**32


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
                require(
                    flag,
                    repr(str(one)),
                    not CONTROL.search(str(one)),
                    "text without control characters",
                )


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
        require(
            "out", path, path.suffix in suffixes, f"a name that ends in {' or '.join(suffixes)}"
        )


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
    lines = [
        line.strip("│ ")
        for line in Text.from_ansi(drawn).plain.splitlines()
        if not line.startswith(("╭", "╰"))
    ]
    rule = next((at for at, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    hint = next((line for line in lines[rule:] if line.startswith("For full helptext")), "")
    return " ".join([*lines[:rule], f"({hint[0].lower()}{hint[1:]})" if hint else ""]).strip()
