"""A Dask scheduler and workers as separate processes on the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Cluster:
    """A scheduler and its workers, which tests kill and restart."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.folder = folder
        self.workers: list[subprocess.Popen] = []
        self.start_scheduler()

    def start_scheduler(self) -> None:
        """Start the scheduler on the fixed port and wait until it listens."""
        self.scheduler = self._start(
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dashboard-address",
            "127.0.0.1:0",
        )
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline and self.scheduler.poll() is None
            time.sleep(0.1)

    def add_worker(self) -> subprocess.Popen:
        """Start a worker with one thread and wait until it has joined."""
        words = (
            "--nthreads",
            "1",
            "--no-nanny",
            "--dashboard-address",
            "127.0.0.1:0",
            "--memory-limit",
            "0",
            "--host",
            "127.0.0.1",
        )
        self.workers.append(
            self._start("worker", self.address, *words, "--local-directory", str(self.folder))
        )
        self.wait_for(sum(worker.poll() is None for worker in self.workers))
        return self.workers[-1]

    def wait_for(self, count: int) -> None:
        """Wait until `count` workers have joined."""
        from distributed import Client

        with Client(self.address, set_as_default=False, timeout=60) as client:
            client.wait_for_workers(count, timeout=60)

    def _start(self, kind: str, *words: str) -> subprocess.Popen:
        log = open(self.folder / f"{kind}.log", "ab")  # noqa: SIM115  # inherited by the process
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", kind, *words],
                stdout=log,
                stderr=log,
                env={**os.environ},
            )
        finally:
            log.close()

    def close(self) -> None:
        """Kill all processes."""
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
