"""Worker processes: a bounded pool that dies with its parent, and the work on one site that runs in it.

Processes are spawned, never forked, so that torch lives only here and JAX nowhere near it. At any moment the
pool holds a few sites a worker, whatever the plate's size.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep import segment
from data_prep.images import (
    Aggregate,
    aggregate_channels,
    probe_plane,
    read_channels,
    resize_image,
    resize_mask,
)
from perturbjax.console import InputError
from perturbjax.dataset import SitePixels, site_statistics
from perturbjax.files import atomic

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Sites in flight for each worker: one in work, one waiting.
IN_FLIGHT = 2


@dataclass(frozen=True)
class Site:
    """What a worker needs to know of a site."""

    name: str
    """`site_id`."""
    where: str
    """CSV and row, for messages."""
    stored: tuple[str, ...]
    """Files of the channels that make the stored image."""
    segmented: tuple[str, ...]
    """Files of the channels that are segmented; empty segments the stored image."""
    mask: Path
    """Where its mask is kept once it is finished."""


@dataclass(frozen=True)
class Settings:
    """How every site is treated."""

    segmenter: segment.SegmenterConfig
    aggregate: Aggregate = "median"
    resize: int = 0
    """Side of the stored image in pixels; 0 keeps the size."""


class Pool:
    """Spawned processes, with results as they come or in order, never more than a few tasks ahead."""

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Stop the processes.

        Raises:
            InputError: one of them was killed, as the system does where memory runs out.
        """
        self._executor.shutdown(wait=kind is None, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                f"a worker process was killed, perhaps for want of memory: run the same command again with "
                f"--workers {max(self.workers - 1, 1)}; finished sites are kept"
            ) from error

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return self._executor.submit(function, *arguments).result()

    def as_completed(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in whatever order they come."""
        pending: set[Future] = set()
        for task in tasks:
            if len(pending) >= IN_FLIGHT * self.workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            pending.add(self._executor.submit(function, task))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)

    def in_order(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks."""
        pending: deque[Future] = deque()
        for task in tasks:
            if len(pending) >= IN_FLIGHT * self.workers:
                yield pending.popleft().result()
            pending.append(self._executor.submit(function, task))
        while pending:
            yield pending.popleft().result()


def worker_count(asked: int, engine: segment.Engine) -> int:
    """`asked`, or where it is 0 one for each core, and one where a GPU runs the network.

    Raises:
        InputError: `asked` is negative.
    """
    if asked < 0:
        raise InputError(f"--workers {asked}: must not be negative; 0 uses every core")
    if asked:
        return asked
    if engine == "cellpose" and Path("/dev/nvidia0").exists():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _follow_parent() -> None:
    """End when the parent ends, and not before.

    A killed parent cannot tell its workers, and they would wait for ever: they watch for its end themselves.
    Ctrl-C reaches the whole group: the parent answers it, once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def _segmenter(config: segment.SegmenterConfig) -> segment.Segmenter:
    return segment.create(config)


def describe_segmenter(config: segment.SegmenterConfig) -> dict[str, Any]:
    """Provenance of the engine; raises where it cannot run as configured."""
    return _segmenter(config).describe()


def probe_sites(sites: list[Site]) -> list[tuple[str, tuple[int, int]]]:
    """Stored type and (height, width) of each site from its files' headers.

    Raises:
        InputError: a file is no TIFF of one plane, is cut short, or channels of a site differ in shape.
    """
    found = []
    for site in sites:
        paths = (*site.stored, *site.segmented)
        probes = [probe_plane(path, site.where) for path in paths]
        for path, (_, shape) in zip(paths, probes, strict=True):
            if shape != probes[0][1]:
                raise InputError(f"{site.where}: {path} is {shape}, but {paths[0]} of the same site is {probes[0][1]}")
        stored = [dtype for dtype, _ in probes[: len(site.stored)]]
        found.append((np.result_type(*stored).name, probes[0][1]))
    return found


def segment_site(task: tuple[Site, Settings]) -> int:
    """Segment a site and keep its mask; the number of its cells."""
    import tifffile

    site, settings = task
    if site.segmented:
        image = read_channels(site.segmented, site.where)
    else:
        image = aggregate_channels(read_channels(site.stored, site.where), settings.aggregate)
    try:
        mask = _segmenter(settings.segmenter).segment(image)
    except InputError as error:
        raise InputError(f"{site.where}: {error}") from error
    if settings.resize:
        mask = resize_mask(mask, settings.resize)
    with atomic(site.mask) as temporary:
        tifffile.imwrite(temporary, mask, compression="zlib", metadata=None)
    return int(np.unique(mask[mask > 0]).size)


def prepare_site(task: tuple[Site, Settings, np.dtype]) -> SitePixels:
    """The stored image of a site, its finished mask, and the image's statistics."""
    import tifffile

    site, settings, dtype = task
    image = aggregate_channels(read_channels(site.stored, site.where), settings.aggregate)
    if settings.resize:
        image = resize_image(image, settings.resize)
    mask = tifffile.imread(site.mask)
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"{site.where}: the image is now {image.shape[:2]} but its mask {mask.shape}; "
            f"delete {site.mask.parent.parent} and build again"
        )
    return SitePixels(np.ascontiguousarray(image.astype(dtype)), mask, site_statistics(image))
