"""Command line parsing: one flag for each field of an options dataclass.

Standard argparse parses the words. This module maps dataclass fields to flags:

* a nested dataclass is a group; its title is the first line of the class docstring;
* the string literal below a field is its help sentence (`perturbjax.cli.help` prints it);
* the functions of `perturbjax.core.options` declare fields without a flag, without dashes, with a former name or with
  their own conversion from text;
* `defaults` replace those of the dataclass by field name, so that presets and the help agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from perturbjax.cli import help
from perturbjax.core.errors import InputError
from perturbjax.core.options import default_of, flag_name

_PREPARE = "choose --prepare NAME, or set the field in a .toml file for --prepare"
_FEATURES = "run `perturbjax features` with it and pass the table as --features"
_JOB = "use --distributed and set the environment variable {}"
#: Removed flags that are no longer fields -> replacement. Fields without a flag are explained by `_replacement`.
REMOVED = {
    **dict.fromkeys(
        (
            "--normalize-by",
            "--normalize-to",
            "--outliers",
            "--select",
            "--correlation",
            "--sphere",
            "--sphere-method",
            "--sphere-regularization",
            "--align",
            "--align-to",
            "--pca",
            "--pca-variance",
            "--relative",
            "--unit-length",
            "--max-missing",
            "--normalize",
        ),
        _PREPARE,
    ),
    **dict.fromkeys(("--backbone", "--weights", "--size", "--pool", "--augmentations"), _FEATURES),
    "--statistics": "choose --preset linear",
    "--compile-cache": "set the environment variable JAX_COMPILATION_CACHE_DIR",
    "--device-count": "use --devices 1, or limit the devices with CUDA_VISIBLE_DEVICES",
    "--coordinator": _JOB.format("JAX_COORDINATOR_ADDRESS"),
    "--processes": _JOB.format("JAX_NUM_PROCESSES"),
    "--process": _JOB.format("JAX_PROCESS_ID"),
    "--keep-best": "one best checkpoint is stored",
    "--cluster-options": "use --cluster slurm:FILE.yaml",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a one-line `InputError`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
        name: field name.
        hint: type of the value.
        default: value without the flag; `dataclasses.MISSING` for required flags.
        text: help sentence.
        group: title of its group in the help.
        metadata: metadata of the field.
    """

    name: str
    hint: Any
    default: Any
    text: str
    group: str = "Options"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def spelling(self) -> str:
        """`--batch-size`, or the field name of a positional argument."""
        name = self.metadata.get("name", self.name)
        return name if self.metadata.get("positional") else flag_name(name)

    @property
    def hidden(self) -> bool:
        """Whether the field has no flag."""
        return not self.metadata.get("flag", True)


def parse_options(
    kind: Any,
    argv: Sequence[str] | None = None,
    *,
    prog: str = "",
    description: str = "",
    examples: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    choices: Callable[[], Mapping[str, help.Names]] | None = None,
    parsed: Sequence[Flag] = (),
) -> Any:
    """Parse command line words into an options dataclass, or print the help and exit.

    Args:
        kind: options dataclass.
        argv: words after the command name; by default the arguments of this process.
        prog: command name for messages and the help.
        description: one sentence; the class docstring by default.
        examples: command lines without `prog`.
        defaults: field name -> value that replaces the default of the dataclass.
        choices: returns field name -> names to list in the help.
        parsed: flags that the caller has parsed already, for the help.

    Raises:
        InputError: a flag is unknown or removed, or a value has the wrong type.
        SystemExit: after `--help` or `--help-all`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog, defaults = prog or Path(sys.argv[0]).name, dict(defaults or {})
    fields = list(flags_of(kind, defaults))
    flags = [flag for flag in fields if not flag.hidden]
    if {"-h", "--help", "--help-all"} & set(words):
        text, names = description or kind.__doc__ or "", choices() if choices else {}
        full = "--help-all" in words
        print(help.render([*parsed, *flags], prog, text, examples, names, full=full), end="")
        sys.exit(0)
    parser = Parser(prog, add_help=False, allow_abbrev=False)
    for flag in flags:
        _add(parser, flag)
    _refuse_unknown(words, parser, [*parsed, *fields])
    return _construct(kind, vars(parser.parse_args(words)), defaults)


def parse_first(argv: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Read text flags that decide the defaults of other flags.

    Returns:
        The value of each flag, empty if absent, and the remaining words.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(flag_name(name), default="")
    values, rest = parser.parse_known_args(list(argv))
    return [getattr(values, name) for name in names], rest


def flags_of(
    kind: Any, defaults: Mapping[str, Any] | None = None, only: Sequence[str] = (), nested: int = 0
) -> Iterator[Flag]:
    """Yield the fields of an options dataclass and of the dataclasses nested in it.

    Args:
        kind: options dataclass.
        defaults: field name -> replaced default.
        only: names of the fields that have a flag; all if empty.
        nested: depth of the dataclass below that of the command.
    """
    hints, sentences = typing.get_type_hints(kind), help.sentences(kind)
    is_leaf = not any(is_group(hints[f.name], f.metadata) for f in dataclasses.fields(kind))
    title = help.title(kind) if nested and is_leaf else "Options"
    for field in dataclasses.fields(kind):
        hint, metadata = hints[field.name], dict(field.metadata)
        if is_group(hint, metadata):
            chosen = only if metadata.get("flag", True) else ("",)
            yield from flags_of(hint, defaults, metadata.get("only", chosen), nested + 1)
            continue
        if only and field.name not in only:
            metadata["flag"] = False
        default = (defaults or {}).get(field.name, default_of(field))
        yield Flag(field.name, hint, default, sentences.get(field.name, ""), title, metadata)


def is_group(hint: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether a field is a nested options dataclass rather than one value."""
    return dataclasses.is_dataclass(hint) and "parse" not in metadata


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    """Add a flag and its former spelling to a parser."""
    settings: dict[str, Any] = {}
    if not flag.metadata.get("positional"):
        settings = {"dest": flag.name, "required": flag.default is dataclasses.MISSING}
    former = [flag_name(name) for name in flag.metadata.get("former", ())]
    add = functools.partial(parser.add_argument, flag.spelling, *former, default=flag.default)
    if flag.hint is bool:
        add(action=argparse.BooleanOptionalAction, **settings)
        return
    kind, counts = help.value_type(flag.hint), typing.get_args(flag.hint)
    if typing.get_origin(flag.hint) is tuple:
        settings["nargs"] = "+" if counts[-1] is Ellipsis else len(counts)
    if "const" in flag.metadata:
        settings |= {"nargs": "?", "const": flag.metadata["const"]}
    if typing.get_origin(kind) is Literal:
        settings["choices"] = typing.get_args(kind)
    convert = kind if kind in (int, float, Path) else str
    add(type=flag.metadata.get("parse", convert), **settings)


def _construct(kind: Any, values: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Build the dataclass; fields without a flag have their defaults or an environment variable."""
    arguments, hints = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if is_group(hint, field.metadata):
            arguments[field.name] = _construct(hint, values, defaults)
            continue
        value = values.get(field.name, defaults.get(field.name, default_of(field)))
        if text := os.environ.get(field.metadata.get("env", "")):
            value = _from_environment(field.metadata["env"], text, hint)
        arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def _from_environment(name: str, text: str, hint: Any) -> Any:
    try:
        return hint(text)
    except ValueError:
        raise InputError(f"{name}={text}: must be a number") from None


def _refuse_unknown(words: Sequence[str], parser: Parser, fields: Sequence[Flag]) -> None:
    """Name the replacement of a removed flag, or the most similar flag of an unknown one.

    Raises:
        InputError: a word is an unknown flag.
    """
    known = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        flag = word.split("=", 1)[0]
        if len(flag) < 4 or not flag.startswith("--") or flag in known:
            continue
        if instead := _replacement(flag.replace("--no-", "--", 1), fields):
            raise InputError(f"{flag}: was removed from {parser.prog}; {instead}")
        similar = difflib.get_close_matches(flag, known, 1)
        advice = f"did you mean {similar[0]}?" if similar else f"see {parser.prog} --help"
        raise InputError(f"{flag}: {parser.prog} has no such flag ({advice})")


def _replacement(flag: str, fields: Sequence[Flag]) -> str:
    """The replacement of a removed flag; empty if there never was such a flag."""
    names = {field.name for field in fields}
    hidden = next((f for f in fields if f.hidden and flag_name(f.name) == flag), None)
    if hidden is not None and hidden.metadata.get("env"):
        return f"set the environment variable {hidden.metadata['env']}"
    if hidden and "recipe" in names and hidden.group not in ("Options", "Compute"):
        return f"choose a --preset, or set {hidden.name} in a .toml file for --recipe"
    if flag in REMOVED and (REMOVED[flag] != _PREPARE or "preparation" in names):
        return REMOVED[flag]
    return f"its value is fixed; in Python, set the field {hidden.name}" if hidden else ""
