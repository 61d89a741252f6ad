"""Start the workers of builds by fork: a spawned worker imports modules for a second."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


class ForkServerContext:
    """Replacement of the context "spawn" in `data_prep.process_pool`.

    The server is another process, which imports the modules of the workers once and then forks.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        modules = ["data_prep.site_tasks", "data_prep.segment.watershed"]
        self._context.set_forkserver_preload(modules)
        self.Pipe = self._context.Pipe

    def Process(self, target: Callable, args: tuple[Any, ...], daemon: bool) -> BaseProcess:
        """Return a process with the present environment, which tests change."""
        words = (dict(os.environ), target, args)
        return self._context.Process(target=_run, args=words, daemon=daemon)


def _run(environment: dict[str, str], target: Callable, args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
