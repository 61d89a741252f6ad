"""Errors of user input, and how a command ends: exit status and one line on stderr."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from perturbjax.core.messages import terminal_text

#: What a disk, a quota or a limit on a file's size says when it is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Exit statuses: as a shell reports the end by SIGINT and by SIGPIPE.
REFUSED, INTERRUPTED, NOBODY_READS = 2, 130, 141


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, where, and what to do."""


class Terminated(BaseException):
    """SIGTERM came (Slurm, Kubernetes and `kill` send it). The message is one line: what was kept, and what to do."""


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run a command and leave: status 0, 2 after one line on stderr, 130 after Ctrl-C, 143 after SIGTERM.

    One line is said of an `InputError`, and of a disk or a memory that is full, wherever that is met. Where nobody
    reads the output any more (`… --help | head`) the command ends without a word, with status 141.
    """
    try:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # no other may say what a signal does
            signal.signal(signal.SIGTERM, _terminate)
        try:
            command()
        finally:
            sys.stdout.flush()
    except InputError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains once more on leaving
        sys.exit(NOBODY_READS)
    except Terminated as error:
        print(f"terminated: {error}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except MemoryError as error:
        _refuse(
            f"out of memory ({error or 'no more is given'}); free some, or give a smaller --batch-size"
        )
    except Exception as error:
        if (where := _full_disk(error)) is None:
            raise
        _refuse(f"no space left on {where}; free some, then run the same command again")
    sys.exit(0)


def _terminate(number: int, frame: object) -> NoReturn:
    """Unwind as after Ctrl-C, so that nothing is left half-written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
    raise Terminated("run the same command again to go on")


def _refuse(words: str) -> NoReturn:
    print(f"error: {terminal_text(' '.join(words.split()))}", file=sys.stderr)
    sys.exit(REFUSED)


def _full_disk(error: BaseException | None) -> str | None:
    """What is full, if that is what an error or one of its causes says; libraries in C++ say it in words alone."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(
            os.strerror(n) in str(error) for n in FULL
        ):
            name = getattr(error, "filename", None)
            return f"the disk of {name}" if name else "the disk"
        error = error.__cause__ or error.__context__
    return None
