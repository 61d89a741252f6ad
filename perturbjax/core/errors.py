"""Input errors, and the end of a command: exit status and one line on stderr."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from perturbjax.core.messages import terminal_text

#: Error numbers of a full disk, a quota, and a limit on the file size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Exit statuses. The last two are those that a shell reports after SIGINT and SIGPIPE.
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141
#: A flag of a command, outside of words such as `a--b`.
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


class InputError(Exception):
    """An input cannot be used. The message is one line: problem, file or flag, and solution.

    `message` names flags (`--label-column`), as the command line prints it. `str(error)` names the
    arguments of Python functions (`label_column`).
    """

    @property
    def message(self) -> str:
        """Message for the command line."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return argument_names(self.message)


def argument_names(message: str) -> str:
    """Replace flags by names of arguments: `--label-column x` becomes `label_column x`.

    Commands in backticks are not changed.
    """
    parts = message.split("`")
    parts[::2] = [_FLAG.sub(lambda match: match[1].replace("-", "_"), part) for part in parts[::2]]
    return "`".join(parts)


class Terminated(BaseException):
    """SIGTERM was received (from Slurm, Kubernetes or `kill`). The message says how to continue."""


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run a command and exit.

    Exit status: 0; 2 after one line on stderr; 130 after Ctrl-C; 143 after SIGTERM; 141 if the
    reader of the output has closed it (`perturbjax --help | head -1`). An `InputError`, a full disk
    and exhausted memory give one line; other exceptions give a traceback.

    Args:
        command: function without arguments.
    """
    try:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            signal.signal(signal.SIGTERM, _terminate)
        try:
            command()
        finally:
            sys.stdout.flush()
    except InputError as error:
        _exit_with_error(error.message)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Without a valid stdout, Python reports the broken pipe a second time at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except Terminated as error:
        print(f"terminated: {error}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except MemoryError as error:
        reason = str(error) or "allocation failed"
        _exit_with_error(f"out of memory ({reason}). Free memory, or reduce --batch-size.")
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            name = str(error.filename)
            _exit_with_error(f"{name[:99]}…: the name is too long. Choose a shorter one.")
        if (disk := _full_disk(error)) is None:
            raise
        _exit_with_error(f"no space left on {disk}. Free space, then run the same command again.")
    sys.exit(0)


def _terminate(number: int, frame: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C, so that temporary files are deleted."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not stop the cleanup
    raise Terminated("run the same command again to resume")


def _exit_with_error(message: str) -> NoReturn:
    print(f"error: {terminal_text(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def _full_disk(error: BaseException | None) -> str | None:
    """The full disk, if an error or one of its causes reports it; None otherwise."""
    messages = [os.strerror(number) for number in FULL]  # C++ libraries report text only
    while error is not None:
        is_full = isinstance(error, OSError) and error.errno in FULL
        if is_full or any(message in str(error) for message in messages):
            name = getattr(error, "filename", None)
            return f"the disk of {name}" if name else "the disk"
        # Libraries often wrap the error of the operating system.
        error = error.__cause__ or error.__context__
    return None
