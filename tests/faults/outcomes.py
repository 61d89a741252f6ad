"""How a case of a storm ended, and how many ended in each way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from tests.faults.arena import Ended

#: No hostile input may make a command hold more than this.
PEAK_BYTES = 2**30
Outcome = Literal[
    "right", "one line", "killed", "traceback", "silently different", "hang", "memory", "executed"
]
#: Outcomes that are as promised; the others are findings.
GOOD: tuple[Outcome, ...] = ("right", "one line", "killed")
OUTCOMES: tuple[Outcome, ...] = (
    *GOOD,
    "traceback",
    "silently different",
    "hang",
    "memory",
    "executed",
)
#: Statuses of a command that a signal ended: by default, or in its own words.
SIGNALLED = (-9, -15, 130, 143)
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Finding:
    """One case, and how it ended."""

    storm: str
    case: str
    file: str
    outcome: Outcome
    said: str
    seconds: float
    peak_bytes: int

    def unless(self, well: bool, otherwise: Outcome) -> Finding:
        """The same where it ended `well`, else as a finding."""
        return self if well else dataclasses.replace(self, outcome=otherwise)


def classify(ended: Ended, *, same: bool, executed: bool = False) -> Outcome:
    """How a command ended.

    Args:
        same: its result is that of the undamaged input, or one that is right too.
        executed: something of the input was run.
    """
    if executed:
        return "executed"
    if ended.peak_bytes > PEAK_BYTES:
        return "memory"
    if ended.timed_out:
        return "hang"
    if TRACEBACK in ended.stderr or TRACEBACK in ended.stdout:
        return "traceback"
    if ended.status == 0:
        return "right" if same else "silently different"
    if ended.signalled and ended.status in SIGNALLED:
        return "killed"
    return "one line" if ended.status == 2 and len(ended.errors) == 1 else "traceback"


def finding(
    storm: str,
    case: str,
    ended: Ended,
    *,
    file: str = "",
    same: bool = True,
    executed: bool = False,
):
    """A case and how it ended, with the last thing that it said."""
    said = (ended.errors or ended.stderr.strip().splitlines() or [""])[-1]
    outcome = classify(ended, same=same, executed=executed)
    return Finding(storm, case, file, outcome, said, ended.seconds, ended.peak_bytes)


def summary(found: Iterable[Finding]) -> list[dict[str, object]]:
    """How often each outcome came and what was held at most, by storm and in all."""
    table = pd.DataFrame([vars(one) for one in found])
    counted = pd.crosstab(table["storm"], table["outcome"]).reindex(
        columns=list(OUTCOMES), fill_value=0
    )
    counted.insert(0, "cases", counted.sum(axis=1))
    counted.loc["all"] = counted.sum()
    peaks = table.groupby("storm")["peak_bytes"].max()
    peaks.loc["all"] = peaks.max()
    return [
        {"storm": name, **row, "peak MB": int(peaks[name] // 1e6)}
        for name, row in counted.to_dict("index").items()
    ]
