"""Checking everything that a directory of ours holds against what its digests say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from perturbjax.console import InputError


def verify_dataset(path: Path) -> str:
    """Every file of a dataset against its digest, every record against its row of the index; what was checked.

    Raises:
        InputError: something differs; the message names the file or the record.
    """
    from perturbjax.dataset.verify import verify_dataset

    return verify_dataset(path)


#: The file that tells a kind of directory → what checks it, and says in a sentence what it found.
KINDS: dict[str, Callable[[Path], str]] = {"provenance.json": verify_dataset}


def verify(path: Path) -> str:
    """Check a directory of any kind.

    Raises:
        InputError: it is none of ours, or something in it is not what was written.
    """
    path = Path(path)
    for marker, check in KINDS.items():
        if (path / marker).is_file():
            return check(path)
    raise InputError(f"{path}: holds none of {', '.join(KINDS)}; nothing there can be verified")
