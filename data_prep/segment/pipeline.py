"""Segmenting a plate: one process owns the accelerator, and reading and writing run beside it in the workers.

Engines without a network run in the workers themselves, a site each, and on a cluster all do. Else a network runs here,
in the process that asked: workers read sites ahead of it, a few at most, and threads keep the masks behind it.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt16

from data_prep import segment
from data_prep.process_pool import TaskPool
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console

if TYPE_CHECKING:
    from data_prep.segment.cellpose import Cellpose
    from data_prep.site_tasks import Settings, Site

#: Threads that compress and write masks, and masks that may wait for them.
WRITERS, UNWRITTEN = 2, 8


def suited(stored: tuple[str, ...], segmented: tuple[str, ...]) -> segment.Engine:
    """The engine of a build that names none: the network knows nuclei in one channel, not a mixture of stains."""
    return "nuclei" if len(segmented or stored) == 1 else "watershed"


def check_channels(
    engine: segment.Engine, stored: tuple[str, ...], segmented: tuple[str, ...]
) -> None:
    """Refuse to run a network on the mixture of several stains: its weights know nuclei or cells, not their median.

    Raises:
        InputError: that was asked for; the message names the channels.
    """
    if engine != "watershed" and len(stored) > 1 and not segmented:
        raise InputError(
            f"--segmenter {engine}: name the channel that shows what its weights know with --segment-channels; "
            f"there are {', '.join(stored)}"
        )


def describe(pool: TaskPool, config: segment.SegmenterConfig) -> dict[str, Any]:
    """Provenance of the engine, from the process that runs it; raises where it cannot run as configured."""
    from data_prep import site_tasks as workers

    if config.engine not in segment.NETWORKS:
        return pool.call(workers.describe_segmenter, config)
    return _network(config).describe()


def segmented(pool: TaskPool, sites: list[Site], settings: Settings) -> Iterator[int | None]:
    """Segment every site and keep its mask; the number of each one's cells, or None where its mask was there."""
    from data_prep import site_tasks as workers

    if settings.segmenter.engine not in segment.NETWORKS or pool.remote:
        yield from pool.as_completed(workers.segment_site, ((site, settings) for site in sites))
        return
    engine = _network(settings.segmenter)
    yield from _by_owner(pool, engine, sites, settings)
    if doubt := engine.doubt():
        console.print(f"note: {doubt}")


@functools.cache
def _network(config: segment.SegmenterConfig) -> Cellpose:
    from data_prep.segment.cellpose import Cellpose

    engine = segment.create(config)
    assert isinstance(engine, Cellpose)
    return engine


def _by_owner(
    pool: TaskPool, engine: Cellpose, sites: list[Site], settings: Settings
) -> Iterator[int | None]:
    from data_prep import site_tasks as workers

    start = time.monotonic()
    waited = {"reading": 0.0, "writing": 0.0}
    queued: deque[tuple[Site, str]] = deque()
    there: list[Site] = []

    def images() -> Iterator[np.ndarray]:
        read = pool.in_order(workers.read_site, ((site, settings) for site in sites))
        for site in sites:
            before = time.monotonic()
            key, image = next(read)
            waited["reading"] += time.monotonic() - before
            if image is None:
                there.append(site)
            else:
                queued.append((site, key))
                yield image

    writing: deque[Future[int]] = deque()
    with ThreadPoolExecutor(WRITERS) as threads:
        try:
            for mask in engine.segment_all(images()):
                writing.append(threads.submit(_keep, settings, queued.popleft()[1], mask))
                while len(writing) > UNWRITTEN:
                    before = time.monotonic()
                    count = writing.popleft().result()
                    waited["writing"] += time.monotonic() - before
                    yield count
        except InputError as error:
            where = (
                f"{queued[0][0].where}: " if queued and queued[0][0].where not in str(error) else ""
            )
            raise InputError(f"{where}{error}") from error
        yield from (future.result() for future in writing)
    yield from (None for _ in there)
    _tell_bound({**engine.network.seconds, **waited}, time.monotonic() - start)


def _keep(settings: Settings, key: str, mask: UInt16[np.ndarray, "h w"]) -> int:
    settings.masks.keep(key, mask)
    return int(np.unique(mask[mask > 0]).size)


def _tell_bound(seconds: dict[str, float], total: float) -> None:
    """What the time went into; masks are made beside the network, so that the parts may add up to more than all."""
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())
    bound = max(seconds, key=seconds.__getitem__)
    console.print(f"segmenting was bound by {bound} (of the time: {parts})")
