"""Features of cells and tiles: windows of native resolution that pass through a network.

Each site is decoded once. Its windows fill batches of one fixed size across the borders of sites,
so that a network is compiled once for all sites. The next sites are decoded in a thread while the
device computes.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32

from perturbjax.core.errors import InputError
from perturbjax.core.progress import track
from perturbjax.data import mask_encodings
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.cells import CellCounts, CellReader, CellTable, SiteCells, crop_pixels
from perturbjax.data.tiles import SiteTiles, TileReader
from perturbjax.dataset import Dataset
from perturbjax.profiles.extractors import Extractor
from perturbjax.profiles.feature_options import FeaturesConfig
from perturbjax.profiles.part_features import PartFeatures, describe_cells, summarize
from perturbjax.training.devices import Placement

#: Windows in a part: the work that an interruption can lose. A site is never divided.
PART_WINDOWS = 1024
#: Sites that are decoded in advance.
SITES_AHEAD = 2

T = TypeVar("T")
SiteWindows = SiteCells | SiteTiles
WindowReader = CellReader | TileReader


class FinishedSite(NamedTuple):
    """A site without its pixels: number of windows, and its cells if windows are cells."""

    windows: int
    cells: CellTable | None = None
    counts: CellCounts | None = None


def open_reader(config: FeaturesConfig, dataset: Dataset) -> WindowReader:
    """Return the reader of the cells or tiles of a dataset.

    Raises:
        InputError: the dataset has no cells.
    """
    if config.windows == "tile":
        return TileReader(dataset, crop_pixels(config.crops.crop_size, dataset))
    require_cells(dataset)
    return CellReader(dataset, config.crops)


def require_cells(dataset: Dataset) -> None:
    """Check that a dataset has at least one cell.

    Raises:
        InputError: It has none.
    """
    if not dataset.index["n_cells"].any():
        raise InputError(
            f"{dataset.path}: no site has a cell in its mask. Pass --unit tile --level site, or "
            "build the dataset with another segmenter."
        )


def window_facts(config: FeaturesConfig, reader: WindowReader) -> dict[str, Any]:
    """Return everything about windows and summary that determines the values."""
    facts: dict[str, Any] = {"unit": config.windows, "window_size": reader.size}
    if isinstance(reader, CellReader):
        crops = reader.config
        facts |= {name: getattr(crops, name) for name in ("background", "max_cells", "seed")}
    return facts | ({} if config.level == "cell" else {"of_site": config.summary})


def divide_sites(dataset: Dataset, reader: WindowReader | None, most: int) -> list[range]:
    """Divide the sites into parts of at least `most` windows, or of `most` sites without reader."""
    windows = np.ones(len(dataset), int)
    if isinstance(reader, TileReader):
        windows = np.array([reader.count(position) for position in range(len(dataset))])
    elif isinstance(reader, CellReader):
        windows = dataset.index["n_cells"].to_numpy(int)
        windows = np.minimum(windows, reader.config.max_cells or windows.max(initial=0))
    # A part begins at each site at which the number of windows before it passes a multiple.
    parts = (np.cumsum(windows) - windows) // most
    starts = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(dataset)]
    return [range(*ends) for ends in itertools.pairwise(starts)]


def compute_parts(
    config: FeaturesConfig,
    placement: Placement,
    extractor: Extractor,
    reader: WindowReader,
    parts: Sequence[range],
    done: int,
) -> Iterator[PartFeatures]:
    """Yield the features of each part.

    Args:
        config: level, summary and batch size.
        placement: devices.
        extractor: network.
        reader: cells or tiles of the sites of `extractor.dataset`.
        parts: sites of each part.
        done: number of sites that were computed before, for the progress.
    """
    positions = list(itertools.chain(*parts))
    # Networks with published weights pool over the pixels of the cell; runs get the mask with its
    # neighbors, as in training.
    build = functools.partial(
        _build_batches, extractor, config.batch_size, single=config.run is None
    )
    with ThreadPoolExecutor(1) as pool:
        sites = track(
            _read_ahead(pool, reader, positions),
            total=done + len(positions),
            done=done,
            label="Extracting features",
            unit="sites",
        )
        for part in parts:
            finished: list[FinishedSite] = []
            batches = build(zip(part, itertools.islice(sites, len(part)), strict=True), finished)
            steps = ((extractor.step(placement.place_rows(raw)), rows) for raw, rows in batches)
            values = [np.asarray(features)[:rows] for features, rows in one_ahead(steps)]
            if not values:
                # Without a window, the network runs once to learn the number of features.
                values = [_run_on_zeros(extractor, placement, reader.size, config.batch_size)[:0]]
            yield _finish_part(config, part, finished, np.concatenate(values))
        # The progress shows the last site and the duration at the end of its iterator.
        next(sites, None)


def _finish_part(
    config: FeaturesConfig, part: range, sites: list[FinishedSite], values: np.ndarray
) -> PartFeatures:
    counts = [site.counts for site in sites if site.counts]
    total = sum(counts, CellCounts()) if counts else None
    if config.level == "cell":
        cells = describe_cells(part, [site.cells for site in sites if site.cells is not None])
        return PartFeatures(values, cells, total)
    ends = np.cumsum([0, *(site.windows for site in sites)])
    rows = [summarize(values[a:b], config.summary) for a, b in itertools.pairwise(ends)]
    return PartFeatures(np.stack(rows), None, total)


def _build_batches(
    extractor: Extractor,
    size: int,
    sites: Iterator[tuple[int, SiteWindows]],
    finished: list[FinishedSite],
    *,
    single: bool,
) -> Iterator[tuple[RawBatch, int]]:
    """Yield batches of `size` windows with their number of rows; the last one has padding.

    Args:
        extractor: mask encoding, shift and scale of each site.
        size: windows in a batch.
        sites: position and windows of each site.
        finished: list to which the sites are appended.
        single: whether masks of cells contain the cell without its neighbors.
    """
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    positions: list[int] = []
    for position, site in sites:
        cells = site if isinstance(site, SiteCells) else None
        details = (cells.table, cells.counts) if cells is not None else ()
        finished.append(FinishedSite(len(site), *details))
        start = 0
        while start < len(site):
            stop = min(len(site), start + size - len(positions))
            image, mask = site.crop(start, stop)
            if single and cells is not None:
                mask *= mask == cells.table.objects[start:stop, None, None]
            images.append(image)
            masks.append(mask)
            positions += [position] * (stop - start)
            start = stop
            if len(positions) == size:
                yield _batch(extractor, images, masks, positions, size)
                images, masks, positions = [], [], []
    if positions:
        yield _batch(extractor, images, masks, positions, size)


def _batch(
    extractor: Extractor,
    images: list[np.ndarray],
    masks: list[np.ndarray],
    positions: list[int],
    size: int,
) -> tuple[RawBatch, int]:
    rows = len(positions)
    # Padding repeats the first window and has weight 0.
    order = np.r_[:rows, np.zeros(size - rows, int)]
    records = np.array(positions, np.int32)[order]
    encoding = extractor.input.mask_encoding
    encoded = np.stack([mask_encodings.encode(mask, encoding) for mask in itertools.chain(*masks)])
    weight = (np.arange(size) < rows).astype(np.float32)
    sites = extractor.sites
    label, shift, scale = (x[records] for x in (sites.labels, sites.shift, sites.scale))
    host: tuple[Any, ...] = (
        np.concatenate(images)[order],
        encoded[order],
        label,
        records,
        weight,
        shift,
        scale,
    )
    return RawBatch(*host), rows


def _run_on_zeros(
    extractor: Extractor, placement: Placement, size: int, batch: int
) -> Float32[np.ndarray, "b d"]:
    dataset = extractor.dataset
    image = np.zeros((1, size, size, len(dataset.channel_names)), dataset.image_dtype)
    mask = np.zeros((1, size, size), np.uint16)
    raw, _ = _batch(extractor, [image], [mask], [0], batch)
    return np.asarray(extractor.step(placement.place_rows(raw)))


def _read_ahead(
    pool: ThreadPoolExecutor, reader: WindowReader, positions: Sequence[int]
) -> Iterator[SiteWindows]:
    """Read each position in a thread, at most `SITES_AHEAD` in advance."""
    queue: deque[Future[SiteWindows]] = deque(
        pool.submit(reader.read, position) for position in positions[:SITES_AHEAD]
    )
    for position in positions[SITES_AHEAD:]:
        # The next site is decoded while the caller computes.
        queue.append(pool.submit(reader.read, position))
        yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next one was started, so that the device does not wait."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before
