"""Lock of a run directory: one training at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder
from perturbjax.training.run_directory import CONFIG, LOCK, require_free


@contextmanager
def lock_run(path: Path) -> Iterator[None]:
    """Reserve a run directory, created if needed, until the block or process ends.

    Raises:
        InputError: another process uses it, it contains other files, or it is not writable.
    """
    if not (path / CONFIG).is_file():
        require_free(path)
    # The system releases the lock when the process ends, also after a kill.
    with (make_folder(path) / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process is training in this directory. Wait for it, or choose "
                "another --out."
            ) from None
        except OSError:  # some network filesystems have no locks; training must work there too
            pass
        yield
