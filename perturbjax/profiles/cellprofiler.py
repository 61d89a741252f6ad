"""CellProfiler measurements of every cell of a dataset, summarized by their median per site.

The measurements are computed by cp_measure (Muñoz et al. 2025, arXiv:2507.01163) on the masks of
the dataset. Intensities are divided by the maximum of their stored integer type, as CellProfiler
does. Costes' correlation is left out because it needs the bit depth of the camera, which a dataset
does not store. Local processes share the sites.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.progress import track
from perturbjax.dataset import Dataset, open_dataset

CELLPROFILER = "cellprofiler"
#: Prefix of all names, as in CellProfiler: pycytominer infers features by it, and `audit` finds
#: intensity features.
OBJECT = "Cells"
#: Sites in a part, and the maximum number of processes, each of which loads libraries of 200 MB.
PART, _MAX_PROCESSES = 64, 16


def require_cp_measure() -> None:
    """Check that cp_measure is installed.

    Raises:
        InputError: It is not.
    """
    try:
        import cp_measure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--backbone cellprofiler: needs cp_measure, which is not installed. Run `pip install "
            "'perturbjax[cellprofiler]'`."
        ) from error


def facts() -> dict[str, Any]:
    """Return everything that determines the values, for the provenance."""
    return {
        "backbone": CELLPROFILER,
        "cp_measure": importlib.metadata.version("cp_measure"),
        "of_site": "median",
    }


def names(dataset: Dataset) -> list[str]:
    """Return CellProfiler's names of the measurements (Cells_Intensity_MeanIntensity_DNA, ...)."""
    # cp_measure names its columns only together with values, so measure one square cell of noise.
    size = 32
    square = np.zeros((size, size), np.uint16)
    square[8:24, 8:24] = 1
    shape = (size, size, len(dataset.channel_names))
    image = np.random.default_rng(0).integers(1, 200, shape, dtype=np.uint8)
    _, columns = _measure_cells(image, square, dataset.channel_names)
    return [f"{OBJECT}_{column.replace('__', '_')}" for column in columns]


def measure_parts(
    dataset: Dataset, parts: Sequence[range], done: int, workers: int, count: int
) -> Iterator[Float32[np.ndarray, "n d"]]:
    """Yield the measurements of each part; NaN if a site has no cells.

    Args:
        dataset: images and masks.
        parts: sites of each part.
        done: number of sites that were measured before, for the progress.
        workers: number of processes; 0 for the number of cores, at most 16.
        count: number of measurements d.
    """
    sites = list(itertools.chain(*parts))
    processes = min(workers or min(len(os.sched_getaffinity(0)), _MAX_PROCESSES), len(sites))
    with ExitStack() as stack:
        if processes == 1:
            medians: Iterator[np.ndarray] = map(partial(_measure_site, dataset, count), sites)
        else:
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    processes,
                    # A fork of a process with JAX threads can deadlock.
                    multiprocessing.get_context("spawn"),
                    initializer=_open_in_worker,
                    initargs=(dataset.paths,),
                )
            )
            medians = pool.map(partial(_measure_in_worker, count), sites, chunksize=4)
        rows = track(
            medians, total=done + len(sites), done=done, label="Measuring cells", unit="sites"
        )
        for part in parts:
            yield np.stack(list(itertools.islice(rows, len(part))))


_worker_dataset: Dataset


def _open_in_worker(paths: tuple[Path, ...]) -> None:
    global _worker_dataset
    _worker_dataset = open_dataset(paths)


def _measure_in_worker(count: int, position: int) -> Float32[np.ndarray, " d"]:
    return _measure_site(_worker_dataset, count, position)


def _measure_site(dataset: Dataset, count: int, position: int) -> Float32[np.ndarray, " d"]:
    """Return the median of each measurement over the cells of a site."""
    image, mask = dataset.pixels(position)
    if not mask.any():
        return np.full(count, np.nan, np.float32)
    cells, _ = _measure_cells(image, mask, dataset.channel_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a measurement that no cell has is NaN
        median = np.nanmedian(cells, axis=0)
    return np.where(np.isfinite(median), median, np.nan).astype(np.float32)


def _measure_cells(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"], channels: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the measurements of the cells of a site (cells, d) and the name of each column."""
    from cp_measure.featurizer import featurize, make_featurizer_config

    config = make_featurizer_config(list(channels), objects=[OBJECT], correlation_costes=False)
    # (1, channels, h, w), from 0 to 1.
    pixels = image.transpose(2, 0, 1)[None] / np.iinfo(image.dtype).max
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cells of few pixels give divisions by zero
        values, columns, _ = featurize(pixels, mask[None, None].astype(np.int32), config)
    return values, list(columns)
