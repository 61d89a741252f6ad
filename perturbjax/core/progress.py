"""Progress lines with rate and remaining time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from perturbjax.core.messages import console

T = TypeVar("T")
#: Seconds between progress lines where the output is a file or a pipe.
PLAIN_INTERVAL_S = 10.0


def track(items: Iterable[T], *, total: int, label: str, unit: str, done: int = 0) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done, the rate and the time left.

    A live bar on a terminal; elsewhere a plain line every `PLAIN_INTERVAL_S` seconds, so that logs stay readable.
    `done` counts what an earlier run finished: it moves the bar, not the rate.
    """
    if console.is_terminal:
        yield from _track_live(items, total, label, unit, done)
    else:
        yield from _track_plain(items, total, label, unit, done)


def _track_live(items: Iterable[T], total: int, label: str, unit: str, done: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        start = time.monotonic()
        for finished, item in enumerate(items, start=1):
            yield item
            rate = finished / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done + finished, rate=f"{rate:.3g}/s")


def _track_plain(items: Iterable[T], total: int, label: str, unit: str, done: int) -> Iterator[T]:
    start = last = time.monotonic()
    finished = 0
    for finished, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            rate = finished / (now - start)
            left = (total - done - finished) / rate
            console.print(
                f"{label}: {done + finished}/{total} {unit}, {rate:.3g}/s, {clock(left)} left"
            )
    took = time.monotonic() - start
    console.print(f"{label}: {done + finished}/{total} {unit} in {clock(took)}")


def clock(seconds: float) -> str:
    """`75.2` → `1:15`; under ten seconds one decimal is kept."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
