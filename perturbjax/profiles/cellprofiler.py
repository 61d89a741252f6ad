"""CellProfiler's measurements of every cell, by cp_measure (Muñoz et al. 2025, arXiv 2507.01163), and their medians.

Cells are those of the dataset's own masks. Intensities are divided by the largest value of their stored integer type,
as CellProfiler does. Costes' correlation is left out: it takes a threshold scale of the camera, which a dataset does
not know. Sites are measured by several processes and kept in parts, as those of a network are (`extract`).
"""

from __future__ import annotations

import importlib.metadata
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
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
#: Begins every name, as CellProfiler's do: pycytominer infers them, and the audit finds their brightness.
OBJECT = "Cells"
#: Sites in a part, what a kill can cost; and processes at most, each of which holds libraries of 200 MB.
PART, _PROCESSES = 64, 16

Measure = Callable[[int], Float32[np.ndarray, " d"]]


def require_cp_measure() -> None:
    """Raises:
    InputError: cp_measure is not installed.
    """
    try:
        import cp_measure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--backbone cellprofiler: needs cp_measure; run `pip install 'perturbjax[cellprofiler]'`"
        ) from error


def facts() -> dict[str, Any]:
    """What decides the features' values."""
    return {
        "backbone": CELLPROFILER,
        "cp_measure": importlib.metadata.version("cp_measure"),
        "of_site": "median",
    }


def names(dataset: Dataset) -> list[str]:
    """What is measured of a cell, in CellProfiler's words: Cells_Intensity_MeanIntensity_DNA …"""
    side = 32
    square = np.zeros((side, side), np.uint16)
    square[8:24, 8:24] = 1
    image = np.random.default_rng(0).integers(
        1, 200, (side, side, len(dataset.channel_names)), dtype=np.uint8
    )
    _, columns = _cells(image, square, dataset.channel_names)
    return [f"{OBJECT}_{column.replace('__', '_')}" for column in columns]


def parts(
    dataset: Dataset, parts: Sequence[range], behind: int, workers: int, count: int
) -> Iterator[Float32[np.ndarray, "n d"]]:
    """The features of every part, NaN where a site has no cells.

    Args:
        parts: the sites of each.
        behind: sites that need not be measured any more.
        workers: processes; 0 takes as many as there are cores, 16 at most.
        count: of the features.
    """
    sites = list(itertools.chain(*parts))
    processes = min(workers or min(len(os.sched_getaffinity(0)), _PROCESSES), len(sites))
    with ExitStack() as held:
        if processes == 1:
            measured: Iterator[np.ndarray] = map(partial(_of_site, dataset, count=count), sites)
        else:
            spawn = multiprocessing.get_context("spawn")
            pool = held.enter_context(
                ProcessPoolExecutor(
                    processes, spawn, initializer=_open, initargs=(dataset.paths, count)
                )
            )
            measured = pool.map(_of_position, sites, chunksize=4)
        rows = track(
            measured, total=behind + len(sites), done=behind, label="features", unit="sites"
        )
        for part in parts:
            yield np.stack(list(itertools.islice(rows, len(part))))


_measure: Measure


def _open(paths: tuple[Path, ...], count: int) -> None:
    global _measure
    _measure = partial(_of_site, open_dataset(paths), count=count)


def _of_position(position: int) -> Float32[np.ndarray, " d"]:
    return _measure(position)


def _of_site(dataset: Dataset, position: int, *, count: int) -> Float32[np.ndarray, " d"]:
    """The median over a site's cells of everything that is measured."""
    image, mask = dataset.pixels(position)
    if not mask.any():
        return np.full(count, np.nan, np.float32)
    cells, _ = _cells(image, mask, dataset.channel_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what no cell of a site has stays missing
        found = np.nanmedian(cells, axis=0)
    return np.where(np.isfinite(found), found, np.nan).astype(np.float32)


def _cells(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"], channels: list[str]
) -> tuple[np.ndarray, list[str]]:
    """(cells, d) of one site, and what each column is."""
    from cp_measure.featurizer import featurize, make_featurizer_config

    config = make_featurizer_config(list(channels), objects=[OBJECT], correlation_costes=False)
    pixels = image.transpose(2, 0, 1)[None] / np.iinfo(image.dtype).max
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # divisions by nothing, of cells of few pixels
        values, columns, _ = featurize(pixels, mask[None, None].astype(np.int32), config)
    return values, list(columns)
