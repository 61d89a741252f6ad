"""CellProfiler measurements of every cell of a dataset, by cell or summarized for each site.

The measurements are computed by cp_measure (Muñoz et al. 2025, arXiv:2507.01163) on the masks of
the dataset: cells, and also nuclei and cytoplasm (cell minus nucleus) if the dataset has nuclei.
Intensities are divided by the maximum of their stored integer type, as CellProfiler
does. Costes' correlation is left out because it needs the bit depth of the camera, which a dataset
does not store. Local processes share the sites.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt, UInt16

from perturbjax.core.config import Summary
from perturbjax.core.errors import InputError
from perturbjax.core.progress import track
from perturbjax.data.cells import CellCounts, CropConfig, list_cells, select_cells
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.profiles.part_features import (
    PartFeatures,
    describe_cells,
    summarize,
)

CELLPROFILER = "cellprofiler"
#: Prefixes of all names, as in CellProfiler: pycytominer infers features by them, and `audit` finds
#: intensity features. Datasets without nuclei have cells only.
CELLS, NUCLEI, CYTOPLASM = "Cells", "Nuclei", "Cytoplasm"
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


@dataclass(frozen=True)
class Measure:
    """Rows of the table of measurements.

    Attributes:
        by_cell: whether rows are cells instead of sites.
        summary: of the cells of a site: median, mean, or mean-std for mean and standard deviation.
        crops: maximum number of cells of a site and its seed, for rows that are cells.
        count: number of measurements of a cell.
    """

    by_cell: bool
    summary: Summary
    crops: CropConfig
    count: int


def facts(measure: Measure) -> dict[str, Any]:
    """Return everything that determines the values, for the provenance."""
    version = importlib.metadata.version("cp_measure")
    rows = (
        {"unit": "cell", "max_cells": measure.crops.max_cells, "seed": measure.crops.seed}
        if measure.by_cell
        else {"of_site": measure.summary}
    )
    return {"backbone": CELLPROFILER, "cp_measure": version, **rows}


def names(dataset: Dataset) -> list[str]:
    """Return CellProfiler's names of the measurements (Cells_Intensity_MeanIntensity_DNA, ...).

    The measurements of cells come first, then those of nuclei and cytoplasm.
    """
    # cp_measure names its columns only together with values, so measure one square cell of noise.
    size = 32
    square = np.zeros((size, size), np.uint16)
    square[8:24, 8:24] = 1
    shape = (size, size, len(dataset.channel_names))
    image = np.random.default_rng(0).integers(1, 200, shape, dtype=np.uint8)
    kinds = (CELLS, NUCLEI, CYTOPLASM) if dataset.has_nuclei else (CELLS,)
    return _measure_cells(image, dict.fromkeys(kinds, square), dataset.channel_names)[1]


def object_masks(
    dataset: Dataset, position: int, cells: UInt16[np.ndarray, "h w"]
) -> dict[str, UInt16[np.ndarray, "h w"]]:
    """Return the labels of each kind of object of a site; parts of a cell have its label."""
    if not dataset.has_nuclei:
        return {CELLS: cells}
    nuclei = dataset.nuclei(position)
    return {CELLS: cells, NUCLEI: nuclei, CYTOPLASM: cells * (nuclei == 0)}


def measure_parts(
    dataset: Dataset, parts: Sequence[range], done: int, workers: int, measure: Measure
) -> Iterator[PartFeatures]:
    """Yield the measurements of each part; NaN for a site without cells.

    Args:
        dataset: images and masks.
        parts: sites of each part.
        done: number of sites that were measured before, for the progress.
        workers: number of processes; 0 for the number of cores, at most 16.
        measure: rows of the table.
    """
    sites = list(itertools.chain(*parts))
    processes = min(workers or min(len(os.sched_getaffinity(0)), _MAX_PROCESSES), len(sites))
    with ExitStack() as stack:
        if processes == 1:
            results: Iterator[PartFeatures] = map(partial(_measure_site, dataset, measure), sites)
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
            results = pool.map(partial(_measure_in_worker, measure), sites, chunksize=4)
        tracked = track(
            results, total=done + len(sites), done=done, label="Measuring cells", unit="sites"
        )
        for part in parts:
            rows = list(itertools.islice(tracked, len(part)))
            values = np.concatenate([site.values for site in rows])
            cells = [site.cells for site in rows if site.cells is not None]
            counts = sum((site.counts for site in rows if site.counts), CellCounts())
            yield PartFeatures(
                values,
                pd.concat(cells, ignore_index=True) if cells else None,
                counts if measure.by_cell else None,
            )


_worker_dataset: Dataset


def _open_in_worker(paths: tuple[Path, ...]) -> None:
    global _worker_dataset
    _worker_dataset = open_dataset(paths)


def _measure_in_worker(measure: Measure, position: int) -> PartFeatures:
    return _measure_site(_worker_dataset, measure, position)


def _measure_site(dataset: Dataset, measure: Measure, position: int) -> PartFeatures:
    """Measure the cells of a site; return them, or one row with their summary."""
    image, mask = dataset.pixels(position)
    values = np.zeros((0, measure.count), np.float32)
    if mask.any():
        masks = object_masks(dataset, position, mask)
        values = _measure_cells(image, masks, dataset.channel_names)[0]
    if not measure.by_cell:
        return PartFeatures(summarize(values, measure.summary)[None])
    site = str(dataset.index["site_id"].iat[position])
    cells, counts = select_cells(mask, measure.crops, site)
    # All cells are measured, because neighbors take part in some measurements. Rows are in the
    # order of labels.
    rows = np.isin(list_cells(mask).objects, cells.objects)
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    return PartFeatures(values[rows], describe_cells([position], [cells]), counts)


def _measure_cells(
    image: UInt[np.ndarray, "h w c"],
    masks: Mapping[str, UInt16[np.ndarray, "h w"]],
    channels: list[str],
) -> tuple[Float[np.ndarray, "n d"], list[str]]:
    """Measure the cells of a site and their parts.

    Args:
        image: stored integers.
        masks: labels of each kind of object, cells first. Parts have the labels of their cells.
        channels: names of the channels.

    Returns:
        Measurements of each cell in the order of labels, NaN for a part that a cell does not have;
        and the name of each column.
    """
    from cp_measure.featurizer import featurize, make_featurizer_config

    config = make_featurizer_config(list(channels), objects=list(masks), correlation_costes=False)
    # (1, channels, h, w), from 0 to 1.
    pixels = image.transpose(2, 0, 1)[None] / np.iinfo(image.dtype).max
    labels = np.stack(list(masks.values()))[None].astype(np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects of few pixels give divisions by zero
        measured, columns, objects = featurize(pixels, labels, config)
    cells = list_cells(masks[CELLS]).objects
    values = np.full((len(masks), len(cells), len(columns)), np.nan)
    kinds = list(masks)
    for row, (_, kind, label) in zip(measured, objects, strict=True):
        values[kinds.index(kind), np.searchsorted(cells, label)] = row
    names = [f"{kind}_{column.replace('__', '_')}" for kind in kinds for column in columns]
    return np.concatenate(values, axis=1), names
