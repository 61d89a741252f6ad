"""Extract features of cells, sites or wells with pretrained weights, a run, or CellProfiler.

Sites pass through the network in record order, in parts of a few batches. Each finished part is
stored in a folder next to the output, so that an interrupted extraction resumes; the output
appears only when it is complete. Memory does not depend on the number of sites. With
`--distributed`, process i of n computes every n-th unfinished part and the first process writes the
table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder, read_json, write_json, write_parquet
from perturbjax.core.messages import console
from perturbjax.core.progress import track
from perturbjax.data.batches import BatchOrder, open_batches
from perturbjax.data.cells import CellCounts
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.profiles import cellprofiler
from perturbjax.profiles.cellprofiler import CELLPROFILER
from perturbjax.profiles.extractors import Extractor, backbone_extractor, run_extractor
from perturbjax.profiles.feature_files import require_anndata, write_features
from perturbjax.profiles.feature_options import FeaturesConfig
from perturbjax.profiles.part_features import PartFeatures, summary_names
from perturbjax.profiles.spatial_data import ZARR, require_spatialdata
from perturbjax.profiles.window_features import (
    PART_WINDOWS,
    compute_parts,
    divide_sites,
    one_ahead,
    open_reader,
    require_cells,
    window_facts,
)
from perturbjax.training.apply_network import feature_names
from perturbjax.training.devices import Placement, open_devices
from perturbjax.training.processes import connect, run_on_first_process
from perturbjax.training.run_directory import open_run, require_whole_sites

__all__ = ["FeaturesConfig", "extract"]

#: Batches in a part: the work that an interruption can lose.
PART_BATCHES = 16
#: Pixels of the network inputs in a device call, by platform. Small windows need large batches:
#: oneDNN is not faster than XLA for 30 windows of 48 pixels.
BATCH_PIXELS, ACCELERATOR_BATCH_PIXELS = {"cpu": 2**20}, 2**22
SETTINGS = "settings.json"
#: Seconds between looks for parts and tables that another process writes.
_POLL_S = 1.0


@dataclass(frozen=True)
class Job:
    """An extraction in parts.

    Attributes:
        facts: everything that determines the values.
        parts: sites of each part.
        compute: (sites of some parts, number of finished sites) -> features of each part.
        name: number of features -> their names.
    """

    facts: dict[str, Any]
    parts: list[range]
    compute: Callable[[Sequence[range], int], Iterator[PartFeatures]]
    name: Callable[[int], list[str]]


def extract(config: FeaturesConfig) -> Path:
    """Write the features of a dataset to `config.out`, and return this path.

    With several processes, all return after the first has written the table.

    Raises:
        InputError: Dataset, weights or run cannot be used, a flag is wrong, or `out` cannot be
            written.
    """
    # JAX would otherwise handle SIGTERM itself, to stop all processes at the same step; here each
    # stops alone.
    jax.config.update("jax_enable_preemption_service", False)
    connect(config.hosts)
    if config.out.suffix == ".h5ad":
        require_anndata("--out")
    if config.out.suffix == ZARR:
        require_spatialdata()
    dataset = open_dataset(config.data)
    make_folder(config.out.parent)
    if config.run is None and config.backbone == CELLPROFILER:
        return _run_job(config, dataset, _cellprofiler_job(config, dataset))
    placement = open_devices(config.compute, local=True)
    return _run_job(config, dataset, _network_job(config, dataset, placement))


def _network_job(config: FeaturesConfig, dataset: Dataset, placement: Placement) -> Job:
    reader = None if config.windows == "site" else open_reader(config, dataset)
    if config.run is not None and reader is not None:
        require_whole_sites(open_run(config.run).recipe, config.run)
    extractor = (
        backbone_extractor(config, dataset, placement, reader.size if reader else 0)
        if config.run is None
        else run_extractor(config.run, dataset, placement)
    )
    size = config.batch_size or _choose_batch_size(extractor, placement)
    config = dataclasses.replace(config, batch_size=size)
    facts = {**extractor.facts, "batch_size": size}
    name = functools.partial(feature_names, extractor.groups)
    if reader is None:
        parts = divide_sites(dataset, None, PART_BATCHES * config.batch_size)
        compute = functools.partial(_compute_sites, config, placement, extractor)
        return Job(facts, parts, compute, name)

    def name_summary(count: int) -> list[str]:
        if config.level == "cell" or config.summary != "mean-std":
            return name(count)
        return summary_names(name(count // 2), config.summary)

    return Job(
        {**facts, **window_facts(config, reader)},
        divide_sites(dataset, reader, PART_WINDOWS),
        functools.partial(compute_parts, config, placement, extractor, reader),
        name_summary,
    )


def _choose_batch_size(extractor: Extractor, placement: Placement) -> int:
    pixels = BATCH_PIXELS.get(jax.default_backend(), ACCELERATOR_BATCH_PIXELS)
    # Each device gets the same number of sites.
    return max(1, pixels // extractor.pixels) * placement.count


def _cellprofiler_job(config: FeaturesConfig, dataset: Dataset) -> Job:
    cellprofiler.require_cp_measure()
    if config.level == "cell":
        require_cells(dataset)
    names = cellprofiler.names(dataset)
    measure = cellprofiler.Measure(config.level == "cell", config.summary, config.crops, len(names))

    def compute(parts: Sequence[range], done: int) -> Iterator[PartFeatures]:
        return cellprofiler.measure_parts(dataset, parts, done, config.workers, measure)

    named = names if config.level == "cell" else summary_names(names, config.summary)
    parts = divide_sites(dataset, None, cellprofiler.PART)
    return Job(cellprofiler.facts(measure), parts, compute, lambda count: named)


def _run_job(config: FeaturesConfig, dataset: Dataset, job: Job) -> Path:
    """Compute the unfinished parts and write the table."""
    # Hidden folder of finished parts next to the output.
    work = config.out.with_name(f".{config.out.name}.extracting")
    # Parts may be reused only if data and settings are the same.
    settings = {**job.facts, "index_sha256": dataset.index_sha256, "sites": len(dataset)}
    files = [work / f"part-{number:06d}.npy" for number in range(len(job.parts))]

    def find_unfinished() -> np.ndarray:
        _prepare_folder(work, settings)
        return np.array([not file.is_file() for file in files])

    process, processes = 0, 1
    if jax.distributed.is_initialized():
        process, processes = jax.process_index(), jax.process_count()
        # One process prepares the folder, so that all processes use the same list.
        unfinished = run_on_first_process(find_unfinished, like=np.zeros(len(files), bool))
    else:
        unfinished = find_unfinished()
    own = np.flatnonzero(unfinished)[process::processes]
    todo = [job.parts[number] for number in own]
    done = len(dataset) - sum(map(len, todo)) if processes == 1 else 0
    if todo:
        # Each part is stored as soon as it is finished.
        for number, features in zip(own, job.compute(todo, done), strict=True):
            _save_part(files[number], features)
    if process:
        # The first process deletes the folder after it has written the table.
        _wait_until(lambda: not work.is_dir())
        return config.out
    _wait_until(lambda: all(file.is_file() for file in files))
    _write_table(config, dataset, job, files)
    shutil.rmtree(work)
    return config.out


def _prepare_folder(work: Path, settings: dict[str, Any]) -> None:
    """Create the folder of finished parts; parts of other settings are deleted."""
    # Convert as JSON does (tuples become lists), so that equal settings compare equal.
    settings = json.loads(json.dumps(settings))
    if (work / SETTINGS).is_file() and read_json(work / SETTINGS) != settings:
        console.print(f"info: {work}: belongs to an extraction with other settings; starting over")
        shutil.rmtree(work)
    make_folder(work)
    write_json(work / SETTINGS, settings)


def _wait_until(ready: Callable[[], bool]) -> None:
    """Wait for files of other processes. JAX ends this process if another one dies."""
    while not ready():
        time.sleep(_POLL_S)


def _save_part(file: Path, part: PartFeatures) -> None:
    """Write the features of a part last, because their file marks the part as finished."""
    if part.cells is not None:
        write_parquet(file.with_suffix(".parquet"), part.cells)
    if part.counts is not None:
        write_json(file.with_suffix(".json"), vars(part.counts))
    with atomic(file) as temporary:
        np.save(temporary, part.values)


def _write_table(config: FeaturesConfig, dataset: Dataset, job: Job, files: list[Path]) -> None:
    # Memory maps, because the table is written part by part.
    arrays = [np.load(file, mmap_mode="r") for file in files]
    names = [_prefix(config) + name for name in job.name(arrays[0].shape[1])]
    facts = {key: value for key, value in job.facts.items() if key != "batch_size"}
    index = dataset.index
    if config.run is not None:  # `embed` marks training rows, which separate better than new ones
        index = index.assign(Metadata_part=open_run(config.run).parts(index["site_id"]))
    cells = None
    if config.level == "cell":
        cells = pd.concat([pd.read_parquet(f.with_suffix(".parquet")) for f in files])
        if cells.empty:
            raise InputError(
                f"{dataset.path}: every cell touches the border of its site, so that none is left. "
                "Pass --level site."
            )
    _report_counts([f.with_suffix(".json") for f in files if f.with_suffix(".json").is_file()])
    rows = write_features(config.out, config.level, index, arrays, names, facts, cells, dataset)
    console.print(f"Extracted features: {rows} {config.level}s, {len(names)} features")


def _prefix(config: FeaturesConfig) -> str:
    """Prefix of the feature names; measurements of CellProfiler have theirs already."""
    by_network = config.run is not None or config.backbone != CELLPROFILER
    default = f"{cellprofiler.CELLS}_" if config.level == "cell" and by_network else ""
    return config.prefix or default


def _report_counts(files: list[Path]) -> None:
    counts = sum((CellCounts(**read_json(file)) for file in files), CellCounts())
    if not counts.total:
        return
    used = counts.total - counts.border - counts.not_sampled
    console.print(
        f"info: {used:,} of {counts.total:,} cells are used; dropped: {counts.border:,} at the "
        f"border of a site, {counts.not_sampled:,} by --max-cells"
    )
    if counts.larger:
        console.print(
            f"warning: {counts.larger:,} cells are larger than the crop; only their center is "
            "used. Pass a larger --crop-size."
        )


def _compute_sites(
    config: FeaturesConfig,
    placement: Placement,
    extractor: Extractor,
    parts: Sequence[range],
    done: int,
) -> Iterator[PartFeatures]:
    """Yield the features of each part. All parts but the last consist of whole batches."""
    size = config.batch_size
    order = BatchOrder.single_pass(np.concatenate(parts), size)
    batches_done = -(-done // size)
    with open_batches(extractor.decoder, placement, choice="streamed") as source:
        # JAX dispatch is asynchronous: a step returns before the device has finished.
        ahead = (extractor.step(batch) for batch in source.batches(order))
        fetched = (np.asarray(features)[:size] for features in one_ahead(ahead))
        batches = track(
            fetched,
            total=batches_done + len(order),
            done=batches_done,
            label="Extracting features",
            unit=f"batches of {size}",
        )
        for part in parts:  # the padding of the last batch is dropped
            features = list(itertools.islice(batches, -(-len(part) // size)))
            yield PartFeatures(np.concatenate(features)[: len(part)])
