"""Extract features of every site with pretrained weights, a trained run, or CellProfiler.

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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from perturbjax.core.config import InputConfig, Pool, Precision
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import python_only, require, require_output, require_sound
from perturbjax.core.progress import track
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches import BatchOrder, Decoder, Sites, open_batches
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.inference import feature_names
from perturbjax.models import BACKBONES, Mode
from perturbjax.models.pooling import pool_stages
from perturbjax.models.symmetries import dihedral
from perturbjax.profiles import cellprofiler
from perturbjax.profiles.cellprofiler import CELLPROFILER
from perturbjax.profiles.feature_files import require_anndata, write_features
from perturbjax.profiles.image_inputs import (
    INPUT_SCALINGS,
    AdaptConfig,
    adapt,
    channel_triples,
    intensity_range,
)
from perturbjax.profiles.profile_table import METADATA
from perturbjax.training.devices import ComputeConfig, Placement, open_devices
from perturbjax.training.processes import HostsConfig, connect, run_on_first_process
from perturbjax.training.run_directory import open_run

#: Batches in a part: the work that an interruption can lose.
PART_BATCHES = 16
SETTINGS = "settings.json"
#: Seconds between looks for parts and tables that another process writes.
_POLL_S = 1.0


@dataclass(frozen=True)
class FeaturesConfig:
    """Extract features of every site of a dataset."""

    data: tuple[Path, ...]
    """Dataset directories with the same channels."""
    out: Path
    """Table to write: .parquet or .h5ad (AnnData). The same command resumes an interrupted
    extraction."""
    backbone: str = "resnet50"
    """Network, or cellprofiler for CellProfiler measurements (median over the cells of a site)."""
    weights: str = ""
    """Pretrained weights: FILE (.pth, .safetensors), hf:OWNER/REPOSITORY[@REVISION] or
    package:NAME."""
    run: Path | None = None
    """Trained run, in place of --backbone and --weights."""
    adapt: AdaptConfig = AdaptConfig()
    pool: Pool = "last"
    """last: output of the backbone. stages: mean, mean over cells and standard deviation of each
    stage but the last."""
    augmentations: int = 1
    """Number of flips and rotations that features are averaged over, 1 to 8."""
    precision: Precision = "float32"
    """Number format of activations."""
    batch_size: int = 32
    """Sites in a device call, over all devices."""
    prefix: str = python_only("")
    """Prefix of the feature names, such as Cells_ for pycytominer."""
    workers: int = python_only(0)
    """Processes for --backbone cellprofiler; 0 uses every core."""
    level: Literal["site", "well"] = "site"
    """Row of the table; well: mean of the sites of a well."""
    compute: ComputeConfig = ComputeConfig()
    hosts: HostsConfig = HostsConfig()

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".parquet", ".h5ad")
        if self.run is None and not self.weights and self.backbone != CELLPROFILER:
            backbone = BACKBONES.get(self.backbone)
            source = f", such as {backbone.source}, {backbone.license}" if backbone else ""
            example = source if backbone and backbone.source else ""
            raise InputError(
                f"--weights: is required (a file, hf:OWNER/REPOSITORY or package:NAME{example}), "
                "or else --run"
            )
        prefix = not self.prefix.startswith(METADATA)
        require("augmentations", self.augmentations, 1 <= self.augmentations <= 8, "1 to 8")
        require("batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("workers", self.workers, self.workers >= 0, "0 (every core) or more")
        require("prefix", self.prefix, prefix, f"text that does not start with {METADATA}")


@dataclass(frozen=True)
class Extractor:
    """A network as a function from batches of sites to features.

    Attributes:
        decoder: reads the pixels of each record.
        step: batch on the device -> features (b, d).
        groups: prefixes of the feature names; d is a multiple of their number.
        facts: everything that determines the values, for the provenance.
    """

    decoder: Decoder
    step: Callable[[RawBatch], Float[Array, "b d"]]
    groups: list[str]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """An extraction in parts.

    Attributes:
        facts: everything that determines the values.
        part: number of sites in a part; the last may have fewer.
        compute: (sites of some parts, number of finished sites) -> features of each part.
        name: number of features -> their names.
    """

    facts: dict[str, Any]
    part: int
    compute: Callable[[Sequence[range], int], Iterator[Float32[np.ndarray, "_n _d"]]]
    name: Callable[[int], list[str]]


def extract(config: FeaturesConfig) -> Path:
    """Write the features of every site or well of a dataset to `config.out`, and return this path.

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
    dataset = open_dataset(config.data)
    make_folder(config.out.parent)
    if config.run is None and config.backbone == CELLPROFILER:
        return _run_job(config, dataset, _cellprofiler_job(config, dataset))
    placement = open_devices(config.compute, local=True)
    extractor = (
        backbone_extractor(config, dataset, placement)
        if config.run is None
        else run_extractor(config.run, dataset, placement)
    )
    job = Job(
        {**extractor.facts, "batch_size": config.batch_size},
        PART_BATCHES * config.batch_size,
        functools.partial(_compute_parts, config, placement, extractor),
        functools.partial(feature_names, extractor.groups),
    )
    return _run_job(config, dataset, job)


def _cellprofiler_job(config: FeaturesConfig, dataset: Dataset) -> Job:
    cellprofiler.require_cp_measure()
    names = cellprofiler.names(dataset)

    def compute(parts: Sequence[range], done: int) -> Iterator[Float32[np.ndarray, "_n d"]]:
        return cellprofiler.measure_parts(dataset, parts, done, config.workers, len(names))

    return Job(cellprofiler.facts(), cellprofiler.PART, compute, lambda count: names)


def _run_job(config: FeaturesConfig, dataset: Dataset, job: Job) -> Path:
    """Compute the unfinished parts and write the table."""
    # Hidden folder of finished parts next to the output.
    work = config.out.with_name(f".{config.out.name}.extracting")
    # Parts may be reused only if data and settings are the same.
    settings = {**job.facts, "index_sha256": dataset.index_sha256, "sites": len(dataset)}
    starts = range(0, len(dataset), job.part)
    parts = [range(start, min(start + job.part, len(dataset))) for start in starts]
    files = [work / f"part-{number:06d}.npy" for number in range(len(parts))]

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
    todo = [parts[number] for number in own]
    done = len(dataset) - sum(map(len, todo)) if processes == 1 else 0
    if todo:
        # Each part is stored as soon as it is finished.
        for number, features in zip(own, job.compute(todo, done), strict=True):
            with atomic(files[number]) as temporary:
                np.save(temporary, features)
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


def _write_table(config: FeaturesConfig, dataset: Dataset, job: Job, files: list[Path]) -> None:
    # Memory maps, because the table is written part by part.
    arrays = [np.load(file, mmap_mode="r") for file in files]
    names = [config.prefix + name for name in job.name(arrays[0].shape[1])]
    facts = {key: value for key, value in job.facts.items() if key != "batch_size"}
    index = dataset.index
    if config.run is not None:  # `embed` marks training rows, which separate better than new ones
        index = index.assign(Metadata_part=open_run(config.run).parts(index["site_id"]))
    rows = write_features(config.out, config.level, index, arrays, names, facts)
    console.print(f"Extracted features: {rows} {config.level}s, {len(names)} features")


def _compute_parts(
    config: FeaturesConfig,
    placement: Placement,
    extractor: Extractor,
    parts: Sequence[range],
    done: int,
) -> Iterator[Float32[np.ndarray, "n d"]]:
    """Yield the features of each part. All parts but the last consist of whole batches."""
    size = config.batch_size
    order = BatchOrder.single_pass(np.concatenate(parts), size)
    batches_done = -(-done // size)
    with open_batches(extractor.decoder, placement, choice="streamed") as source:
        # JAX dispatch is asynchronous: a step returns before the device has finished.
        ahead = (extractor.step(batch) for batch in source.batches(order))
        fetched = (np.asarray(features)[:size] for features in _one_ahead(ahead))
        batches = track(
            fetched,
            total=batches_done + len(order),
            done=batches_done,
            label="Extracting features",
            unit=f"batches of {size}",
        )
        for part in parts:  # the padding of the last batch is dropped
            features = list(itertools.islice(batches, -(-len(part) // size)))
            yield np.concatenate(features)[: len(part)]


def _one_ahead(items: Iterator[Array]) -> Iterator[Array]:
    """Yield each item after the next one was started, so that the device does not wait."""
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


def backbone_extractor(config: FeaturesConfig, dataset: Dataset, placement: Placement) -> Extractor:
    """Return an extractor of a network with published weights.

    Raises:
        InputError: The weights do not fit the network or do not take RGB images, or a channel is
            not stored.
    """
    from perturbjax.models.weights import load_pretrained
    from perturbjax.training.step import DTYPES, split_model

    adaptation = config.adapt
    triples = channel_triples(adaptation.channels, dataset.channel_names, adaptation.channels_as)
    pretrained = load_pretrained(config.backbone, config.weights)
    record = BACKBONES[config.backbone]
    if adaptation.size is None:
        adaptation = dataclasses.replace(adaptation, size=record.input_size)
    if pretrained.provenance["inputs"] != 3:
        raise InputError(
            f"--weights {config.weights}: the network takes {pretrained.provenance['inputs']} "
            "channels, but RGB images have 3. Pass other weights."
        )
    scaling = INPUT_SCALINGS.get(
        adaptation.normalize, record.input_scaling
    )  # auto: that of the weights
    graphdef, params, stats = split_model(pretrained.model)
    params, stats = placement.replicate((params, stats))
    # Stored channels of the k images of a site, (k, 3).
    positions = np.array(list(triples.values()))
    averaged = adaptation.channels_as == "mean"
    prepare = jax.jit(
        lambda batch: adapt(batch, adaptation, positions, scaling), out_shardings=placement.by_row
    )

    @jax.jit
    def forward(
        params: Any, stats: Any, x: Float[Array, "bk h w 3"], cells: Array
    ) -> Float[Array, "bk d"]:
        model = nnx.merge(graphdef, params, stats, copy=True)
        mode = Mode(dtype=DTYPES[config.precision])
        if config.pool == "last":
            return model(x, mode).features
        # All images of a site use the mask of this site.
        return pool_stages(model.stage_maps(x, mode), jnp.repeat(cells, len(triples), axis=0))

    def step(batch: RawBatch) -> Float[Array, "b kd"]:
        x, cells = prepare(batch), batch.mask[..., None]
        views = range(config.augmentations)
        features_of_views = (
            forward(params, stats, dihedral(x, view), dihedral(cells, view)[..., 0])
            for view in views
        )
        features = sum(features_of_views) / len(views)
        # (b k, d) -> (b, k, d)
        features = features.reshape(-1, len(triples), features.shape[1])
        return features.mean(1) if averaged else features.reshape(len(features), -1)

    groups = [f"{config.backbone}_{name}" for name in triples]
    groups = [config.backbone] if averaged or len(triples) == 1 else groups
    # Shift and scale of each site and channel, which map intensities to [0, 1].
    shift, scale = intensity_range(dataset, adaptation.scale)
    labels, masks = np.zeros(len(dataset), np.int32), np.arange(len(dataset), dtype=np.int32)
    sites = Sites((), labels, shift, scale, masks)
    facts = {
        **pretrained.provenance,
        "input": {**vars(adaptation), **scaling._asdict()},
        "pool": config.pool,
        "augmentations": config.augmentations,
        "precision": config.precision,
    }
    return Extractor(
        Decoder(dataset, sites, InputConfig(mask_encoding="binary")), step, groups, facts
    )


def run_extractor(path: Path, dataset: Dataset, placement: Placement) -> Extractor:
    """Return an extractor of a trained run, with the same input as in `perturbjax evaluate`."""
    from perturbjax.inference import load_network

    run = open_run(path)
    network = load_network(run, placement=placement, dataset=dataset)
    model = run.recipe.model.model
    facts = {"run": str(run.path), "model": model, "epoch": network.facts["epoch"]}
    return Extractor(network.decoder(dataset), lambda batch: network.step(batch)[1], [model], facts)
