"""Writing files so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbjax.console import InputError, csv_text

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and rename it to `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, since many writers choose their format by it. A link stays one: what
    it points to is replaced.

    Raises:
        InputError: the folder of `path` cannot be written to, or `path` is there and no regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe would become a file
        raise InputError(f"{path}: is there and is not a regular file; choose another output")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{path.suffix}")
    make_folder(target.parent)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror or error}); choose another output") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: no permission to write there; choose another output")
    return Path(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, table: pd.DataFrame, *, index: bool = False) -> None:
    """Write a table for people, atomically: no cell, name of a column or of a row is run by a spreadsheet."""
    guarded = table.rename(columns=csv_text, index=csv_text).map(csv_text)
    with atomic(path) as temporary:
        guarded.to_csv(temporary, index=index)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_json(path: Path, **options: Any) -> Any:
    """Read JSON; `options` as `json.loads` takes them.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(), **options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # text that is no UTF-8, or no JSON
        raise InputError(f"{path}: is not valid JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply for JSON of ours") from error
