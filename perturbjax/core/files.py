"""Reading and writing of files; a file has its final name only when it is complete."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbjax.core.errors import InputError
from perturbjax.core.messages import csv_text

if TYPE_CHECKING:
    import pandas as pd

#: Maximum number of cells per byte of a parquet file. Tables of this project have about one cell
#: per byte; a small file that claims many more would exhaust the memory.
MAX_CELLS_PER_BYTE = 100
#: File in a directory -> kind of the directory.
_KINDS = {
    "provenance.json": "a dataset directory (option --data)",
    "labels.json": "a run directory (option --run)",
    "load_data.csv": "a folder of images; build a dataset from it with `perturbjax build`",
}
#: Suffix of a compressed table -> function that opens it.
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary file name next to `path`; rename it to `path` when the block succeeds.

    The temporary name has the suffix of `path`, because many writers choose the format by it. If
    `path` is a symbolic link, its target is replaced.

    Args:
        path: final name of the file.

    Raises:
        InputError: the folder is not writable, or `path` exists and is not a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise InputError(f"{path}: exists and is not a regular file. Choose another output.")
    target = Path(os.path.realpath(path))
    # Threads, processes and machines that write the same file need different temporary names.
    writer = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    temporary = target.with_name(f".{target.stem}.{writer}.tmp{path.suffix}")
    make_folder(target.parent)
    try:
        yield temporary
        # Atomic: other processes read either the old or the complete new file.
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}). Choose another output.") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, and return it.

    Raises:
        InputError: the folder cannot be created or is not writable.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be created ({reason}). Choose another output.") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: no permission to write. Choose another output.")
    return Path(path)


def require_free_space(folder: Path, size: int) -> None:
    """Allocate `size` bytes on a disk and free them again.

    Call it before libraries that fail in an undefined way on a full disk.

    Raises:
        OSError: the disk is full, or a limit is reached.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".free-space.") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically, with a checksum for each parquet page."""
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)


def read_parquet(path: Path, advice: str) -> pd.DataFrame:
    """Read a table and verify the checksums of its pages.

    Args:
        path: parquet file.
        advice: end of the error message.

    Raises:
        InputError: the file cannot be read, or its table is much larger than the file.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("no such file")
        shape = pq.read_metadata(path)
        # The header of a damaged file can claim a huge table; check it before memory is allocated.
        if shape.num_rows * shape.num_columns > MAX_CELLS_PER_BYTE * path.stat().st_size:
            raise ValueError(f"claims {shape.num_rows} rows in {path.stat().st_size} bytes")
        return pd.read_parquet(path, page_checksum_verification=True)
    except Exception as error:  # pyarrow raises many types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as parquet ({reason}); {advice}") from error


def write_csv(path: Path, table: pd.DataFrame, *, index: bool = False) -> None:
    """Write a table for spreadsheet programs atomically; no cell or name is a formula."""
    escaped = table.rename(columns=csv_text, index=csv_text).map(csv_text)
    with atomic(path) as temporary:
        escaped.to_csv(temporary, index=index)


def describe_path(path: Path) -> str:
    """Describe an input for messages: "a run directory", "a CSV file", "an empty folder"."""
    # Functions of os.path return false for names that are too long; those of Path raise errors.
    if not os.path.exists(path):
        return "does not exist"
    if os.path.isfile(path):
        return f"is a {path.suffix.removeprefix('.') or 'regular'} file"
    names = sorted(os.listdir(path)) if path.is_dir() and os.access(path, os.R_OK) else []
    for mark, kind in _KINDS.items():
        if mark in names:
            return f"is {kind}"
    return f"is a folder that contains {', '.join(names[:3])}" if names else "is an empty folder"


def require_folder(flag: str, path: Path) -> None:
    """Check that an input folder exists.

    Args:
        flag: name without dashes.
        path: value of the flag.

    Raises:
        InputError: the path does not exist or is not a folder.
    """
    if not os.path.exists(path):
        raise InputError(f"--{flag} {path}: no such folder")
    if not os.path.isdir(path):
        raise InputError(f"--{flag} {path}: {describe_path(path)}, not a folder")


def file_digest(path: Path) -> str:
    """Compute the SHA-256 checksum of a file, in hexadecimal.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_json(path: Path, **options: Any) -> Any:
    """Read a JSON file.

    Args:
        path: file.
        options: arguments of `json.loads`.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(), **options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{path}: is not valid JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply") from error


def user_cache(name: str) -> Path:
    """Return the folder `perturbjax/NAME` of the user's cache, without creating it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "perturbjax" / name


def delete_oldest(files: Iterable[Path], limit: int) -> int:
    """Delete the least recently used files until the others have at most `limit` bytes.

    Returns:
        Number of deleted files.
    """
    entries = []
    for path in files:
        with suppress(OSError):  # another process deleted it
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    excess, deleted = sum(size for _, size, _ in entries) - limit, 0
    # Tuples sort by modification time, oldest first.
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        try:
            path.unlink(missing_ok=True)
        except OSError:
            break
        excess, deleted = excess - size, deleted + 1
    return deleted
