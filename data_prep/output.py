"""Output folders: work in a locked folder next to the output, and report disk errors briefly."""

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


def work_path(out: Path, activity: str) -> Path:
    """Return the path of the working folder: `.NAME.ACTIVITY` next to the output `NAME`."""
    return out.with_name(f".{out.name}.{activity}")


@contextmanager
def work_folder(out: Path, activity: str) -> Iterator[Path]:
    """Create and lock the working folder of an output.

    Files that the block writes there remain after a kill, so that the next run can resume.

    Args:
        out: Output folder, not created here.
        activity: "building" or "simulating", the suffix of the working folder.

    Raises:
        InputError: The folder cannot be written, the disk is full, or another process holds the
            lock.
    """
    work = make_folder(work_path(out, activity))
    try:
        with open(work / "lock", "w") as lock:
            try:
                # The system releases the lock when the process ends, also after a kill.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"{work}: another process is {activity} this output; wait for it or choose "
                    "another --out"
                ) from error
            yield work
    except OSError as error:
        # No space, quota exceeded, or file too large for the file system.
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = (
            "free disk space and run the same command again" if is_full else "choose another --out"
        )
        raise InputError(
            f"{error.filename or work}: cannot be written ({error.strerror or error}); {advice}"
        ) from error


def remove_work_folder(out: Path, activity: str) -> None:
    """Remove the working folder of a command that was killed after it had published its output."""
    if work_path(out, activity).is_dir():
        with work_folder(out, activity) as work:
            shutil.rmtree(work)


def creation_time() -> str:
    """Return the current UTC time to the second (ISO 8601).

    If SOURCE_DATE_EPOCH is set, that time is used: two builds are then identical byte for byte.

    Raises:
        InputError: SOURCE_DATE_EPOCH is not a number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        # Source: reproducible-builds.org, SOURCE_DATE_EPOCH.
        time = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(
            f"SOURCE_DATE_EPOCH={epoch}: must be whole seconds since 1970, or unset"
        ) from error
    return time.isoformat(timespec="seconds")
