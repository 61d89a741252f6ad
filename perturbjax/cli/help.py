"""What a command says of itself: 80 columns, real defaults and choices, options under the sentence that joins them.

Everything comes from the options dataclass: its fields, their types, the sentences below them, and the docstrings of
the dataclasses it holds. A command of many options says all of them under `--help-all` only.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

#: Words that ask for it.
ASKED = ("-h", "--help", "--help-all")
WIDTH = 80
#: Columns of the flags; words begin after them.
FLAGS = 24
#: Lines that a help may have before groups that hold nothing required are told by their flags alone.
SCREENFUL = 50

_KINDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as it is shown."""

    flag: str
    """`--folds`, or the name of a positional argument."""
    values: str
    """What follows the flag."""
    words: str
    """What it means, and its default."""
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that stand together."""

    title: str
    options: tuple[Option, ...]

    @property
    def required(self) -> bool:
        return any(option.required for option in self.options)


def render(
    kind: type,
    prog: str,
    about: str,
    default: Any = None,
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    more: Sequence[Option] = (),
    everything: bool = False,
) -> str:
    """The help of a command, as text that ends in a line break.

    Args:
        kind: the options dataclass.
        prog: words that run the command.
        about: what it does, in a sentence; lines of it that begin with `prog` are examples.
        default: an instance whose values are shown as defaults, in place of the dataclass's own.
        choices: names that an option of text may have, by its field.
        more: options that are not of the dataclass.
        everything: whether groups of options are told in full however many there are.
    """
    own, *groups = _groups(kind, default, dict(choices or {}))
    own = Group("Options", (*more, *own.options))
    words, examples = _about(about, prog)
    needed = [
        _usage(option) for group in (own, *groups) for option in group.options if option.required
    ]
    head = [*_wrap(f"usage: {' '.join([prog, *needed, '[options]'])}", "    "), "", *_wrap(words)]
    head += (
        ["", "Examples:", *(part for line in examples for part in _command(line))]
        if examples
        else []
    )
    full = [line for group in (own, *groups) for line in _full(group)]
    if everything or len(head) + len(full) <= SCREENFUL:
        return "\n".join([*head, *full]) + "\n"
    shown = [
        line for group in (own, *groups) if group is own or group.required for line in _full(group)
    ]
    rest = [line for group in groups if not group.required for line in _brief(group)]
    last = ["", f"More options ({prog} --help-all says what each means):", *rest]
    return "\n".join([*head, *shown, *last]) + "\n"


def listed(commands: Mapping[str, str]) -> str:
    """Names with what they do, below each other."""
    width = max(map(len, commands)) + 4
    told = ((name, _wrap(words, width=WIDTH - width)) for name, words in commands.items())
    return "\n".join(
        f"{'  ' + name if first else '':{width}}{line}"
        for name, lines in told
        for first, line in zip([True, *[False] * len(lines)], lines, strict=False)
    )


def _about(about: str, prog: str) -> tuple[str, list[str]]:
    lines = inspect.cleandoc(about).splitlines()
    examples = [line.strip() for line in lines if line.strip().startswith(f"{prog} ")]
    return " ".join(
        " ".join(line for line in lines if line.strip() not in examples).split()
    ), examples


def _command(line: str) -> list[str]:
    """A command to be copied, continued as a shell continues it."""
    *parts, last = _wrap(f"  {line}", "      ", WIDTH if len(line) <= WIDTH - 2 else WIDTH - 2)
    return [*(f"{part} \\" for part in parts), last]


def _usage(option: Option) -> str:
    return f"{option.flag} {option.values}".strip()


def _full(group: Group) -> Iterator[str]:
    yield from ("", *_wrap(f"{group.title}:"))
    for option in group.options:
        flags, words = f"  {_usage(option)}", _wrap(option.words, width=WIDTH - FLAGS)
        if len(flags) + 2 > FLAGS:
            yield from _wrap(flags, "      ")
            flags = ""
        for line in words:
            yield f"{flags:{FLAGS}}{line}".rstrip()
            flags = ""


def _brief(group: Group) -> Iterator[str]:
    yield from _wrap(f"  {group.title}:", "  ")
    yield from _wrap(
        "      " + " ".join(option.flag.split(",")[0] for option in group.options), "      "
    )


def _wrap(text: str, indent: str = "", width: int = WIDTH) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _groups(kind: Any, default: Any, choices: dict[str, Sequence[str]]) -> list[Group]:
    """The command's own options first, then those of every dataclass it holds."""
    hints, said = typing.get_type_hints(kind, include_extras=True), _sentences(kind)
    own: list[Option] = []
    held: list[Group] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = _default(field) if default is None else getattr(default, field.name)
        plain: Any = (
            typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        )
        if dataclasses.is_dataclass(plain):
            first, *rest = _groups(
                typing.cast(type, plain), None if _is_missing(value) else value, choices
            )
            # A dataclass that is nothing but groups of its own lends its few options to the command.
            own += first.options if rest else ()
            held += rest if rest else [first]
        else:
            words = " ".join(said.get(field.name, "").split())
            own.append(_option(field.name, hint, value, words, choices.get(field.name)))
    return [Group(_title(kind), tuple(own)), *held]


def _title(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def _option(name: str, hint: Any, value: Any, words: str, choices: Sequence[str] | None) -> Option:
    required = _is_missing(value)
    values = _choice(choices) if choices else _values(hint)
    if choices and len(values) > WIDTH - FLAGS:
        values, words = "NAME", f"{words} One of {', '.join(choices)}."
    if _is_positional(hint):
        return Option(values, "", f"{words} (required)".strip(), required=True)
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        flag = f"{flag}, --no-{name.replace('_', '-')}" if value else flag
    shown = "required" if required else _shown(value)
    return Option(flag, values, f"{words} ({shown})" if shown else words, required)


def _values(hint: Any) -> str:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return _values(parts[0])
    if typing.get_origin(hint) is Literal:
        return _choice(parts)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _values(next(part for part in parts if part is not type(None)))
    if typing.get_origin(hint) is tuple:
        one = _values(parts[0])
        return f"{one} [{one} ...]" if parts[-1] is Ellipsis else " ".join(map(_values, parts))
    return _KINDS.get(hint, "")


def _choice(names: Sequence[object]) -> str:
    return "{" + ",".join(map(str, names)) + "}"


def _is_positional(hint: Any) -> bool:
    import tyro

    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return marks == typing.get_args(tyro.conf.Positional[int])[1:]


def _shown(value: Any) -> str:
    """A default as it would be given; nothing where giving none is what it means."""
    if value is None or value is False or value in ("", ()):
        return ""
    if value is True:
        return "default: yes"
    parts = value if isinstance(value, tuple) else (value,)
    return "default: " + " ".join(
        f"{part:.6g}" if isinstance(part, float) else str(part) for part in parts
    )


def _default(field: dataclasses.Field) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _is_missing(value: Any) -> bool:
    import tyro

    return value is dataclasses.MISSING or value is tyro.MISSING


def _sentences(kind: type) -> dict[str, str]:
    """What stands below each field of a dataclass in its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    said = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
        ):
            said[field.target.id] = str(ast.literal_eval(below.value))
    return said
