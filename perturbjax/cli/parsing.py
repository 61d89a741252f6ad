"""Command line parsing: one flag for each field of an options dataclass.

Standard argparse parses the words and formats the help. This module maps dataclass fields to its
arguments:

* a nested dataclass is a group; its title is the first line of the class docstring;
* the string literal below a field is its help sentence;
* the functions of `perturbjax.core.options` declare fields without a flag, without dashes, with a
  former name or with their own conversion from text;
* `defaults` replace those of the dataclass by field name, so that presets and the help agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from perturbjax.cli import help
from perturbjax.core.errors import InputError
from perturbjax.core.options import default_of, flag_name

_FEATURES = "run `perturbjax features` with it and pass the table as --features"
_JOB = "use --distributed and set the environment variable {}"
_PREPARE = "choose --prepare NAME, or set the field in a .toml file for --prepare"
_PREPARATION = (
    "normalize normalize-by normalize-to outliers select correlation sphere sphere-method align "
    "sphere-regularization align-to pca pca-variance relative unit-length max-missing"
)
#: Removed flag -> replacement, for the error message.
REMOVED = {
    **{f"--{name}": _PREPARE for name in _PREPARATION.split()},
    **{f"--{name}": _FEATURES for name in ("backbone", "weights", "size", "pool", "augmentations")},
    "--statistics": "choose --preset linear",
    "--compile-cache": "set the environment variable JAX_COMPILATION_CACHE_DIR",
    "--device-count": "use --devices 1, or limit the devices with CUDA_VISIBLE_DEVICES",
    "--coordinator": _JOB.format("JAX_COORDINATOR_ADDRESS"),
    "--processes": _JOB.format("JAX_NUM_PROCESSES"),
    "--process": _JOB.format("JAX_PROCESS_ID"),
    "--keep-best": "one best checkpoint is stored",
    "--cluster-options": "use --cluster slurm:FILE.yaml",
}


#: Start of the message of argparse about required flags.
_MISSING = "the following arguments are required: "


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a one-line `InputError`."""

    #: Flag -> its help sentence, for messages about missing flags.
    sentences: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        if (names := message.removeprefix(_MISSING)) != message:
            texts = {name: self.sentences.get(name, "").rstrip(".") for name in names.split(", ")}
            needs = "; ".join(f"{name} is missing: {text}" for name, text in texts.items())
            raise InputError(f"{needs} (see {self.prog} --help)")
        raise InputError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class Flag(NamedTuple):
    """One field of an options dataclass; `default` is `dataclasses.MISSING` if it is required."""

    name: str
    hint: Any
    default: Any
    text: str
    group: str = "Options"
    metadata: Mapping[str, Any] = {}

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
    defaults: Mapping[str, Any] | None = None,
    parsed: Sequence[Flag] = (),
    first: Sequence[str] = (),
    **texts: Any,
) -> Any:
    """Parse command line words into an options dataclass, or print the help and exit.

    Args:
        kind: options dataclass.
        argv: words after the command name; by default the arguments of this process.
        prog: command name for messages and the help.
        description: purpose of the command; the class docstring by default.
        defaults: field name -> value that replaces the default of the dataclass.
        parsed: flags that the caller has parsed already, for the help.
        first: names of the flags that the help describes first; the others are grouped.
        texts: `examples` and `choices` of `help.render`.

    Raises:
        InputError: a flag is unknown or removed, or a value has the wrong type.
        SystemExit: after `--help` or `--help-all`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog, defaults = prog or Path(sys.argv[0]).name, dict(defaults or {})
    fields = list(flags_of(kind, defaults))
    flags = [flag for flag in fields if not flag.hidden]
    about = " ".join((description or kind.__doc__ or "").split())
    parser = Parser(prog, description=about, add_help=False, allow_abbrev=False)
    if {"-h", "--help", "--help-all"} & set(words):
        flags = _sort_for_help([*parsed, *flags], first)
        full = "--help-all" in words
        print(help.render(parser, flags, add_argument, full=full, **texts), end="")
        sys.exit(0)
    parser.sentences = {flag.spelling: flag.text for flag in flags}
    for flag in flags:
        add_argument(parser, flag, former=flag.metadata.get("former", ()))
    # All valid flags, with former names and the --no-NAME forms.
    spellings = [name for action in parser._actions for name in action.option_strings]
    # Refuse unknown flags before argparse does, so that the message can name a replacement.
    for word in words:
        if word.startswith("--") and word.split("=")[0] not in ("--", *spellings):
            _refuse(word.split("=")[0], prog, spellings, fields)
    return _construct(kind, vars(parser.parse_args(words)), defaults)


def _sort_for_help(flags: Sequence[Flag], first: Sequence[str]) -> list[Flag]:
    """Order flags: those named in `first`, then options without a group, then groups."""
    if first:
        flags = [
            flag._replace(group="Options" if flag.name in first else _rest(flag)) for flag in flags
        ]
    order = {name: number for number, name in enumerate(first)}
    # The stable sort preserves the order otherwise.
    return sorted(flags, key=lambda one: (one.group != "Options", order.get(one.name, len(order))))


def _rest(flag: Flag) -> str:
    return "More options" if flag.group == "Options" else flag.group


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
    # Only nested dataclasses without further groups are groups of the help.
    title = (kind.__doc__ or "").splitlines()[0] if nested and is_leaf else "Options"
    for field in dataclasses.fields(kind):
        hint, metadata = hints[field.name], field.metadata
        if is_group(hint, metadata):
            # No field has the name "", so no field of a group without flags gets a flag.
            inner = only if metadata.get("flag", True) else ("",)
            yield from flags_of(hint, defaults, metadata.get("only", inner), nested + 1)
        else:
            has_flag = metadata.get("flag", True) and (not only or field.name in only)
            default = (defaults or {}).get(field.name, default_of(field))
            settings = {**metadata, "flag": has_flag}
            yield Flag(field.name, hint, default, sentences.get(field.name, ""), title, settings)


def is_group(hint: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether a field is a nested options dataclass rather than one value."""
    return dataclasses.is_dataclass(hint) and "parse" not in metadata


def add_argument(parser: Any, flag: Flag, former: Sequence[str] = (), **settings: Any) -> None:
    """Add a flag to a parser or a group.

    Args:
        parser: parser or argument group.
        flag: the flag.
        former: earlier names of the flag.
        settings: further arguments of `add_argument` of argparse.
    """
    kind, counts = help.value_type(flag.hint), typing.get_args(flag.hint)
    if not flag.metadata.get("positional"):
        # A flag can have another name than the field.
        settings |= {"dest": flag.name, "required": flag.default is dataclasses.MISSING}
    if flag.hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = flag.metadata.get("parse", kind if kind in (int, float, Path) else str)
    if typing.get_origin(flag.hint) is tuple:
        # tuple[T, ...] takes one or more values, tuple[T, T] exactly two.
        settings["nargs"] = "+" if counts[-1] is Ellipsis else len(counts)
    if "const" in flag.metadata:
        settings |= {"nargs": "?", "const": flag.metadata["const"]}
    if typing.get_origin(kind) is Literal:
        settings["choices"] = typing.get_args(kind)
    names = [flag.spelling, *map(flag_name, former)]
    parser.add_argument(*names, default=flag.default, **settings)


def _construct(kind: Any, values: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Build the dataclass; fields without a flag have their defaults or an environment variable."""
    arguments, hints = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, variable = hints[field.name], field.metadata.get("env", "")
        if is_group(hint, field.metadata):
            value = _construct(hint, values, defaults)
        # Some fields without a flag can be set by an environment variable.
        elif text := os.environ.get(variable):
            try:
                value = hint(text)
            except ValueError:
                raise InputError(f"{variable}={text}: must be a number") from None
        else:
            value = values.get(field.name, defaults.get(field.name, default_of(field)))
        arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def _refuse(flag: str, prog: str, spellings: Sequence[str], fields: Sequence[Flag]) -> NoReturn:
    """Name the replacement of a removed flag, or the most similar flag of an unknown one."""
    # Boolean flags also have the form --no-NAME.
    former, names = flag.replace("--no-", "--", 1), {field.name: field for field in fields}
    field = names.get(former[2:].replace("-", "_"))
    instead = REMOVED.get(former, "")
    if field is not None and field.metadata.get("env"):
        instead = f"set the environment variable {field.metadata['env']}"
    elif field is not None and not instead:
        place = "in a file for --recipe, or in Python" if "epochs" in names else "in Python"
        instead = f"its default applies; set the field {field.name} {place}"
    if instead and (instead != _PREPARE or "preparation" in names):
        raise InputError(f"{flag}: was removed from {prog}; {instead}")
    similar = difflib.get_close_matches(flag, spellings, 1)
    advice = f"did you mean {similar[0]}?" if similar else f"see {prog} --help"
    raise InputError(f"{flag}: {prog} has no such flag ({advice})")
