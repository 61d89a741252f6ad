"""Segment the sites of a build: estimate one diameter per plate, then segment every site and store
its mask.

A network runs in this process, which owns the accelerator: worker processes read sites a few ahead
of it, and threads write masks behind it. Engines without a network run in the workers, one site
each, and on a cluster all engines do."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep import segment
from data_prep.process_pool import TaskPool
from data_prep.segment import ENGINES
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.progress import track
from perturbjax.segmentation.foreground import analyze_foreground

if TYPE_CHECKING:
    from data_prep.segment.network import NetworkSegmenter
    from data_prep.site import Site
    from data_prep.site_tasks import SegmentedSite, Settings

#: Threads that compress and write masks, and the maximum number of masks that wait for them.
WRITERS, MAX_UNWRITTEN = 2, 8
#: Sites of a plate that are read at most to estimate its diameter, and sites with objects that
#: suffice.
MAX_READ, SAMPLE = 24, 8
#: Failed sites that are listed.
LISTED = 5


def suited(stored: tuple[str, ...], segmented: tuple[str, ...]) -> segment.Engine:
    """Return the engine of `--segmenter auto`: the network for one channel, the watershed for a
    mixture of stains."""
    return "nuclei" if len(segmented or stored) == 1 else "watershed"


def check_channels(
    engine: segment.Engine, stored: tuple[str, ...], segmented: tuple[str, ...]
) -> None:
    """Refuse to run a network on a mixture of stains: its weights know nuclei or cells, not their
    median.

    Raises:
        InputError: the channel to segment must be named.
    """
    if ENGINES[engine].single_stain and len(stored) > 1 and not segmented:
        raise InputError(
            f"--segmenter {engine}: its weights know one stain, but the aggregated image mixes "
            "several channels. Pass the channel to segment with --segment-channels "
            f"(available: {', '.join(stored)})"
        )


def check_cells_channel(
    cells: tuple[str, ...], stored: tuple[str, ...], segmented: tuple[str, ...]
) -> None:
    """Refuse a cells channel without one other channel that shows the nuclei.

    Raises:
        InputError: several cells channels, several or no nuclear channels, or the same channel.
    """
    nuclei = segmented or stored
    if not cells:
        return
    if len(cells) > 1:
        raise InputError(f"--cells-channel {','.join(cells)}: must be one channel")
    if len(nuclei) > 1:
        raise InputError(
            f"--cells-channel {cells[0]}: cells are extended from nuclei in one channel. Pass the "
            f"nuclear stain with --segment-channels (available: {', '.join(stored)})"
        )
    if cells == nuclei:
        raise InputError(
            f"--cells-channel {cells[0]}: is the channel of the nuclei. Pass a channel that shows "
            "the whole cell"
        )


def describe(pool: TaskPool, config: segment.SegmenterConfig) -> dict[str, Any]:
    """Return the provenance of the engine.

    Raises:
        InputError: the engine cannot run as configured.
    """
    from data_prep import site_tasks

    if not ENGINES[config.engine].network:
        return pool.call(site_tasks.describe_segmenter, config)
    return _load_once(config).describe()


@functools.cache
def _load_once(config: segment.SegmenterConfig) -> NetworkSegmenter:
    from data_prep.segment.network import NetworkSegmenter

    engine = segment.create(config)
    assert isinstance(engine, NetworkSegmenter)
    return engine


def estimate_diameters(
    pool: TaskPool, sites: Sequence[Site], settings: Settings
) -> tuple[list[Site], dict[str, float]]:
    """Estimate the diameter of each plate from sites that contain objects.

    One diameter per plate keeps masks independent of the treatment, and a plate compiles few
    programs.

    Args:
        pool: workers, which read the images.
        sites: sites to segment.
        settings: engine and its configuration.

    Returns:
        The sites with their diameters, and the diameter in pixels of each plate. Empty unless the
        engine uses one diameter per plate.
    """
    if settings.segmenter.diameter_mode != "per-plate":
        return list(sites), {}
    # Estimation runs in this process for all engines; the workers only read images.
    network = ENGINES[settings.segmenter.engine].network
    engine = _load_once(settings.segmenter) if network else segment.create(settings.segmenter)
    diameters: dict[str, float] = {}
    for plate in dict.fromkeys(site.plate for site in sites):
        members = [site for site in sites if site.plate == plate]
        images = _sample_images(pool, members, settings)
        diameters[plate] = round(engine.estimate_diameter(images), 2)
        source = f"estimated from {len(images)} sites" if diameters[plate] else "no objects in it"
        console.print(f"info: plate {plate}: diameter {diameters[plate]:.3g} pixels, {source}")
    return [replace(site, diameter=diameters[site.plate]) for site in sites], diameters


def _sample_images(pool: TaskPool, sites: list[Site], settings: Settings) -> list[np.ndarray]:
    """Return images with objects, of sites spread evenly over the plate."""
    from data_prep import site_tasks

    count = min(MAX_READ, len(sites))
    # Every third of the evenly spread sites first, so that a sample that ends early is spread, too.
    positions = np.linspace(0, len(sites) - 1, count).round().astype(int)
    order = [int(position) for start in range(3) for position in positions[start::3]]
    images: list[np.ndarray] = []
    # Read in chunks, and stop when enough sites contain objects.
    for start in range(0, len(order), SAMPLE):
        chunk = ((sites[k], settings) for k in order[start : start + SAMPLE])
        read = pool.in_order(site_tasks.read_segmented_image, chunk)
        images += [image for image in read if analyze_foreground(image).present]
        if len(images) >= SAMPLE:
            break
    return images[:SAMPLE]


def segment_sites(pool: TaskPool, sites: list[Site], settings: Settings) -> None:
    """Segment every site and store its mask; sites that fail are reported at the end.

    Raises:
        InputError: an image cannot be read, or every site failed.
    """
    results = _segment(pool, sites, settings)
    done = list(track(results, total=len(sites), label="Segmenting", unit="sites"))
    failures = [each for each in done if each.failure]
    # Without any mask the dataset would be useless, so the build ends.
    if failures and len(failures) == len(sites):
        raise InputError(f"{failures[0].where}: segmentation failed: {failures[0].failure}")
    for each in failures[:LISTED]:
        console.print(f"warning: {each.where}: segmentation failed: {each.failure}")
    if failures:
        console.print(
            f"warning: {len(failures)} of {len(done)} sites could not be segmented; their masks "
            "are empty and "
            "segmentation_failed is 1 in index.parquet. Leave them out with --exclude "
            "'segmentation_failed>0'"
        )
    # `objects` is None for a mask that was reused.
    if reused := sum(each.objects is None for each in done):
        console.print(
            f"info: reused masks: {reused} of {len(done)} sites (same pixels and settings)"
        )
    if empty := sum(each.objects == 0 and not each.failure for each in done):
        console.print(
            f"warning: no objects in {empty} of {len(done) - reused} newly segmented sites"
        )


def _segment(pool: TaskPool, sites: list[Site], settings: Settings) -> Iterator[SegmentedSite]:
    from data_prep import site_tasks

    if not ENGINES[settings.segmenter.engine].network or pool.remote:
        tasks = ((site, settings) for site in sites)
        yield from pool.as_completed(site_tasks.segment_site, tasks)
        return
    engine = _load_once(settings.segmenter)
    yield from _segment_here(pool, engine, sites, settings)
    if warning := engine.warning():
        console.print(f"warning: {warning}")


def _segment_here(
    pool: TaskPool, engine: NetworkSegmenter, sites: list[Site], settings: Settings
) -> Iterator[SegmentedSite]:
    """Run the network in this process, with reading and writing in parallel."""
    from data_prep import site_tasks

    start = time.monotonic()
    # Without the time that the estimation of diameters took before.
    before_start = dict(engine.network.seconds)
    waited = {"reading": 0.0, "writing": 0.0}
    # Sites of the images that the engine has read, in order, with the key of each mask.
    queued: deque[tuple[Site, str]] = deque()
    reused: list[Site] = []

    def read_images() -> Iterator[tuple[np.ndarray, float]]:
        read = pool.in_order(site_tasks.read_site, ((site, settings) for site in sites))
        for site in sites:
            before = time.monotonic()
            key, image = next(read)
            waited["reading"] += time.monotonic() - before
            # No image means that the stored mask is reused.
            if image is None:
                reused.append(site)
            else:
                queued.append((site, key))
                yield image, site.diameter

    writing: deque[Future[SegmentedSite]] = deque()
    with ThreadPoolExecutor(WRITERS) as threads:
        try:
            for mask in engine.segment_all(read_images()):
                # The engine returns masks in the order of the images.
                site, key = queued.popleft()
                writing.append(threads.submit(site_tasks.store_mask, site, key, mask, settings))
                # Wait for the oldest mask, so that unwritten masks do not accumulate in memory.
                while len(writing) > MAX_UNWRITTEN:
                    before = time.monotonic()
                    result = writing.popleft().result()
                    waited["writing"] += time.monotonic() - before
                    yield result
        except InputError as error:
            # The first queued site has no result yet, so the error is assigned to it.
            where = queued[0][0].where if queued else ""
            prefix = f"{where}: " if where and where not in error.message else ""
            raise InputError(f"{prefix}{error.message}") from error
        yield from (future.result() for future in writing)
    yield from (site_tasks.SegmentedSite(site.where, None) for site in reused)
    working = {part: s - before_start[part] for part, s in engine.network.seconds.items()}
    _report_times({**working, **waited}, time.monotonic() - start)


def _report_times(seconds: dict[str, float], total: float) -> None:
    """Print the time of each part; parts run in parallel, so the sum may exceed 100 %."""
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())
    console.print(f"info: time spent in segmentation: {parts}")
