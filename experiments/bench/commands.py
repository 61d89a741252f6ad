"""Run a command in a separate process and measure its time, its stages and its memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

#: Seconds between measurements of memory.
INTERVAL_S = 0.2


def run_measured(words: Sequence[object], log: Path) -> dict[str, Any]:
    """Run a command of `perturbjax` in a separate process.

    Args:
        words: command and flags.
        log: file for its messages.

    Returns:
        `s`: seconds. `processor s`: CPU seconds of all processes. Peaks of resident memory,
        including mapped files: `main MB` of the first process, `worker MB` of the largest other
        process (0 if there is none), `all MB` of the sum. `private MB`: peak of the first process
        without mapped files (0 where the system does not report it). `log`: the messages.
    """
    start = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "perturbjax", *map(str, words)], stderr=file, stdout=file
        )
    names = ("main MB", "worker MB", "all MB", "private MB")
    ended, peaks = threading.Event(), dict.fromkeys(names, 0)
    sampler = threading.Thread(target=_sample, args=(process.pid, ended, peaks))
    sampler.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # `Popen` does not wait again
    finally:
        seconds = time.perf_counter() - start
        ended.set()
        sampler.join()
        process.terminate()  # after an interrupt of this process
    if status:
        raise RuntimeError(f"perturbjax {words[0]} failed: {log.read_text()[-2000:]}")
    spent = round(usage.ru_utime + usage.ru_stime, 1)
    return {"s": round(seconds, 1), "processor s": spent, **peaks, "log": log.read_text()}


def _sample(pid: int, ended: threading.Event, peaks: dict[str, int]) -> None:
    while not ended.wait(INTERVAL_S):
        try:
            main = psutil.Process(pid)
            sizes = [
                process.memory_info().rss // 10**6
                for process in (main, *main.children(recursive=True))
            ]
        except psutil.Error:  # a process has just ended
            continue
        now = {
            "main MB": sizes[0],
            "worker MB": max(sizes[1:], default=0),
            "all MB": sum(sizes),
            "private MB": _anonymous_mb(pid),
        }
        peaks.update({name: max(size, peaks[name]) for name, size in now.items()})


def _anonymous_mb(pid: int) -> int:
    """Return the memory of a process without mapped files, in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 // 10**6 for line in lines if line.startswith("RssAnon:")), 0
    )


def stage_seconds(log: str, label: str) -> float:
    """Read the duration of a stage from its last line.

    Args:
        log: messages of the command.
        label: beginning of the line, such as `Segmenting: 8/8 sites in 12.3 s` (or `in 1:02:03`).

    Raises:
        RuntimeError: the log has no such line.
    """
    match = re.search(rf"^{label}[^:]*: \S+ \w+ in ([\d:.]+)", log, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"no line of stage {label} in the log: {log[-2000:]}")
    total = 0.0
    for part in match[1].split(":"):
        total = 60 * total + float(part)
    return round(total, 1)
