"""Help texts: 80 columns, options grouped, defaults and choices taken from the options dataclasses."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from perturbjax.cli.parsing import Flag

#: Width of a help text, and the column where descriptions start.
WIDTH, INDENT = 80, 24
#: Longer help texts list the flags of optional groups by name only; `--help-all` prints everything.
SCREEN_LINES = 50

_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


#: Names that a flag accepts, with or without descriptions.
Names = Mapping[str, str] | Sequence[str]


def render(
    flags: Sequence[Flag],
    prog: str,
    description: str,
    examples: Sequence[str],
    choices: Mapping[str, Names],
    *,
    full: bool = False,
) -> str:
    """Format the help of a command.

    Args:
        flags: flags in the order of the help.
        prog: command name.
        description: purpose of the command.
        examples: command lines without `prog`.
        choices: field name -> names to list.
        full: describe every flag, however long the text becomes.
    """
    groups: dict[str, list[Flag]] = {"Options": []}
    for flag in flags:
        groups.setdefault(flag.group, []).append(flag)
    needed = [_signature(flag, choices) for flag in flags if flag.default is MISSING]
    head = [*_wrap(f"usage: {' '.join([prog, *needed, '[options]'])}", "    "), ""]
    head += _wrap(" ".join(description.split()))
    if examples:
        lines = (_wrap(f"{prog} {line}", "    ", WIDTH - 6) for line in examples)
        head += ["", "Examples:", *(f"  {line}" for parts in lines for line in _continued(parts))]
    described = {
        title: [line for flag in group for line in _describe(flag, choices, full)]
        for title, group in groups.items()
    }
    body = [line for title, text in described.items() for line in ("", f"{title}:", *text)]
    if not full and len(head) + len(body) > SCREEN_LINES:
        body = ["", "Options:", *described.pop("Options")]
        for title in [t for t in described if any(f.default is MISSING for f in groups[t])]:
            body += ["", f"{title}:", *described.pop(title)]
        body += ["", f"More options ({prog} --help-all describes them):"]
        for title in described:
            names = " ".join(flag.spelling for flag in groups[title])
            body += [f"  {title}:", *_wrap(f"    {names}", "    ")]
    return "\n".join([*head, *body]) + "\n"


def title(kind: type) -> str:
    """The title of a group: the first line of the docstring of its dataclass."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def sentences(kind: type) -> dict[str, str]:
    """The string literal below each field in the source of a dataclass, on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body = getattr(tree, "body", [])
    return {
        getattr(field.target, "id", ""): " ".join(str(ast.literal_eval(text.value)).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def value_type(hint: Any) -> Any:
    """The type of one value: `int` for `int | None` and for `tuple[int, ...]`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def columns(rows: Mapping[str, str], indent: int) -> list[str]:
    """Names with their descriptions at column `indent`; long names have a line of their own."""
    lines = []
    for name, text in rows.items():
        first, *others = _wrap(text, width=WIDTH - indent)
        fits = len(name) + 4 <= indent
        lines += (
            [f"  {name:{indent - 2}}{first}".rstrip()]
            if fits
            else [*_wrap(f"  {name}", "      "), f"{'':{indent}}{first}"]
        )
        lines += [f"{'':{indent}}{line}" for line in others]
    return lines


def _describe(flag: Flag, choices: Mapping[str, Names], full: bool) -> list[str]:
    """The lines of one flag: spelling, value, sentence, names and default."""
    names, text = choices.get(flag.name, ()), flag.text
    if isinstance(names, Mapping) and full:
        text += " " + " ".join(f"{name}: {words}." for name, words in names.items())
    elif names and "{" not in _signature(flag, choices):
        text += f" One of {', '.join(names)}."
    default = _default(flag)
    return columns({_signature(flag, choices): f"{text} ({default})" if default else text}, INDENT)


def _signature(flag: Flag, choices: Mapping[str, Names]) -> str:
    """`--flag VALUE`, as in a usage line."""
    if flag.metadata.get("positional"):
        return _value(flag, ())
    if flag.hint is bool:
        negated = f", --no-{flag.spelling[2:]}" if flag.default else ""
        return f"{flag.spelling}{negated}"
    return f"{flag.spelling} {_value(flag, choices.get(flag.name, ()))}"


def _value(flag: Flag, names: Names) -> str:
    """The placeholder of a flag's value: `N`, `{a,b}`, `PATH [PATH ...]`."""
    kind, counts = value_type(flag.hint), typing.get_args(flag.hint)
    names = names or (typing.get_args(kind) if typing.get_origin(kind) is Literal else ())
    metavar = flag.metadata.get("metavar") or _METAVARS.get(kind, "TEXT")
    if flag.metadata.get("positional"):
        metavar = flag.name.removesuffix("s").upper()
    elif names and "metavar" not in flag.metadata:
        metavar = _braces(names) if len(_braces(names)) <= WIDTH - INDENT else "NAME"
    if "const" in flag.metadata:
        return f"[{metavar}]"
    if typing.get_origin(flag.hint) is not tuple:
        return metavar
    return (
        f"{metavar} [{metavar} ...]"
        if counts[-1] is Ellipsis
        else " ".join([metavar] * len(counts))
    )


def _braces(names: Iterable[object]) -> str:
    return "{" + ",".join(map(str, names)) + "}"


def _default(flag: Flag) -> str:
    """`required`, or the default as it would be typed; nothing for empty defaults."""
    value = flag.default
    if value is MISSING:
        return "required"
    if flag.hint is bool or value in (None, "", ()):
        return "default: yes" if value is True else ""
    if "show" in flag.metadata:
        return f"default: {flag.metadata['show'](value)}"
    parts = value if isinstance(value, tuple) else (value,)
    return "default: " + " ".join(
        f"{part:.6g}" if isinstance(part, float) else str(part) for part in parts
    )


def _continued(parts: Sequence[str]) -> list[str]:
    """Lines of one command with the backslashes that a shell needs."""
    return [*(f"{part} \\" for part in parts[:-1]), parts[-1]]


def _wrap(text: str, indent: str = "", width: int = WIDTH) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]
