"""Running one command of a storm, and saying how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parents[2]
#: No hostile input may make a command hold more than this.
PEAK_BYTES = 2**30
#: A command here takes seconds; one that takes this long hangs.
LIMIT_S = 90.0

Outcome = Literal["right", "one line", "killed", "traceback", "silently different", "hang", "memory", "executed"]
#: Outcomes that are as promised; the others are findings.
GOOD: tuple[Outcome, ...] = ("right", "one line", "killed")


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

    def __enter__(self) -> Arena:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.storms.zygote"],
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
            self._process.stdin.write(json.dumps({**vars(order), "command": words, "said": said}, default=str) + "\n")
            self._process.stdin.flush()
            ended = json.loads(self._process.stdout.readline())
            texts = {name: Path(said, name).read_text(errors="replace") for name in ("stdout", "stderr")}
        return Ended(**ended, **texts)


def classify(ended: Ended, *, same: bool, may_differ: bool, marker: Path) -> Outcome:
    """How a command ended.

    Args:
        same: its result is that of the undamaged input.
        may_differ: another result is right too, since the input says something else and says it well.
        marker: a file that exists if something of the input was executed.
    """
    if marker.exists():
        return "executed"
    if ended.timed_out:
        return "memory" if ended.peak_bytes > PEAK_BYTES else "hang"
    if ended.peak_bytes > PEAK_BYTES:
        return "memory"
    if "Traceback (most recent call last)" in ended.stderr or "Traceback (most recent call last)" in ended.stdout:
        return "traceback"
    if ended.status == 0:
        return "right" if same or may_differ else "silently different"
    if ended.signalled and ended.status in (-9, -15, -2, 130, 143):
        return "killed"
    if ended.status == 2 and (len(ended.errors) == 1 or "Parsing error" in ended.stderr + ended.stdout):
        return "one line"
    return "traceback"
