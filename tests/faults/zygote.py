"""Fork server: import everything once, then fork a process for each command.

Reads one JSON object per line (`arena.Request`) from stdin and writes one per line (`arena.Result`
without streams). It starts no thread and no JAX device before a fork.
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

#: A command that exceeds this memory is killed. The tests allow much less (`outcomes.PEAK_BYTES`).
MEMORY_LIMIT_BYTES = 6 * 2**30


def import_everything() -> None:
    """Import all modules that the commands import lazily; none of them starts a thread."""
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

    imported = (jax, matplotlib, pandas, sklearn, tensorflow_datasets, data_prep, perturbjax)
    assert all(imported)


def run_in_child(request: dict[str, Any]) -> None:
    """Run the command in this (forked) process; never returns."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for name in request["unset"]:
        os.environ.pop(name, None)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        path = Path(request["streams"]) / name
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    program, *arguments = request["command"]
    sys.argv = [program, *arguments]
    status = 70
    try:
        if program == "data_prep":
            from data_prep.__main__ import main

            main()
        else:
            from perturbjax.cli import main

            main(arguments)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
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


def wait_for(child: int, request: dict[str, Any]) -> dict[str, Any]:
    """Wait for a child; send the requested signal, and kill it at the time or memory limit."""
    start, is_sent, timed_out = time.monotonic(), request["signal"] is None, False
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        elapsed = time.monotonic() - start
        if pid:
            break
        if not is_sent and elapsed >= request["signal_after_s"]:
            is_sent = True
            _signal_group(child, request["signal"])
        is_over = elapsed > request["limit_s"] or _resident_bytes(child) > MEMORY_LIMIT_BYTES
        if not timed_out and is_over:
            timed_out = True
            _signal_group(child, signal.SIGKILL)
        time.sleep(0.005)
    _signal_group(child, signal.SIGKILL)  # remaining worker processes
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": elapsed,
        "peak_bytes": usage.ru_maxrss * 1024,
        "timed_out": timed_out,
        "signalled": request["signal"] is not None and is_sent,
    }


def _signal_group(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, number)


def _resident_bytes(child: int) -> int:
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def main() -> None:
    import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run_in_child(request)
        print(json.dumps(wait_for(child, request)), flush=True)


if __name__ == "__main__":
    main()
