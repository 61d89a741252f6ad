"""Progress with rate and remaining time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from perturbjax.core.messages import console

T = TypeVar("T")
#: Seconds after which a message of `announce` appears.
QUIET_S = 5.0
#: Seconds between progress lines if the output is a file or a pipe.
PLAIN_INTERVAL_S = 10.0
#: The rate is measured over the last seconds only, because slow first items (compilation, cold
#: caches) would otherwise dominate the estimate of the remaining time for a long time.
WINDOW_S = 60.0


class RateEstimate:
    """Number of items per second over the last `WINDOW_S` seconds.

    The time before the first item does not count: JAX compiles and workers start during it.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def add(self, now: float) -> float | None:
        """Register a finished item at time `now` (s).

        Returns:
            Items per second; None after the first item.
        """
        self._times.append(now)
        # Remove the oldest time only if the remaining ones still cover the whole window.
        while len(self._times) > 2 and self._times[1] <= now - WINDOW_S:
            self._times.popleft()
        elapsed = now - self._times[0]
        return (len(self._times) - 1) / elapsed if elapsed > 0 else None


def track(
    items: Iterable[T],
    *,
    total: int,
    label: str,
    unit: str,
    done: int = 0,
    quiet_s: float = 0.0,
) -> Iterator[T]:
    """Yield `items` and report progress, rate and remaining time.

    A terminal shows a live bar. Files and pipes receive a line every `PLAIN_INTERVAL_S` seconds.

    Args:
        items: Items to yield.
        total: Number of items, including `done`.
        label: Activity, such as "Segmenting".
        unit: Plural noun, such as "sites".
        done: Number of items finished by an earlier run; they do not count for the rate.
        quiet_s: Jobs of at most this number of seconds add no line to a file or pipe.
    """
    if console.is_terminal:
        yield from _track_live(items, total, label, unit, done)
    else:
        yield from _track_plain(items, total, label, unit, done, quiet_s)


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
    estimate = RateEstimate()
    with Progress(*columns, console=console, speed_estimate_period=WINDOW_S) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        for finished, item in enumerate(items, start=1):
            yield item
            rate = estimate.add(time.monotonic())
            bar.update(task, completed=done + finished, rate=f"{rate:.3g}/s" if rate else "")


def _track_plain(
    items: Iterable[T], total: int, label: str, unit: str, done: int, quiet_s: float
) -> Iterator[T]:
    start = last = time.monotonic()
    estimate = RateEstimate()
    finished = 0
    for finished, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        # The rate excludes the time before the first item, see `RateEstimate`.
        rate = estimate.add(now)
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            remaining = clock((total - done - finished) / rate) if rate else "unknown time"
            speed = f"{rate:.3g} {unit}/s, " if rate else ""
            console.print(f"{label}: {done + finished}/{total} {unit} ({speed}{remaining} left)")
    elapsed = time.monotonic() - start
    if elapsed > quiet_s:
        console.print(f"{label}: {done + finished}/{total} {unit} in {clock(elapsed)}")


@contextmanager
def announce(message: str) -> Iterator[None]:
    """Print a message if the block takes longer than `QUIET_S`.

    For work without countable items, such as the compilation of a network.
    """
    timer = threading.Timer(QUIET_S, console.print, [message])
    # A daemon does not delay the end of the process.
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def clock(seconds: float) -> str:
    """Format a duration: `1:15` for 75.2 s, `4.2 s` below ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
