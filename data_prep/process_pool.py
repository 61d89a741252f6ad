"""A bounded pool of worker processes that die with their parent and leave nothing behind.

Processes are spawned, never forked, so that torch lives only here and JAX nowhere near it. Parent and worker talk
through one pipe each: no locks, and so no semaphores that a kill would leave in the system.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from perturbjax.core.errors import InputError
from perturbjax.core.progress import track

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Tasks in flight for each worker: one in work, one waiting.
IN_FLIGHT = 2
#: Small items that one task takes together.
CHUNK = 32


class TaskPool:
    """Results as they come or in order, never more than a few tasks ahead: what every engine below shares."""

    #: Whether tasks run on other machines, which share disks with this one and nothing else.
    remote = False

    @property
    def workers(self) -> int:
        """Tasks that can run at the same time."""
        raise NotImplementedError

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        raise NotImplementedError

    def _send(self, number: int, function: Callable, task: Any) -> None:
        """Begin a task."""
        raise NotImplementedError

    def _receive(self) -> tuple[int, Any]:
        """The number of a task that is done and its result; what it raised is raised here."""
        raise NotImplementedError

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """One result."""
        (result,) = self.in_order(_Spread(function), [arguments])
        return result

    def as_completed(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result]:
        """Results in whatever order they come."""
        pending = 0
        for number, task in enumerate(tasks):
            if pending >= IN_FLIGHT * self.workers:
                yield self._receive()[1]
                pending -= 1
            self._send(number, function, task)
            pending += 1
        for _ in range(pending):
            yield self._receive()[1]

    def in_order(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result]:
        """Results in the order of the tasks."""
        early: dict[int, Result] = {}
        sent = given = 0
        for task in tasks:
            if sent - given >= IN_FLIGHT * self.workers:
                yield self._wait_for(given, early)
                given += 1
            self._send(sent, function, task)
            sent += 1
        while given < sent:
            yield self._wait_for(given, early)
            given += 1

    def _wait_for(self, number: int, early: dict[int, Any]) -> Any:
        while number not in early:
            found, result = self._receive()
            early[found] = result
        return early.pop(number)


class Pool(TaskPool):
    """Spawned processes, with results as they come or in order, never more than a few tasks ahead."""

    def __init__(self, workers: int):
        self._workers = workers
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._load: list[int] = []
        self._results: queue.SimpleQueue = queue.SimpleQueue()

    @property
    def workers(self) -> int:
        """Processes."""
        return self._workers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        """Stop the processes: at once after an error, and else once they have nothing left to do."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if kind is not None:
                process.kill()
                continue
            with contextlib.suppress(OSError):
                pipe.send(None)  # closing it is not enough: the listening thread holds it open
        for process in self._processes:
            process.join(10)
            process.kill()
        for pipe in self._pipes:
            pipe.close()

    def _send(self, number: int, function: Callable, task: Any) -> None:
        if not self._processes:
            self._start()
        worker = min(range(self.workers), key=self._load.__getitem__)
        try:
            self._pipes[worker].send((number, function, task))
        except OSError:
            raise self._killed() from None
        self._load[worker] += 1

    def _receive(self) -> tuple[int, Any]:
        """The number of a task and its result; what it raised is raised here."""
        worker, number, result, error = self._results.get()
        if worker is None:
            raise self._killed()
        self._load[worker] -= 1
        if error is not None:
            raise error
        return number, result

    def _killed(self) -> InputError:
        return InputError(
            f"a worker process was killed, perhaps for want of memory: run the same command again with "
            f"--workers {max(self.workers - 1, 1)}; finished sites are kept"
        )

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # starting it later would lift the block of the signal
        with _deaf_to_ctrl_c():
            for _ in range(self.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
                self._load.append(0)
        threading.Thread(target=self._listen, args=(list(self._pipes),), daemon=True).start()

    def _listen(self, pipes: list[Connection]) -> None:
        """Take results as soon as they are there, so that no worker waits to be heard."""
        try:
            while True:
                for pipe in cast("list[Connection]", wait(pipes)):
                    self._results.put((pipes.index(pipe), *pipe.recv()))
        except (
            EOFError,
            OSError,
            ValueError,
            TypeError,
        ):  # a worker is gone, or the pool was closed
            self._results.put((None, None, None, None))


def by_chunks(
    pool: TaskPool, function: Callable[[list], list], items: list[Any], label: str
) -> Iterator[Any]:
    """The results of a function of many sites, one a site, in their order, with its progress."""
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    results = (result for chunk in pool.in_order(function, chunks) for result in chunk)
    return track(results, total=len(items), label=label, unit="sites")


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started here are born deaf to Ctrl-C, and none is left half-started by it.

    Ctrl-C reaches the whole group, and the parent answers it, once: after the block, where it came within.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    # The handler too: where another thread of the process takes the signal, Python runs it in this one all the same.
    answer = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, answer)
    if came:
        raise KeyboardInterrupt


class _Spread:
    """A function of several arguments as one of their tuple."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, arguments: tuple) -> Any:
        return self.function(*arguments)


def _work(pipe: Connection) -> None:
    """Answer tasks until the parent is gone, whichever way it went."""
    tasks: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        try:
            while (message := pipe.recv()) is not None:
                tasks.put(message)
        except (EOFError, OSError):
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        number, function, task = tasks.get()
        result, error = None, None
        try:
            result = function(task)
        except Exception as raised:
            if not isinstance(raised, InputError):
                raised.add_note(f"in a worker process:\n{traceback.format_exc()}")
            error = raised
        try:
            pipe.send((number, result, error))
        except OSError:
            os._exit(0)
        except Exception as unsendable:  # an error of some library that cannot be pickled
            pipe.send((number, None, RuntimeError(f"{error or unsendable!r}")))
