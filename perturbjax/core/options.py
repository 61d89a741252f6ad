"""Fields and value checks of options dataclasses.

Each command has one frozen dataclass of options. `perturbjax.cli.parsing` makes its flags from the
fields; the string literal below a field is its help sentence. Every `__post_init__` calls
`require_sound` first, then its `require` checks, so that the same values are valid in Python,
in files and on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from perturbjax.core.errors import InputError
from perturbjax.core.messages import CONTROL

T = TypeVar("T")
#: Upper bound of whole numbers: larger values are typing errors and overflow somewhere.
LARGEST = 2**32


def python_only(default: Any, env: str = "") -> Any:
    """Declare a field without a flag.

    Args:
        default: value of the field.
        env: environment variable that replaces the default on the command line.
    """
    return dataclasses.field(default=default, metadata={"flag": False, "env": env})


def positional(**settings: Any) -> Any:
    """Declare a field whose command line values have no flag name."""
    return dataclasses.field(metadata={"positional": True}, **settings)


def parsed_by(name: str, parse: Callable[[str], Any], default: Any, **metadata: Any) -> Any:
    """Declare a field whose value is converted from text by a function.

    Args:
        name: name of the flag, without dashes.
        parse: text -> value; raises `InputError`.
        default: value of the field.
        metadata: for the help: `metavar`, the placeholder of the value; `show`, a function that
            returns the text of a value; `table`, see `chosen_from`.
    """
    metadata |= {"name": name, "parse": parse}
    return dataclasses.field(default=default, metadata=metadata)


def renamed_from(default: Any, *former: str) -> Any:
    """Declare a field whose flag had other names, which stay valid for one release."""
    return dataclasses.field(default=default, metadata={"former": former})


def chosen_from(table: Mapping[str, Any], default: str, *former: str) -> Any:
    """Declare a field whose values are the keys of a table of `Choice` records."""
    return dataclasses.field(default=default, metadata={"table": table, "former": former})


def optional_value(default: Any, bare: Any) -> Any:
    """Declare a field whose flag may have no value; then it is `bare`."""
    return dataclasses.field(default=default, metadata={"const": bare})


def only_flags(default: Any, *names: str) -> Any:
    """Declare a nested options dataclass of which only some fields have a flag."""
    return dataclasses.field(default=default, metadata={"only": names})


def flag_name(field: str) -> str:
    """The flag of a field: `--batch-size` for `batch_size`."""
    return f"--{field.replace('_', '-')}"


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass field, or `dataclasses.MISSING`."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def names_in(text: str) -> tuple[str, ...]:
    """Split the names of a comma-separated option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def require(flag: str, value: object, holds: bool, expected: str) -> None:
    """Check one option.

    Args:
        flag: name without dashes.
        value: value of the option, for the message.
        holds: result of the check.
        expected: valid values, completing "must be …".

    Raises:
        InputError: `holds` is false.
    """
    if not holds:
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(f"--{flag} {text}: must be {expected}")


def require_seed(seed: int) -> None:
    """Check a random seed.

    Raises:
        InputError: the seed is negative.
    """
    require("seed", seed, seed >= 0, "from 0 to 2^32 - 1")


def require_fold(fold: int, folds: int) -> None:
    """Check the number of folds and the number of the test fold.

    Raises:
        InputError: a number is out of range.
    """
    require("folds", folds, folds >= 2, "2 or more")
    require("fold", fold, 0 <= fold < folds, f"from 0 to --folds - 1, {folds - 1}")


def require_sound(options: Any) -> None:
    """Check all fields of an options dataclass by type.

    Numbers must be finite and below 2^32, text has no control characters, and choices are among
    those of the type.

    Raises:
        InputError: names the flag, its value and the valid values.
    """
    kind: Any = type(options)
    choices = _choices(kind)
    # The type of a value determines its check; items of tuples are checked one by one.
    for option in dataclasses.fields(options):
        value, flag = getattr(options, option.name), option.name.replace("_", "-")
        for one in value if isinstance(value, tuple) else (value,):
            if allowed := choices.get(option.name):
                require(flag, value, one in allowed, f"one of {', '.join(map(str, allowed))}")
            elif isinstance(one, float):
                require(flag, value, math.isfinite(one), "a finite number")
            elif isinstance(one, int):
                require(flag, value, -LARGEST < one < LARGEST, "less than 2^32")
            elif isinstance(one, str | Path):
                is_line = not CONTROL.search(str(one))
                require(flag, repr(str(one)), is_line, "text without control characters")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """Field name -> valid values, for fields of type `Literal` or tuples of it."""
    hints = get_type_hints(kind).items()
    # Each item of a tuple must be one of the choices.
    inner = {name: get_args(h)[0] if get_origin(h) is tuple else h for name, h in hints}
    return {name: get_args(hint) for name, hint in inner.items() if get_origin(hint) is Literal}


def require_output(path: Path, *suffixes: str) -> None:
    """Check the name of an output.

    Args:
        path: value of `--out`.
        suffixes: valid file name endings; the output is a folder if there are none.

    Raises:
        InputError: the name is `.`, `/` or empty, has another ending, or exists as something that
            cannot be replaced.
    """
    is_name = path.name not in ("", "..") and "\0" not in str(path)
    require("out", path, is_name, "the name of a new file or folder, not . or /")
    is_kind, kind = (path.is_file, "a regular file") if suffixes else (path.is_dir, "a folder")
    require("out", path, is_kind() or not os.path.exists(path), f"a new name, or {kind}")
    ending = f"a name that ends in {' or '.join(suffixes)}"
    require("out", path, not suffixes or path.suffix in suffixes, ending)


def replace_fields(options: T, values: Mapping[str, Any], where: str) -> T:
    """Copy an options dataclass with other values; lists become tuples.

    Args:
        options: dataclass instance.
        values: field name -> value.
        where: file or section, for messages.

    Raises:
        InputError: a field is unknown, or its value is not valid.
    """
    kind: Any = type(options)
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(kind)}):
        raise InputError(f"{where}: unknown field {unknown[0]}")
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return dataclasses.replace(options, **fields)  # type: ignore[type-var]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: the file cannot be read or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid TOML ({error})") from error
