"""Where a command's output goes: checked before work begins, made in a folder beside it, given its name at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder


@contextmanager
def work_folder(out: Path, doing: str) -> Iterator[Path]:
    """`.OUT.doing` beside the output, for one process at a time; what the block leaves there survives a kill.

    Raises:
        InputError: it cannot be made or written, the disk is full, or another process is at work there.
    """
    work = make_folder(out.with_name(f".{out.name}.{doing}"))
    name = "build" if doing == "building" else "process"
    with _disk_told(work), open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{work}: another {name} is at work there; wait for it or choose another --out"
            ) from error
        yield work


def tidy(out: Path, doing: str) -> None:
    """Remove what a command leaves that was killed between its last rename and its end."""
    if out.with_name(f".{out.name}.{doing}").is_dir():
        with work_folder(out, doing) as work:
            shutil.rmtree(work)


@contextmanager
def _disk_told(work: Path) -> Iterator[None]:
    """One line for a disk that is full or fails, whoever noticed it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room and run the same command again" if full else "choose another --out"
        raise InputError(
            f"{error.filename or work}: cannot be written ({error.strerror or error}); {advice}"
        ) from error


def creation_time() -> str:
    """UTC to the second; SOURCE_DATE_EPOCH, where set, makes two builds the same byte for byte.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(
            f"SOURCE_DATE_EPOCH={epoch}: must be whole seconds since 1970, or not be set"
        ) from error
    return moment.isoformat(timespec="seconds")
