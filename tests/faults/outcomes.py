"""Outcome of a fault-injection case, and summary table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from tests.faults.arena import Result

#: Maximum memory of a command, whatever its input.
PEAK_BYTES = 2**30
Outcome = Literal[
    "correct", "refused", "killed", "traceback", "wrong result", "hang", "memory", "executed"
]
OUTCOMES: tuple[Outcome, ...] = (
    "correct",
    "refused",
    "killed",
    "traceback",
    "wrong result",
    "hang",
    "memory",
    "executed",
)
#: Allowed outcomes: a correct result, one line of error, or a requested kill.
ALLOWED = OUTCOMES[:3]
#: Exit statuses after a signal: of the system, or of the command's own signal handler.
SIGNAL_STATUSES = (-9, -15, 130, 143)
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Finding:
    """One case and its outcome."""

    suite: str
    case: str
    file: str
    outcome: Outcome
    message: str
    seconds: float
    peak_bytes: int

    def require(self, condition: bool, otherwise: Outcome) -> Finding:
        """Return this finding, with the outcome `otherwise` if a further condition fails."""
        return self if condition else dataclasses.replace(self, outcome=otherwise)


def classify(result: Result, *, correct: bool, executed: bool = False) -> Outcome:
    """Determine the outcome of a command.

    Args:
        result: Exit status and output.
        correct: The output equals the expected one, or another correct one.
        executed: Code in the input was executed.
    """
    if executed:
        return "executed"
    if result.peak_bytes > PEAK_BYTES:
        return "memory"
    if result.timed_out:
        return "hang"
    if TRACEBACK in result.stderr or TRACEBACK in result.stdout:
        return "traceback"
    if result.status == 0:
        return "correct" if correct else "wrong result"
    if result.signalled and result.status in SIGNAL_STATUSES:
        return "killed"
    return "refused" if result.status == 2 and len(result.errors) == 1 else "traceback"


def make_finding(
    suite: str,
    case: str,
    result: Result,
    *,
    file: str = "",
    correct: bool = True,
    executed: bool = False,
) -> Finding:
    """Return a case with its outcome and its last message."""
    message = (result.errors or result.stderr.strip().splitlines() or [""])[-1]
    outcome = classify(result, correct=correct, executed=executed)
    return Finding(suite, case, file, outcome, message, result.seconds, result.peak_bytes)


def summarize(findings: Iterable[Finding]) -> list[dict[str, object]]:
    """Count outcomes per suite and in total, with the maximum memory."""
    table = pd.DataFrame([vars(one) for one in findings])
    counts = pd.crosstab(table["suite"], table["outcome"]).reindex(
        columns=list(OUTCOMES), fill_value=0
    )
    counts.insert(0, "cases", counts.sum(axis=1))
    counts.loc["all"] = counts.sum()
    peaks = table.groupby("suite")["peak_bytes"].max()
    peaks.loc["all"] = peaks.max()
    return [
        {"suite": name, **row, "peak MB": int(peaks[name] // 1e6)}
        for name, row in counts.to_dict("index").items()
    ]
