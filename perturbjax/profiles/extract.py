"""Features of every site of a dataset from a pretrained backbone or a trained run.

Sites stream through the network in record order. Finished parts are kept in a folder beside the output, so that a run
that was killed goes on where it was; the output appears complete or not at all. Memory does not depend on the number
of sites. Several processes share the parts (`shares.py`): a part is computed the same way whoever does it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
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
from perturbjax.profiles import feature_files as tables
from perturbjax.profiles.cellprofiler import CELLPROFILER
from perturbjax.profiles.image_inputs import (
    COLOURS,
    AdaptConfig,
    adapt,
    channel_triples,
    intensity_range,
)
from perturbjax.profiles.profile_table import METADATA
from perturbjax.profiles.shards import Crew, meet
from perturbjax.training.devices import ComputeConfig, Placement, open_devices
from perturbjax.training.processes import HostsConfig
from perturbjax.training.run_directory import open_run

#: Batches in a part, what a kill can cost.
PART_BATCHES = 16
SETTINGS = "settings.json"


@dataclass(frozen=True)
class FeaturesConfig:
    """Extract features of every site of a dataset."""

    data: tuple[Path, ...]
    """Dataset directories with the same channels."""
    out: Path
    """Table to write: .parquet or .h5ad (AnnData). The same command resumes an interrupted extraction."""
    backbone: str = "resnet50"
    """Network, or cellprofiler for CellProfiler measurements (median over the cells of a site)."""
    weights: str = ""
    """Pretrained weights: FILE (.pth, .safetensors), hf:OWNER/REPOSITORY[@REVISION] or package:NAME."""
    run: Path | None = None
    """Trained run, in place of --backbone and --weights."""
    adapt: AdaptConfig = AdaptConfig()
    pool: Pool = "last"
    """last: output of the backbone. stages: mean, mean over cells and standard deviation of each stage but the last."""
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
                f"--weights: is required (a file, hf:OWNER/REPOSITORY or package:NAME{example}), or else --run"
            )
        prefix = not self.prefix.startswith(METADATA)
        require("augmentations", self.augmentations, 1 <= self.augmentations <= 8, "1 to 8")
        require("batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("workers", self.workers, self.workers >= 0, "0 (every core) or more")
        require("prefix", self.prefix, prefix, f"text that does not start with {METADATA}")


@dataclass(frozen=True)
class Extractor:
    """How batches of sites become features.

    Attributes:
        decoder: what is fed of each record.
        step: a batch on the device → (b, d) features.
        groups: what the features are called, before their number: d is a multiple of their count.
        facts: whatever decides the features' values, as plain values for the record.
    """

    decoder: Decoder
    step: Callable[[RawBatch], Float[Array, "b d"]]
    groups: list[str]
    facts: dict[str, Any]


def extract(config: FeaturesConfig) -> Path:
    """Write the features of every site (or well) of a dataset to `config.out`, and return it.

    Of several processes each computes its share of the parts, and the first writes; all return when it has.

    Raises:
        InputError: dataset, weights or run cannot be used or do not fit, a flag makes no sense, `out` cannot be
            written, or another process of the job ended before its share was done.
    """
    crew = meet(config.hosts, config.out)
    with crew.at_work():
        if config.out.suffix == ".h5ad":
            tables.require_anndata()
        dataset = open_dataset(config.data)
        make_folder(config.out.parent)
        if config.run is None and config.backbone == CELLPROFILER:
            return _measured(config, dataset, crew)
        placement = open_devices(config.compute, own=True)
        extractor = (
            backbone_extractor(config, dataset, placement)
            if config.run is None
            else run_extractor(config.run, dataset, placement)
        )
        compute = functools.partial(_compute_parts, config, placement, extractor)
        name = functools.partial(feature_names, extractor.groups)
        job = Job(
            {**extractor.facts, "batch_size": config.batch_size},
            PART_BATCHES * config.batch_size,
            compute,
            name,
        )
        return _write(config, dataset, crew, job)


def _measured(config: FeaturesConfig, dataset: Dataset, crew: Crew) -> Path:
    """CellProfiler's measurements in place of a network's features."""
    cellprofiler.require_cp_measure()
    names = cellprofiler.names(dataset)

    def compute(parts: Sequence[range], behind: int) -> Iterator[Float32[np.ndarray, "_n d"]]:
        return cellprofiler.parts(dataset, parts, behind, config.workers, len(names))

    return _write(
        config,
        dataset,
        crew,
        Job(cellprofiler.facts(), cellprofiler.PART, compute, lambda count: names),
    )


@dataclass(frozen=True)
class Job:
    """What is computed of a dataset, a part at a time.

    Attributes:
        facts: whatever decides the features' values.
        part: sites in a part; the last may have fewer.
        compute: (the sites of some parts, number of sites that are behind already) → the features of each part.
        name: (number of features) → their names.
    """

    facts: dict[str, Any]
    part: int
    compute: Callable[[Sequence[range], int], Iterator[Float32[np.ndarray, "_n _d"]]]
    name: Callable[[int], list[str]]


def _write(config: FeaturesConfig, dataset: Dataset, crew: Crew, job: Job) -> Path:
    """Compute what an interrupted extraction did not, and write the table."""
    work = config.out.with_name(f".{config.out.name}.extracting")
    settings = {**job.facts, "index_sha256": dataset.index_sha256, "sites": len(dataset)}
    every = [
        range(start, min(start + job.part, len(dataset)))
        for start in range(0, len(dataset), job.part)
    ]
    mine = crew.deal(lambda: _unfinished_parts(work, settings, len(every)))
    todo = [every[number] for number in mine]
    behind = len(dataset) - sum(map(len, todo)) if crew.alone else 0
    if todo:
        for number, features in zip(mine, job.compute(todo, behind), strict=True):
            with atomic(_part_file(work, number)) as temporary:
                np.save(temporary, features)
    if not crew.first:
        crew.wait_for_first()
        return config.out

    crew.wait_for_all(lambda number: _part_file(work, number).is_file())
    parts = [np.load(_part_file(work, number), mmap_mode="r") for number in range(len(every))]
    names = [config.prefix + one for one in job.name(parts[0].shape[1])]
    facts = {key: value for key, value in job.facts.items() if key != "batch_size"}
    index = dataset.index
    if (
        config.run is not None
    ):  # what was trained on lies apart by no merit: `embed` tells it from the rest
        index = index.assign(Metadata_part=open_run(config.run).parts(index["site_id"]))
    rows = tables.write(config.out, config.level, index, parts, names, facts)
    shutil.rmtree(work)
    crew.dismiss()
    console.print(f"{rows} {config.level}s, {len(names)} features")
    return config.out


def _unfinished_parts(work: Path, settings: dict[str, Any], count: int) -> list[int]:
    """Which parts an interrupted extraction of the same settings did not leave; of other settings none are kept."""
    settings = json.loads(json.dumps(settings))
    if (work / SETTINGS).is_file() and read_json(work / SETTINGS) != settings:
        console.print(f"{work}: was left by an extraction with other settings; starting anew")
        shutil.rmtree(work)
    make_folder(work)
    write_json(work / SETTINGS, settings)
    return [number for number in range(count) if not _part_file(work, number).is_file()]


def _part_file(work: Path, number: int) -> Path:
    return work / f"part-{number:06d}.npy"


def _compute_parts(
    config: FeaturesConfig,
    placement: Placement,
    extractor: Extractor,
    parts: Sequence[range],
    behind: int,
) -> Iterator[Float32[np.ndarray, "n d"]]:
    """The features of every part, see `Job`. All but the last of a dataset's are whole batches."""
    order = BatchOrder.single_pass(np.concatenate(parts), config.batch_size)
    done = -(-behind // config.batch_size)
    with open_batches(extractor.decoder, placement, choice="streamed") as feed:
        ahead = (extractor.step(batch) for batch in feed.batches(order))
        fetched = (np.asarray(features)[: config.batch_size] for features in _one_ahead(ahead))
        unit = f"batches of {config.batch_size}"
        batches = track(fetched, total=done + len(order), done=done, label="features", unit=unit)
        for part in parts:  # the last batch's padding is dropped
            yield np.concatenate(
                list(itertools.islice(batches, -(-len(part) // config.batch_size)))
            )[: len(part)]


def _one_ahead(items: Iterator[Array]) -> Iterator[Array]:
    """Each item when the next one is under way: the device never waits for the host to fetch."""
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


def backbone_extractor(config: FeaturesConfig, dataset: Dataset, placement: Placement) -> Extractor:
    """Published weights on adapted images."""
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
            f"--weights {config.weights}: takes {pretrained.provenance['inputs']} channels, not 3"
        )
    colours = COLOURS.get(adaptation.normalize, record.input_scaling)  # auto: the backbone's
    graphdef, params, stats = split_model(pretrained.model)
    params, stats = placement.replicate((params, stats))
    positions = np.array(list(triples.values()))
    prepare = jax.jit(
        lambda batch: adapt(batch, adaptation, positions, colours), out_shardings=placement.by_row
    )

    @jax.jit
    def forward(
        params: Any, stats: Any, x: Float[Array, "bk h w 3"], cells: Array
    ) -> Float[Array, "bk d"]:
        model, mode = (
            nnx.merge(graphdef, params, stats, copy=True),
            Mode(dtype=DTYPES[config.precision]),
        )
        if config.pool == "last":
            return model(x, mode).features
        return pool_stages(model.stage_maps(x, mode), jnp.repeat(cells, len(triples), axis=0))

    def step(batch: RawBatch) -> Float[Array, "b kd"]:
        x, cells = prepare(batch), batch.mask[..., None]
        views = range(config.augmentations)
        of_views = (
            forward(params, stats, dihedral(x, view), dihedral(cells, view)[..., 0])
            for view in views
        )
        features = sum(of_views) / len(views)
        features = features.reshape(-1, len(triples), features.shape[1])
        return features.mean(1) if averaged else features.reshape(len(features), -1)

    averaged = adaptation.channels_as == "mean"
    groups = [f"{config.backbone}_{name}" for name in triples]
    groups = [config.backbone] if averaged or len(triples) == 1 else groups
    shift, scale = intensity_range(dataset, adaptation.scale)
    unlabelled, own_mask = np.zeros(len(dataset), np.int32), np.arange(len(dataset), dtype=np.int32)
    return Extractor(
        Decoder(
            dataset,
            Sites((), unlabelled, shift, scale, own_mask),
            InputConfig(mask_encoding="binary"),
        ),
        step,
        groups,
        {
            **pretrained.provenance,
            "input": {**vars(adaptation), **colours._asdict()},
            "pool": config.pool,
            "augmentations": config.augmentations,
            "precision": config.precision,
        },
    )


def run_extractor(path: Path, dataset: Dataset, placement: Placement) -> Extractor:
    """A trained run's own features, its input prepared as in evaluation."""
    from perturbjax.inference import load_network

    run = open_run(path)
    network = load_network(run, placement=placement, dataset=dataset)
    model = run.recipe.model.model
    facts = {"run": str(run.path), "model": model, "epoch": network.facts["epoch"]}
    return Extractor(network.decoder(dataset), lambda batch: network.step(batch)[1], [model], facts)
