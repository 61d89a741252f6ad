"""A process that has imported everything and forks once a case, so that a command costs its own work alone.

Reads one JSON object a line (`Order`), writes one a line (`Ended`). It starts no thread and no device before it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

#: What a memory-hungry case may hold at most before it is ended; the storm's own limit is far below.
MEMORY_LIMIT_BYTES = 6 * 2**30


def import_everything() -> None:
    """All that the commands import lazily; none of it starts a thread."""
    import jax
    import matplotlib.pyplot
    import pandas
    import sklearn.linear_model
    import tensorflow_datasets

    import data_prep.__main__
    import data_prep.build
    import data_prep.inspection
    import data_prep.simulate
    import perturbjax.cli
    import perturbjax.profiles.classify
    import perturbjax.profiles.extract
    import perturbjax.report
    import perturbjax.training.fit
    import perturbjax.training.pytorch_exchange

    used = (jax, matplotlib, pandas, sklearn, tensorflow_datasets, data_prep, perturbjax)
    assert all(used)


def run_in_child(order: dict[str, Any]) -> None:
    """Become the command; never returns."""
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    for name in order["without"]:
        os.environ.pop(name, None)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(order["said"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    program, *words = order["command"]
    sys.argv = [program, *words]
    status = 70
    try:
        if program == "data_prep":
            from data_prep.__main__ import main

            main()
        else:
            from perturbjax.cli import main

            main(words)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 1
        os._exit(status)


def wait_for(child: int, order: dict[str, Any]) -> dict[str, Any]:
    """Wait for a child, sending it a signal when the order says so and killing it at its time limit."""
    started, sent, timed_out = time.monotonic(), order["signal"] is None, False
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        took = time.monotonic() - started
        if ended:
            break
        if not sent and took >= order["signal_after_s"]:
            sent = True
            _signal(child, order["signal"])
        if not timed_out and (took > order["limit_s"] or _resident(child) > MEMORY_LIMIT_BYTES):
            timed_out = True
            _signal(child, signal.SIGKILL)
        time.sleep(0.005)
    _signal(child, signal.SIGKILL)  # what it left behind
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": took,
        "peak_bytes": used.ru_maxrss * 1024,
        "timed_out": timed_out,
        "signalled": order["signal"] is not None and sent,
    }


def _signal(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, number)


def _resident(child: int) -> int:
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def main() -> None:
    import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            run_in_child(order)
        print(json.dumps(wait_for(child, order)), flush=True)


if __name__ == "__main__":
    main()
