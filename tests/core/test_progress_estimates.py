"""Progress lines estimate the remaining time from recent items."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from perturbjax.core import progress
from perturbjax.core.progress import RateEstimate, clock, track


def run_with_durations(monkeypatch: pytest.MonkeyPatch, durations: list[float]) -> None:
    """Track items that take these durations in seconds on a simulated clock."""
    now = 0.0

    def items() -> Iterator[int]:
        nonlocal now
        for index, seconds in enumerate(durations):
            now += seconds
            yield index

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    list(track(items(), total=len(durations), label="Segmenting", unit="sites"))


def test_track_excludes_compilation_from_the_remaining_time(monkeypatch, capsys):
    """The first item takes 40 s (compilation), the other 99 take 2 s each."""
    run_with_durations(monkeypatch, [40.0, *[2.0] * 99])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Segmenting: 1/100 sites (unknown time left)"
    assert lines[1] == "Segmenting: 6/100 sites (0.5 sites/s, 3:08 left)"
    assert lines[-1] == "Segmenting: 100/100 sites in 3:58"


def test_rate_estimate_forgets_slow_items_after_the_window():
    estimate = RateEstimate()
    assert estimate.add(100.0) is None
    assert estimate.add(200.0) == pytest.approx(0.01)
    rates = [estimate.add(200.0 + second) for second in range(1, 80)]
    assert rates[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(("seconds", "text"), [(4.25, "4.2 s"), (75.2, "1:15"), (3661, "1:01:01")])
def test_clock_formats_durations(seconds, text):
    assert clock(seconds) == text
