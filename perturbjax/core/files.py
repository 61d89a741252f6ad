"""Writing files so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbjax.core.errors import InputError
from perturbjax.core.messages import csv_text

if TYPE_CHECKING:
    import pandas as pd


#: A table of ours has a byte for a cell or two; one of many more than this would fill the memory from a small file.
MAX_CELLS_PER_BYTE = 100
#: How packed tables are opened, by the last suffix of their names.
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


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
    # Threads, processes and machines that write the same file do not meet before they rename it.
    writer = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    temporary = target.with_name(f".{target.stem}.{writer}.tmp{path.suffix}")
    make_folder(target.parent)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another output"
        ) from error
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
        raise InputError(
            f"{path}: cannot be created ({error.strerror or error}); choose another output"
        ) from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: no permission to write there; choose another output")
    return Path(path)


def require_free_space(folder: Path, size: int) -> None:
    """Have the disk give `size` bytes for a moment, for writers that end in disorder where it does not.

    Raises:
        OSError: it is full, or a limit is reached.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".room.") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table that is read back, atomically; every page of it has a checksum."""
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)


def read_parquet(path: Path, advice: str) -> pd.DataFrame:
    """Read a table; pages that have a checksum are held to it.

    Raises:
        InputError: it cannot be read, or unfolds to absurdly more than the file; the message ends with `advice`.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        shape = pq.read_metadata(path)
        if shape.num_rows * shape.num_columns > MAX_CELLS_PER_BYTE * path.stat().st_size:
            raise ValueError(f"{shape.num_rows} rows in {path.stat().st_size} bytes")
        return pd.read_parquet(path, page_checksum_verification=True)
    except Exception as error:  # pyarrow raises many kinds; to the user they all mean the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as parquet ({reason}); {advice}") from error


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


def user_cache(name: str) -> Path:
    """`perturbjax/NAME` in the user's cache folder; nothing is made there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "perturbjax" / name


def delete_oldest(files: Iterable[Path], most: int) -> int:
    """Remove the files used longest ago until the others hold at most `most` bytes; how many went."""
    found = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue  # another process dropped it
        found.append((status.st_mtime, status.st_size, path))
    over, dropped = sum(size for _, size, _ in found) - most, 0
    for _, size, path in sorted(found):
        if over <= 0:
            break
        try:
            path.unlink(missing_ok=True)
        except OSError:
            break
        over, dropped = over - size, dropped + 1
    return dropped
