"""A real command in a process of its own: how long it and its stages took, and the memory of each of its processes."""

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

#: Seconds between looks at the memory of a command's processes.
LOOK_S = 0.2


def measured(words: Sequence[object], log: Path) -> dict[str, Any]:
    """Run `perturbjax …` in its own process: its seconds, its processors' seconds, its memory, and what it `said`.

    `main MB` is the largest that its first process was, `worker MB` the largest of the others (0 without any), and
    `all MB` the largest sum, by what is resident, with files that are mapped; `own MB` is the first's without those (0
    where the system does not tell).
    """
    start = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "perturbjax", *map(str, words)], stderr=file, stdout=file
        )
    over, found = threading.Event(), dict.fromkeys(("main MB", "worker MB", "all MB", "own MB"), 0)
    looking = threading.Thread(target=_look, args=(process.pid, over, found))
    looking.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
    finally:
        seconds = time.perf_counter() - start
        over.set()
        looking.join()
        process.terminate()  # where this one was told to end
    if status:
        raise RuntimeError(f"perturbjax {words[0]} failed: {log.read_text()[-2000:]}")
    spent = round(usage.ru_utime + usage.ru_stime, 1)
    return {"s": round(seconds, 1), "processor s": spent, **found, "said": log.read_text()}


def _look(pid: int, over: threading.Event, found: dict[str, int]) -> None:
    while not over.wait(LOOK_S):
        try:
            main = psutil.Process(pid)
            sizes = [
                process.memory_info().rss // 10**6
                for process in (main, *main.children(recursive=True))
            ]
        except psutil.Error:  # one ended in between
            continue
        now = {
            "main MB": sizes[0],
            "worker MB": max(sizes[1:], default=0),
            "all MB": sum(sizes),
            "own MB": _own(pid),
        }
        found.update({name: max(size, found[name]) for name, size in now.items()})


def _own(pid: int) -> int:
    """MB of a process that no file stands behind."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 // 10**6 for line in lines if line.startswith("RssAnon:")), 0
    )


def seconds_of(said: str, label: str) -> float:
    """Of a stage, from the line that it ends with: `label: n/n sites in 12.3 s` or `… in 1:02:03`."""
    took = re.search(rf"^{label}: \S+ \w+ in ([\d:.]+)", said, re.MULTILINE)
    if took is None:
        raise RuntimeError(f"{label} is not in what was said: {said[-2000:]}")
    total = 0.0
    for part in took[1].split(":"):
        total = 60 * total + float(part)
    return round(total, 1)
