"""Worker processes on this machine, and the interface they share with Dask clusters.

Workers are spawned, not forked: PyTorch is imported in the workers only, never in the process
that runs JAX. Parent and worker communicate through one pipe each. There are no locks or queues
between processes, so a killed build leaves no semaphores in the system. A worker exits as soon
as its end of the pipe closes, that is, whenever the parent ends.
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

#: Tasks in flight per worker: one running, one waiting.
IN_FLIGHT = 2
#: Number of small items that form one task.
CHUNK = 32


class TaskPool:
    """Run tasks on workers with a bounded number of tasks in flight.

    Subclasses implement `workers`, `__exit__`, `_send` and `_receive`.
    """

    #: True if workers run on other machines and share only the disk with this process.
    remote = False

    @property
    def workers(self) -> int:
        """Number of tasks that can run at the same time."""
        raise NotImplementedError

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        raise NotImplementedError

    def _send(self, number: int, function: Callable, task: Any) -> None:
        """Start a task."""
        raise NotImplementedError

    def _receive(self) -> tuple[int, Any]:
        """Wait for a finished task; return its number and result, or raise its exception."""
        raise NotImplementedError

    def call(self, function: Callable[[Task], Result], task: Task) -> Result:
        """Run one task and return its result."""
        (result,) = self.in_order(function, [task])
        return result

    def as_completed(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result]:
        """Yield `function(task)` for all tasks in order of completion."""
        pending = 0
        for number, task in enumerate(tasks):
            # Wait for a result first: this limits the memory of queued tasks and results.
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
        """Yield `function(task)` for all tasks in the order of the tasks."""
        early: dict[int, Result] = {}
        sent = yielded = 0

        def next_result() -> Result:
            # Results arrive in any order; those of later tasks wait in `early`.
            while yielded not in early:
                number, result = self._receive()
                early[number] = result
            return early.pop(yielded)

        for task in tasks:
            if sent - yielded >= IN_FLIGHT * self.workers:
                yield next_result()
                yielded += 1
            self._send(sent, function, task)
            sent += 1
        while yielded < sent:
            yield next_result()
            yielded += 1


class Pool(TaskPool):
    """Spawned processes on this machine; they start with the first task."""

    def __init__(self, workers: int):
        self._workers = workers
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._load: list[int] = []
        self._results: queue.SimpleQueue = queue.SimpleQueue()

    @property
    def workers(self) -> int:
        """Number of processes."""
        return self._workers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        """Stop the processes: immediately after an error, otherwise when they are idle."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if kind is not None:
                process.kill()
                continue
            with contextlib.suppress(OSError):
                pipe.send(None)  # closing is not enough: the listener thread keeps the pipe open
        for process in self._processes:
            # At most 10 seconds; then the process is killed.
            process.join(10)
            process.kill()
        for pipe in self._pipes:
            pipe.close()

    def _send(self, number: int, function: Callable, task: Any) -> None:
        if not self._processes:
            self._start()
        # The worker with the fewest tasks in flight.
        worker = min(range(self.workers), key=self._load.__getitem__)
        try:
            self._pipes[worker].send((number, function, task))
        except OSError:
            raise self._worker_lost() from None
        self._load[worker] += 1

    def _receive(self) -> tuple[int, Any]:
        worker, number, result, error = self._results.get()
        if worker is None:
            raise self._worker_lost()
        self._load[worker] -= 1
        if error is not None:
            raise error
        return number, result

    def _worker_lost(self) -> InputError:
        return InputError(
            "a worker process was killed, possibly because memory ran out; run the same command "
            f"again with --workers {max(self.workers - 1, 1)}. Finished sites are reused"
        )

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # The resource tracker unblocks SIGINT when it starts, so start it before the block below.
        resource_tracker.ensure_running()
        with _block_interrupt():
            for _ in range(self.workers):
                parent_end, worker_end = context.Pipe()
                process = context.Process(target=_run_worker, args=(worker_end,), daemon=True)
                process.start()
                # Only the worker owns this end, so that the parent detects its death as end of
                # file.
                worker_end.close()
                self._processes.append(process)
                self._pipes.append(parent_end)
                self._load.append(0)
        threading.Thread(target=self._listen, args=(list(self._pipes),), daemon=True).start()

    def _listen(self, pipes: list[Connection]) -> None:
        """Move results from the pipes to the queue, so that no worker blocks on its pipe."""
        try:
            while True:
                for pipe in cast("list[Connection]", wait(pipes)):
                    self._results.put((pipes.index(pipe), *pipe.recv()))
        except (EOFError, OSError, ValueError, TypeError):  # a worker died, or the pool was closed
            self._results.put((None, None, None, None))


def map_in_chunks(
    pool: TaskPool, function: Callable[[list], list], items: list[Any], label: str
) -> Iterator[Any]:
    """Apply a function of a list of sites to chunks of `items`, with progress.

    Yields:
        One result per item, in the order of `items`.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    results = (result for chunk in pool.in_order(function, chunks) for result in chunk)
    return track(results, total=len(items), label=label, unit="sites")


@contextlib.contextmanager
def _block_interrupt() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, and delay an interrupt until all are started.

    Ctrl-C reaches the whole process group. The workers inherit the blocked signal and ignore it;
    the parent raises KeyboardInterrupt once, at the end of the block.
    """
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    # Another thread may receive the signal; Python then still calls the handler in the main thread.
    handler = (
        signal.signal(signal.SIGINT, lambda number, _: received.append(number)) if is_main else None
    )
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


def _run_worker(pipe: Connection) -> None:
    """Run tasks from the pipe until the parent closes it or ends."""
    tasks: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (message := pipe.recv()) is not None:
                tasks.put(message)
        # The parent closed the pipe or ended. `os._exit` ends the process even during a task.
        os._exit(0)

    # A separate thread notices the end of the parent also while a task runs.
    threading.Thread(target=listen, daemon=True).start()
    while True:
        number, function, task = tasks.get()
        result, error = None, None
        try:
            result = function(task)
        except Exception as exception:
            if not isinstance(exception, InputError):
                # Tracebacks are not pickled, so the text travels as a note.
                exception.add_note(f"in a worker process:\n{traceback.format_exc()}")
            error = exception
        try:
            pipe.send((number, result, error))
        except OSError:
            os._exit(0)
        except Exception as unpicklable:  # an exception of a library that cannot be pickled
            pipe.send((number, None, RuntimeError(f"{error or unpicklable!r}")))
