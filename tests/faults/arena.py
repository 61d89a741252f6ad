"""Running the commands of a storm, each in a process of its own that has imported everything already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
#: A command here takes seconds, on a busy machine a minute or two; one that takes this long hangs.
LIMIT_S = 300.0


@dataclass(frozen=True)
class Order:
    """One command and what is done to it.

    Attributes:
        command: `("perturbjax", "split", …)` or `("data_prep", "build", …)`.
        cwd: folder it runs in.
        environment: variables it gets; `without` those it loses.
        file_bytes: no file may grow beyond this: the disk is full.
        signal: sent to it after `signal_after_s`.
    """

    command: Sequence[object]
    cwd: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()
    file_bytes: int | None = None
    signal: int | None = None
    signal_after_s: float = 0.0
    limit_s: float = LIMIT_S


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    seconds: float
    peak_bytes: int
    timed_out: bool
    signalled: bool
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Arena:
    """One process that runs commands one after another; a `with` block ends it."""

    def __init__(self, cache: Path):
        """`cache` is the user's cache to its commands, so that the real one is not spoilt."""
        self._cache = cache

    def __enter__(self) -> Arena:
        given = {
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "120",
            "PYTHONPATH": REPOSITORY,
            "XDG_CACHE_HOME": self._cache,
        }
        environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
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

    def run(self, order: Order) -> Ended:
        with tempfile.TemporaryDirectory() as said:
            words = [str(word) for word in order.command]
            self._process.stdin.write(
                json.dumps({**vars(order), "command": words, "said": said}, default=str) + "\n"
            )
            self._process.stdin.flush()
            ended = json.loads(self._process.stdout.readline())
            texts = {
                name: Path(said, name).read_text(errors="replace") for name in ("stdout", "stderr")
            }
        return Ended(**ended, **texts)
