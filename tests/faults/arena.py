"""Run commands in forked processes with everything imported, under limits and signals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
#: Time limit in seconds. A command takes seconds, on a busy machine a few minutes.
LIMIT_S = 300.0
#: File that hostile input creates in the working folder if it is executed.
MARKER = "executed"


def words(template: str, *values: object) -> list[str]:
    """Split a command line; each word `{}` is replaced by the next value (spaces allowed)."""
    remaining = iter(values)
    return [str(next(remaining)) if word == "{}" else word for word in template.split()]


def reset(root: Path) -> Path:
    """Empty the folder of the case; return its folder for files."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "work").mkdir()
    (root / "files").mkdir()
    return root / "files"


@dataclass(frozen=True)
class Request:
    """A command and the conditions under which it runs.

    Attributes:
        command: Program (`perturbjax` or `data_prep`), command name and arguments.
        cwd: Working folder.
        environment: Variables to set.
        unset: Variables to remove.
        file_bytes: Maximum size of a file, to simulate a full disk.
        signal: Signal to send after `signal_after_s` seconds.
        limit_s: Time limit in seconds.
    """

    command: Sequence[str]
    cwd: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: Sequence[str] = ()
    file_bytes: int | None = None
    signal: int | None = None
    signal_after_s: float = 0.0
    limit_s: float = LIMIT_S


@dataclass(frozen=True)
class Result:
    """Exit status and output of a command."""

    status: int
    seconds: float
    peak_bytes: int
    timed_out: bool
    signalled: bool
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """Lines that start with `error: `."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class CommandServer:
    """A process that runs one command after another; use it in a `with` block."""

    def __init__(self, cache: Path):
        """Use `cache` instead of the user's cache folder."""
        self._cache = cache

    def __enter__(self) -> CommandServer:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "120",
            "PYTHONPATH": str(REPOSITORY),
            "XDG_CACHE_HOME": str(self._cache),
            # Cached masks would finish a killed build without repeating its work.
            "PERTURBJAX_MASK_CACHE": "none",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, request: Request) -> Result:
        """Run a command and wait for its end."""
        with tempfile.TemporaryDirectory() as streams:
            message = {**vars(request), "streams": streams}
            self._process.stdin.write(json.dumps(message, default=str) + "\n")
            self._process.stdin.flush()
            result = json.loads(self._process.stdout.readline())
            for name in ("stdout", "stderr"):
                result[name] = Path(streams, name).read_text(errors="replace")
        return Result(**result)
