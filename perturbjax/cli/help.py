"""Help texts: 80 columns, options in groups, defaults and choices from the options dataclasses and
tables."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

#: Width of a help text, and the column where descriptions start.
WIDTH, INDENT = 80, 24
#: Longer help texts list the flags of optional groups by name only; `--help-all` describes them.
SCREEN_LINES = 50

_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def render(
    parser: argparse.ArgumentParser,
    flags: Sequence[Any],
    add: Callable[..., None],
    *,
    full: bool,
    examples: Sequence[str] = (),
    choices: Callable[[], Mapping[str, Collection[str]]] = dict,
) -> str:
    """Format the help of a command.

    Args:
        parser: parser without arguments, with name and description of the command.
        flags: `parsing.Flag` objects in the order of the help.
        add: `parsing.add_argument`.
        full: describe every flag, however long the text becomes.
        examples: command lines without the name of the command.
        choices: returns field name -> names to list.
    """
    required = [signature(flag) for flag in flags if flag.default is MISSING]
    parser.usage = "\n    ".join(_wrap(" ".join([parser.prog, *required, "[options]"]), 8))
    lines = (" \\\n      ".join(_wrap(f"{parser.prog} {line}", 8)) for line in examples)
    about = "\n".join(_wrap(parser.description or ""))
    parser.description = "\n  ".join([f"{about}\n\nexamples:", *lines]) if examples else about
    # The raw formatter leaves the line breaks of the examples unchanged.
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(
        prog, max_help_position=INDENT, width=WIDTH
    )
    groups = {flag.group: parser.add_argument_group(flag.group) for flag in flags}
    names = choices()
    for flag in flags:
        text = _describe(flag, tuple(names.get(flag.name, ())), full)
        # argparse formats help texts with %, so a literal % is doubled.
        add(groups[flag.group], flag, help=text.replace("%", "%%"), metavar=_metavar(flag))
    if not full and parser.format_help().count("\n") > SCREEN_LINES:
        brief = [f"Described by {parser.prog} --help-all:"]
        # "Options" and groups with a required flag stay in the short help.
        for title in groups.keys() - {"Options"} - {f.group for f in flags if f.default is MISSING}:
            parser._action_groups.remove(groups[title])
        for title, group in groups.items():
            if group not in parser._action_groups:
                listed = " ".join(flag.spelling for flag in flags if flag.group == title)
                wrapped = _wrap(f"{title}: {listed}", 4)
                brief += [f"  {wrapped[0]}", *(f"    {line}" for line in wrapped[1:])]
        parser.epilog = "\n".join(brief)
    return parser.format_help()


def sentences(kind: type) -> dict[str, str]:
    """The string literal below each field in the source of a dataclass, on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return {
        getattr(field.target, "id", ""): " ".join(str(ast.literal_eval(text.value)).split())
        # A help sentence is an expression that directly follows an annotated field.
        for field, text in itertools.pairwise(getattr(tree, "body", []))
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def value_type(hint: Any) -> Any:
    """The type of one value: `int` for `int | None` and for `tuple[int, ...]`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def signature(flag: Any) -> str:
    """A required flag with its value, for the usage line."""
    value = _metavar(flag) or ""
    value += f" [{value} ...]" if typing.get_origin(flag.hint) is tuple else ""
    return value if flag.metadata.get("positional") else f"{flag.spelling} {value}"


def _metavar(flag: Any) -> str | None:
    """The placeholder of a value; None for short lists of choices, which argparse formats."""
    kind = value_type(flag.hint)
    names = ",".join(map(str, typing.get_args(kind)))
    if flag.metadata.get("positional"):
        return flag.name.removesuffix("s").upper()
    if names and len(names) < WIDTH - INDENT and typing.get_origin(flag.hint) is not tuple:
        return None
    return flag.metadata.get("metavar") or ("NAME" if names else _METAVARS.get(kind, "TEXT"))


def _describe(flag: Any, names: Collection[str], full: bool) -> str:
    """The sentence of a flag, its names or choices, and its default."""
    table, value = flag.metadata.get("table", {}), flag.default
    if not names and typing.get_origin(flag.hint) is tuple:
        names = typing.get_args(value_type(flag.hint))
    # Short lists of choices are already in the placeholder.
    listed = (names or table) if names or _metavar(flag) else ()
    text = flag.text + (f" One of {', '.join(listed)}." if listed else "")
    if full and table:
        text = " ".join([flag.text, *(f"{name}: {row.help}." for name, row in table.items())])
    if value is MISSING or value is False or value in (None, "", ()):
        return f"{text} (required)" if value is MISSING else text
    parts = (
        value if isinstance(value, tuple) else (flag.metadata.get("show", lambda one: one)(value),)
    )
    default = " ".join(f"{part:.6g}" if isinstance(part, float) else str(part) for part in parts)
    return f"{text} (default: {'yes' if value is True else default})"


def _wrap(text: str, margin: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH - margin, break_long_words=False, break_on_hyphens=False)
