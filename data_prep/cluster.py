"""Run tasks on a Dask cluster through the same interface as the local process pool.

Every task yields exactly one result, whatever fails:

- A task of a dead worker is started on another worker.
- A worker that exceeds `ClusterConfig.patience` is removed from the scheduler, and its tasks are
  restarted.
- After a restart of the scheduler, all unfinished tasks are submitted again.

A task may therefore run twice. Tasks write to temporary file names on the shared disk and rename
them at the end, so a second run does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import queue
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.process_pool import Pool, TaskPool
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.options import python_only, require, require_sound

#: Value of `--cluster` that starts Slurm jobs.
SLURM = "slurm"
#: Interval in seconds between checks of workers and scheduler while no result arrives.
POLL_S = 1.0
#: Maximum time in seconds to connect to a scheduler, and to wait for a lost one.
CONNECT_S, RECONNECT_S = 20.0, 600.0
#: Number of starts after which a task counts as the cause of its workers' failures.
MAX_STARTS = 5
#: Number of tasks in flight before the first worker has joined.
FIRST_TASKS = 2


@dataclass
class _Flight:
    """An unfinished task."""

    function: Callable
    task: Any
    future: Any = None
    starts: int = 0
    started: float = 0.0


@dataclass(frozen=True)
class ClusterConfig:
    """Cluster"""

    cluster: str = ""
    """Dask cluster with a shared disk: tcp://HOST:PORT of its scheduler, slurm, or slurm:FILE.yaml
    with options of dask-jobqueue's SLURMCluster and jobs, their number. Empty: this machine."""
    patience: float = python_only(600.0)
    """Seconds until a task is sent to another worker; doubled at each attempt."""

    def __post_init__(self) -> None:
        require_sound(self)
        is_address = bool(re.fullmatch(r"(tcp|tls|ucx)://\S+:\d+", self.cluster))
        is_valid = not self.cluster or self.uses_slurm or is_address
        require("cluster", self.cluster, is_valid, "tcp://HOST:PORT, slurm or slurm:FILE.yaml")
        require("patience", self.patience, self.patience >= 1, "1 second or more")

    @property
    def uses_slurm(self) -> bool:
        """Whether the workers are Slurm jobs that perturbjax starts."""
        return self.cluster.partition(":")[0] == SLURM

    @property
    def slurm_options(self) -> Path | None:
        """YAML file with the options of the Slurm jobs."""
        file = self.cluster.removeprefix(SLURM).removeprefix(":")
        return Path(file) if self.uses_slurm and file else None


class ClusterPool(TaskPool):
    """Run tasks on the workers of a Dask scheduler."""

    remote = True

    def __init__(self, config: ClusterConfig):
        """Connect to the scheduler, or start Slurm jobs.

        Raises:
            InputError: Dask is not installed, or the scheduler cannot be reached or started.
        """
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise InputError(
                '--cluster requires Dask; pip install "perturbjax[cluster]"'
            ) from error
        # Lost connections are reported here, in one line each.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        self.config = config
        self._jobs = _start_jobs(config.slurm_options) if config.uses_slurm else None
        self._address = config.cluster if self._jobs is None else self._jobs.scheduler_address
        self._client = _connect(self._address, CONNECT_S)
        self._flights: dict[int, _Flight] = {}
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting = False

    @property
    def workers(self) -> int:
        """Number of tasks that can run at the same time."""
        with contextlib.suppress(Exception):  # scheduler lost: `_check_cluster` reconnects
            # Threads of all workers. Before the first worker joins, a few tasks are submitted in
            # advance.
            return max(sum(self._client.nthreads().values()), FIRST_TASKS)
        return FIRST_TASKS

    def __exit__(self, *_: Any) -> None:
        for flight in self._flights.values():
            with contextlib.suppress(Exception):
                flight.future.cancel()
        with contextlib.suppress(Exception):
            self._client.close(timeout=5)
        if self._jobs is not None:
            with contextlib.suppress(Exception):
                self._jobs.close(timeout=30)

    def _send(self, number: int, function: Callable, task: Any) -> None:
        self._flights[number] = _Flight(function, task)
        self._start(number)

    def _start(self, number: int) -> None:
        flight = self._flights[number]
        if flight.starts == MAX_STARTS:
            raise InputError(
                f"--cluster {self.config.cluster}: a task was started {MAX_STARTS} times, and its "
                "workers died or did not respond each time, possibly because memory ran out; "
                "increase the memory of the workers, or `patience` of ClusterConfig in Python. "
                "Finished sites are reused"
            )
        flight.starts += 1
        flight.started = time.monotonic()
        try:
            # Without pure=False, Dask identifies equal tasks and returns an earlier result.
            flight.future = self._client.submit(_run_task, flight.function, flight.task, pure=False)
            flight.future.add_done_callback(lambda future: self._done.put((number, future)))
        except Exception:  # scheduler lost: `_check_cluster` starts the task again
            flight.future = None
            flight.starts -= 1

    def _receive(self) -> tuple[int, Any]:
        while True:
            try:
                # Wakes up at intervals, because a lost scheduler sends no message.
                number, future = self._done.get(timeout=POLL_S)
            except queue.Empty:
                self._check_cluster()
                continue
            if number not in self._flights or self._flights[number].future is not future:
                continue  # an earlier start of the task
            try:
                result, error = future.result(timeout=self.config.patience)
            except (Exception, asyncio.CancelledError) as lost:  # worker or scheduler lost
                if self._is_connected():
                    console.print(
                        f"warning: lost a worker ({type(lost).__name__}); restarting its task on "
                        "another worker"
                    )
                    self._start(number)
                else:
                    self._check_cluster()
                continue
            del self._flights[number]
            if error is not None:
                raise error
            return number, result

    def _is_connected(self) -> bool:
        return self._client.status == "running"

    def _check_cluster(self) -> None:
        """Reconnect to a lost scheduler, and restart the tasks of unresponsive workers."""
        if not self._is_connected():
            self._reconnect()
            return
        try:
            workers = self._client.processing()
        except Exception:  # connection lost in this moment: the next check reconnects
            return
        if not workers and not self._waiting:
            console.print(f"info: waiting for workers of {self._address}")
        self._waiting = not workers
        now = time.monotonic()
        for number, flight in self._flights.items():
            if flight.future is None or flight.future.cancelled():
                self._start(number)
            # The time without workers does not count against the task.
            elif not workers:
                flight.started = now
            # The limit doubles with each start, so that a slow task can finish.
            elif now - flight.started > self.config.patience * 2 ** (flight.starts - 1):
                self._restart_elsewhere(number, workers)

    def _restart_elsewhere(self, number: int, workers: dict[str, Any]) -> None:
        """Remove the worker that runs a task from the scheduler, and start the task again."""
        flight = self._flights[number]
        for worker, keys in workers.items():
            if flight.future.key in map(str, keys):
                console.print(
                    f"warning: {worker} does not respond (a task exceeded "
                    f"{self.config.patience:g} s); restarting its tasks on other workers"
                )
                with contextlib.suppress(Exception):
                    # Removal closes the worker, so that its tasks cannot block the build any
                    # longer.
                    self._client.run_on_scheduler(_removal(worker))
        flight.future.cancel()
        self._start(number)

    def _reconnect(self) -> None:
        """Wait for the scheduler and submit all unfinished tasks again.

        Raises:
            InputError: The scheduler did not return within `RECONNECT_S`.
        """
        console.print(
            f"warning: lost the scheduler at {self._address}; waiting up to {RECONNECT_S:.0f} s"
        )
        with contextlib.suppress(Exception):
            self._client.close(timeout=1)
        self._client = _connect(self._address, RECONNECT_S)
        console.print(f"info: scheduler reconnected; restarting {len(self._flights)} tasks")
        for number, flight in self._flights.items():
            flight.starts -= 1  # the task did not cause this restart
            self._start(number)


def open_pool(workers: int, config: ClusterConfig) -> TaskPool:
    """Return a pool of local processes, or of the workers of a cluster."""
    return ClusterPool(config) if config.cluster else Pool(workers)


def _run_task(function: Callable, task: Any) -> tuple[Any, Exception | None]:
    """Return the result and the exception of a task.

    The exception is returned, so that an exception raised by Dask always means a lost worker.
    """
    try:
        return function(task), None
    except InputError as error:
        return None, error
    except Exception as error:
        return None, RuntimeError(f"{error!r} in a cluster worker:\n{traceback.format_exc()}")


def _removal(worker: str) -> Callable:
    """Return a function that runs on the scheduler and removes a worker."""

    async def remove(dask_scheduler: Any) -> None:
        await dask_scheduler.remove_worker(worker, stimulus_id="perturbjax", close=True)

    return remove


def _connect(address: str, seconds: float) -> Any:
    from distributed import Client

    deadline = time.monotonic() + seconds
    while True:
        try:
            return Client(address, timeout=min(CONNECT_S, seconds), set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            # ValueError is an invalid address: another attempt cannot succeed.
            if time.monotonic() > deadline or isinstance(error, ValueError):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(
                    f"--cluster {address}: no scheduler is reachable ({reason}); start one with "
                    "`dask scheduler`, then run the same command again. Finished sites are reused"
                ) from error
            time.sleep(POLL_S)


def _start_jobs(path: Path | None) -> Any:
    """Start Slurm jobs with Dask workers, and a scheduler in this process.

    Raises:
        InputError: dask-jobqueue is not installed, or its `SLURMCluster` rejects the options.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise InputError(
            '--cluster slurm requires dask-jobqueue; pip install "perturbjax[cluster]"'
        ) from error
    options = _read_options(path, SLURMCluster)
    # `jobs` is an option of perturbjax; SLURMCluster does not accept it.
    jobs = options.pop("jobs")
    try:
        cluster = SLURMCluster(**options)
        cluster.scale(jobs=jobs)
    except Exception as error:  # dask-jobqueue raises many types for inconsistent options
        raise InputError(
            f"--cluster {SLURM}: the Slurm jobs could not be started ({error})"
        ) from error
    console.print(
        f"info: submitted {jobs} Slurm jobs; the scheduler is at {cluster.scheduler_address}"
    )
    return cluster


def _read_options(path: Path | None, cluster_class: Any) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text()) if path is not None else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--cluster {SLURM}:{path}: cannot be read ({reason})") from error
    if not isinstance(options, dict):
        raise InputError(f"--cluster {SLURM}:{path}: must be a list of `name: value` lines")
    for name in options:
        if name != "jobs" and name not in _parameters(cluster_class):
            raise InputError(
                f"--cluster {SLURM}:{path}: {name} is not an option of dask-jobqueue's SLURMCluster"
            )
    jobs = options.setdefault("jobs", 1)
    if not isinstance(jobs, int) or not 1 <= jobs <= 10_000:
        raise InputError(
            f"--cluster {SLURM}:{path}: jobs is {jobs!r}; it must be a number from 1 to 10000"
        )
    return options


def _parameters(cluster_class: Any) -> set[str]:
    """Return the parameters of a dask-jobqueue class, of its base classes and of its job class."""
    return {
        parameter.name
        for base in (*cluster_class.__mro__, *cluster_class.job_cls.__mro__)
        # Only classes that define a constructor; inherited ones would be read twice.
        if "__init__" in vars(base)
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
