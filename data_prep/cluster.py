"""The pool's interface on a Dask scheduler: the same tasks, on as many machines as it has workers.

Whatever happens out there, every task's result comes once: a worker that dies or hangs loses its tasks to others, a
scheduler that is started again is given all that is not done. Tasks write under temporary names, on a disk that all
machines share, and may therefore run twice.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.process_pool import Pool, TaskPool
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.options import python_only, require, require_sound

#: What `--cluster` says for jobs of our own.
SLURM = "slurm"
#: Seconds between two looks at workers and scheduler while no result comes.
LOOK_S = 1.0
#: Seconds that a scheduler may take to be reached, and to come back.
CONNECT_S, AWAY_S = 20.0, 600.0
#: Times a task is begun before it is taken for what kills its workers.
MOST_TRIES = 5
#: Tasks in flight while no worker has come yet.
FIRST_TASKS = 2


@dataclass
class _Flight:
    """A task that is out."""

    function: Callable
    task: Any
    future: Any = None
    tries: int = 0
    since: float = 0.0


@dataclass(frozen=True)
class ClusterConfig:
    """Cluster"""

    cluster: str = ""
    """Dask cluster with a shared disk: tcp://HOST:PORT of its scheduler, slurm, or slurm:FILE.yaml with options of
    dask-jobqueue's SLURMCluster and jobs, their number. Empty: this machine."""
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
    """Tasks on the workers of a Dask scheduler."""

    remote = True

    def __init__(self, config: ClusterConfig):
        """Connect, or start the jobs.

        Raises:
            InputError: the package is not installed, or the scheduler cannot be reached or started.
        """
        _require_distributed()
        self.config = config
        self._jobs = _start_jobs(config.slurm_options) if config.uses_slurm else None
        self._address = config.cluster if self._jobs is None else self._jobs.scheduler_address
        self._client = _connect(self._address, CONNECT_S)
        self._flights: dict[int, _Flight] = {}
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting = False

    @property
    def workers(self) -> int:
        """Tasks that can run at the same time."""
        with contextlib.suppress(Exception):  # the scheduler is away: `_look_after` sees to it
            return max(sum(self._client.nthreads().values()), FIRST_TASKS)
        return FIRST_TASKS

    def __enter__(self) -> ClusterPool:
        return self

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
        self._begin(number)

    def _begin(self, number: int) -> None:
        flight = self._flights[number]
        if flight.tries == MOST_TRIES:
            raise InputError(
                f"--cluster {self.config.cluster}: a task was begun {MOST_TRIES} times, and its workers died or hung "
                "each time, perhaps for want of memory; give them more, or a longer --patience. Finished sites are kept"
            )
        flight.tries += 1
        flight.since = time.monotonic()
        try:
            # Dask's own name for a task would join two that are alike, and give an old result again.
            flight.future = self._client.submit(_answer, flight.function, flight.task, pure=False)
            flight.future.add_done_callback(lambda future: self._done.put((number, future)))
        except Exception:  # the scheduler is away: `_look_after` begins it again
            flight.future = None
            flight.tries -= 1

    def _receive(self) -> tuple[int, Any]:
        while True:
            try:
                number, future = self._done.get(timeout=LOOK_S)
            except queue.Empty:
                self._look_after()
                continue
            if number not in self._flights or self._flights[number].future is not future:
                continue  # of a task that was begun again
            try:
                result, error = future.result(timeout=self.config.patience)
            except (
                Exception,
                asyncio.CancelledError,
            ) as lost:  # its worker, or the scheduler, is gone
                if self._is_connected():
                    console.print(
                        f"note: a worker was lost ({type(lost).__name__}); its task goes to another"
                    )
                    self._begin(number)
                else:
                    self._look_after()
                continue
            del self._flights[number]
            if error is not None:
                raise error
            return number, result

    def _is_connected(self) -> bool:
        return self._client.status == "running"

    def _look_after(self) -> None:
        """See to a scheduler that went away, to workers that hang, and to there being none."""
        if not self._is_connected():
            self._reconnect()
            return
        try:
            working = self._client.processing()
        except Exception:  # it went away just now: the client will say so
            return
        if not working and not self._waiting:
            console.print(f"waiting for workers of {self._address}")
        self._waiting = not working
        now = time.monotonic()
        for number, flight in self._flights.items():
            if flight.future is None or flight.future.cancelled():
                self._begin(number)
            elif not working:
                flight.since = now
            elif now - flight.since > self.config.patience * 2 ** (flight.tries - 1):
                self._begin_elsewhere(number, working)

    def _begin_elsewhere(self, number: int, working: dict[str, Any]) -> None:
        """Take a task from a worker that hangs, and its other tasks too."""
        flight = self._flights[number]
        holders = [
            worker for worker, keys in working.items() if flight.future.key in map(_key, keys)
        ]
        for worker in holders:
            console.print(
                f"note: {worker} hangs (a task took over {self.config.patience:g} s); its tasks go to others"
            )
            with contextlib.suppress(Exception):
                self._client.run_on_scheduler(_dismissal(worker))
        flight.future.cancel()
        self._begin(number)

    def _reconnect(self) -> None:
        """Wait for the scheduler, and give it everything that is not done.

        Raises:
            InputError: it did not come back.
        """
        console.print(
            f"note: the scheduler at {self._address} is gone; waiting for it for up to {AWAY_S:.0f} s"
        )
        with contextlib.suppress(Exception):
            self._client.close(timeout=1)
        self._client = _connect(self._address, AWAY_S)
        console.print(f"the scheduler is back: {len(self._flights)} tasks are begun again")
        for number, flight in self._flights.items():
            flight.tries -= 1  # not the task's fault
            self._begin(number)


def open_pool(workers: int, config: ClusterConfig) -> TaskPool:
    """Processes of this machine, or where there is a cluster its workers."""
    return ClusterPool(config) if config.cluster else Pool(workers)


def _answer(function: Callable, task: Any) -> tuple[Any, Exception | None]:
    """A task's result, or what it raised: that is an answer too, and what Dask raises means that a worker was lost."""
    try:
        return function(task), None
    except InputError as error:
        return None, error
    except Exception as error:
        return None, RuntimeError(
            f"{error!r} in a worker of the cluster:\n{traceback.format_exc()}"
        )


def _dismissal(worker: str) -> Callable:
    """What the scheduler runs to be rid of a worker that may not answer."""

    async def dismiss(dask_scheduler: Any) -> None:
        await dask_scheduler.remove_worker(worker, stimulus_id="perturbjax", close=True)

    return dismiss


def _key(task: Any) -> str:
    return task if isinstance(task, str) else str(task)


def _require_distributed() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise InputError('--cluster: needs Dask; pip install "perturbjax[cluster]"') from error
    logging.getLogger("distributed").setLevel(
        logging.CRITICAL
    )  # what it says of lost connections is said here


def _connect(address: str, seconds: float) -> Any:
    from distributed import Client

    deadline = time.monotonic() + seconds
    while True:
        try:
            return Client(address, timeout=min(CONNECT_S, seconds), set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(
                    f"--cluster {address}: no scheduler could be reached there ({reason}); start one with `dask "
                    "scheduler`, then run the same command again: finished sites are kept"
                ) from error
            time.sleep(LOOK_S)


def _start_jobs(path: Path | None) -> Any:
    """Jobs of Slurm that each run workers, and a scheduler here.

    Raises:
        InputError: the package is not installed, or the options are not those of its `SLURMCluster`.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise InputError(
            '--cluster slurm: needs dask-jobqueue; pip install "perturbjax[cluster]"'
        ) from error
    options = _read_options(path, SLURMCluster)
    jobs = options.pop("jobs")
    try:
        cluster = SLURMCluster(**options)
        cluster.scale(jobs=jobs)
    except (
        Exception
    ) as error:  # dask-jobqueue raises many kinds for options that do not go together
        raise InputError(
            f"--cluster-options {path}: Slurm's jobs could not be started ({error})"
        ) from error
    console.print(
        f"{jobs} jobs of Slurm are asked for; the scheduler is at {cluster.scheduler_address}"
    )
    return cluster


def _read_options(path: Path | None, kind: Any) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text()) if path is not None else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"--cluster-options {path}: cannot be read ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(options, dict):
        raise InputError(f"--cluster-options {path}: must hold names and values, as `cores: 4`")
    known = {"jobs", *_parameters(kind)}
    if unknown := [name for name in options if name not in known]:
        raise InputError(
            f"--cluster-options {path}: {unknown[0]} is no option of dask-jobqueue's SLURMCluster"
        )
    jobs = options.setdefault("jobs", 1)
    if not isinstance(jobs, int) or not 1 <= jobs <= 10_000:
        raise InputError(
            f"--cluster-options {path}: jobs is {jobs!r}; it must be a number from 1 to 10000"
        )
    return options


def _parameters(kind: Any) -> Iterator[str]:
    """Names that a class of dask-jobqueue's takes, those of its jobs included."""
    for one in (*kind.__mro__, *kind.job_cls.__mro__):
        if "__init__" in vars(one):
            parameters = inspect.signature(one.__init__).parameters.values()
            yield from (
                p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            )
