"""From a site table to a dataset directory: check, segment, write; resumable site by site.

All work happens in `.OUT.building` beside the output: one mask a finished site, under the digest of its pixels, and
the dataset until it is whole. The output appears complete, by one rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import perturbjax
from data_prep import append_sites as appending
from data_prep import illumination, quality
from data_prep import mask_cache as masks
from data_prep import site_tasks as workers
from data_prep.channel_images import Aggregate
from data_prep.cluster import ClusterConfig, open_pool
from data_prep.existing_dataset import already_built, publish, restore
from data_prep.output import creation_time, tidy, work_folder
from data_prep.process_pool import TaskPool, by_chunks
from data_prep.segment import Engine, Precision, SegmenterConfig, pipeline
from data_prep.site_table import FILE, SiteTable, choose_label, merged_identities, read_sites
from data_prep.sources import Project
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest, make_folder
from perturbjax.core.messages import console
from perturbjax.core.options import names_in, python_only, require, require_output, require_sound
from perturbjax.core.plates import PLATE
from perturbjax.core.progress import track
from perturbjax.dataset import SCHEMA_VERSION, Dataset, open_dataset, write_dataset
from perturbjax.dataset.append import append_dataset, class_names
from perturbjax.dataset.writer import Shard, Written
from perturbjax.report.pages.preview import PREVIEW, write_preview

#: A site may have this many times the pixels of the plate's middle one: more is a header that lies.
LARGEST_RATIO = 64

#: (plate, channel) → the function that its images are divided by.
Functions = dict[tuple[str, str], Path]


@dataclass(frozen=True)
class BuildConfig:
    """Build a dataset from images and load_data.csv: cell masks, images and metadata."""

    images: str | Path
    """Folder of the paths in the CSV, a Zarr store (NAME.zarr), a folder of stores, or a URL (s3://, https://)."""
    out: Path
    """Dataset directory to write."""
    load_data: Path | None = None
    """CSV with FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL> and Metadata_* columns, one row per site. Optional for
    Zarr stores."""
    channels: str = ""
    """Channels to use, separated by commas; by default all."""
    aggregate: Aggregate = "median"
    """Combination of the channels into one image; none keeps separate channels."""
    segmenter: Literal[Engine, "auto"] = "auto"
    """Segmentation engine; auto: nuclei for one channel, watershed for several."""
    weights: str = ""
    """Weights for cellpose: nuclei, cyto, cyto2, cyto3, cpsam or a file."""
    segment_channels: str = ""
    """Channels to segment, separated by commas; by default the aggregated image."""
    diameter: float = 0.0
    """Object diameter in pixels; 0: estimated."""
    precision: Precision = python_only("auto")
    """Number format of the segmentation network; auto: bfloat16 for cpsam, float32 for others."""
    label_column: str = ""
    """Label column, or none; by default Metadata_pert_iname, Metadata_broad_sample or Metadata_moa."""
    platemap: Path | None = None
    """TSV with well_position and broad_sample, if the CSV has no treatments."""
    compounds: Path | None = None
    """TSV with broad_sample, pert_iname, InChIKey, …, joined to the plate map."""
    project: Project = "none"
    """Projection of focal planes; none refuses stacks. middle: the upper one of an even number."""
    illumination: str = ""
    """Illumination correction: estimate, or a folder of PLATE_IllumCHANNEL.npy."""
    resize: int = 0
    """Height and width of stored images in pixels; 0 keeps the size."""
    workers: int = 0
    """Processes; 0: every core, or one if a GPU runs the network."""
    mask_cache: str = python_only("", env="PERTURBJAX_MASK_CACHE")
    """Folder of cached masks, at most 4 GB; empty: a folder in the user cache. none: no cache."""
    append: bool = False
    """Add plates to the dataset in --out."""
    overwrite: bool = False
    """Replace a dataset of other settings or images."""
    where: ClusterConfig = ClusterConfig()

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("diameter", self.diameter, self.diameter >= 0, "0 (estimated) or more")
        require("resize", self.resize, self.resize >= 0, "0 (keeps the size) or more")
        require("workers", self.workers, self.workers >= 0, "0 (every core) or more")
        is_clear = not (self.append and self.overwrite)
        require("append", "--overwrite", is_clear, "used without --overwrite")


def build(options: BuildConfig) -> None:
    """Make the dataset directory, or go on making it.

    Raises:
        InputError: input, settings or output cannot be used; nothing is left under the output's name.
    """
    created = creation_time()
    segmented = names_in(options.segment_channels)
    table = read_sites(
        options.load_data,
        options.images,
        channels=names_in(options.channels),
        also=segmented,
        platemap=options.platemap,
        compounds=options.compounds,
        project=options.project,
    )
    stored = names_in(options.channels) or table.channels
    chosen: Engine = (
        pipeline.suited(stored, segmented) if options.segmenter == "auto" else options.segmenter
    )
    options = replace(options, segmenter=chosen, channels=",".join(stored))
    pipeline.check_channels(chosen, stored, segmented)
    if options.aggregate == "none" and len(stored) > 1 and not segmented:
        raise InputError(
            "--aggregate none: there is no one image to segment; name its channel with --segment-channels"
        )
    label_column = choose_label(table.sites, options.label_column, table.source)
    functions = _given_functions(options, table, (*stored, *segmented))
    for note in merged_identities(table.sites, label_column):
        console.print(f"note: {note}")
    make_folder(options.out.parent)
    restore(options.out)
    target = appending.open_target(options.out) if options.append else None

    engine = SegmenterConfig(chosen, options.weights, options.diameter, options.precision)
    with open_pool(workers.worker_count(options.workers, chosen), options.where) as pool:
        described = pipeline.describe(pool, engine)
        segmenter = {**described, "channels": list(segmented) or ["aggregate"]}
        facts = {
            **_facts(options, table, stored, label_column, segmenter, functions),
            "created": created,
        }
        sites = _sites(table, stored, segmented, functions)
        if _is_there(target, options, facts, sites, pool):
            console.print(
                f"{options.out}: is already built of these images with these settings ({len(table)} sites)"
            )
            tidy(options.out, "building")
            return
        if target is not None:
            table = appending.fitting(target, facts, table)
        dtype, shapes = _probe(pool, sites)
        with work_folder(options.out.absolute(), "building") as work:
            store = masks.MaskStore(make_folder(work / "masks"), _cache(options))
            settings = workers.Settings(engine, store, options.aggregate, options.resize, described)
            job = _lit(pool, _Job(table, sites, settings, facts, work), options, shapes)
            _segment(pool, job)
            complete = _write(pool, job, dtype, shapes, target)
            write_preview(open_dataset(complete))
            publish(complete, options.out)
            shutil.rmtree(work)
        if store.cache is not None:
            masks.trim(store.cache)
    classes = (
        f"{table.sites[label_column].nunique()} classes of {label_column}"
        if label_column
        else "no labels"
    )
    console.print(f"{options.out}: {len(table)} sites, {classes}")
    console.print(f"look at it: {options.out / PREVIEW}")


def _is_there(
    target: Dataset | None,
    options: BuildConfig,
    facts: dict[str, Any],
    sites: list[workers.Site],
    pool: TaskPool,
) -> bool:
    if target is not None:
        return appending.already_appended(target, facts, sites, pool)
    return already_built(options.out, options.overwrite, facts, sites, pool)


def _cache(options: BuildConfig) -> Path | None:
    if options.mask_cache == "none":
        return None
    return Path(options.mask_cache) if options.mask_cache else masks.default_cache()


@dataclass(frozen=True)
class _Job:
    """What is built, of what, and where."""

    table: SiteTable
    sites: list[workers.Site]
    settings: workers.Settings
    facts: dict[str, Any]
    work: Path


def _facts(
    options: BuildConfig,
    table: SiteTable,
    stored: tuple[str, ...],
    label_column: str,
    segmenter: dict[str, Any],
    functions: Functions,
) -> dict[str, Any]:
    """Everything but the images that decides the dataset's content, and its digest: the start of its provenance."""
    facts = {
        "schema_version": SCHEMA_VERSION,
        "channels": list(stored),
        "channels_stored": list(stored) if options.aggregate == "none" else ["aggregate"],
        "aggregate": options.aggregate,
        **({} if options.project == "none" else {"project": options.project}),
        "resize": options.resize,
        "quality": quality.VERSION,
        "label_column": label_column,
        "segmenter": segmenter,
        **_light(options, {key: file_digest(path) for key, path in functions.items()}),
        "source": {"name": Path(table.source).name, "sha256": table.sha256},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {
        **facts,
        "settings_sha256": digest,
        "created_by": f"perturbjax {perturbjax.__version__}",
    }


def _given_functions(
    options: BuildConfig, table: SiteTable, channels: tuple[str, ...]
) -> Functions:
    if options.illumination in ("", illumination.ESTIMATE):
        return {}
    return illumination.given(Path(options.illumination), table.sites[PLATE].unique(), channels)


def _light(options: BuildConfig, digests: dict[tuple[str, str], str]) -> dict[str, Any]:
    """What the provenance says of the light: nothing where images are left as they are."""
    if not options.illumination:
        return {}
    by_plate: dict[str, dict[str, str]] = {}
    for (plate, channel), digest in digests.items():
        by_plate.setdefault(plate, {})[channel] = digest
    how = {"how": "functions"}
    if options.illumination == illumination.ESTIMATE:
        how = {"how": illumination.ESTIMATE, "version": str(illumination.VERSION)}
    return {"illumination": {**how, "sha256": by_plate}}


def _sites(
    table: SiteTable, stored: tuple[str, ...], segmented: tuple[str, ...], functions: Functions
) -> list[workers.Site]:
    return [
        workers.Site(
            name=row["site_id"],
            where=table.where(row),
            stored=tuple(row[FILE + channel] for channel in stored),
            segmented=tuple(row[FILE + channel] for channel in segmented),
            channels=(*stored, *segmented),
            functions=tuple(
                functions[row[PLATE], channel] for channel in (*stored, *segmented) if functions
            ),
        )
        for row in table.sites.to_dict("records")
    ]


def _lit(pool: TaskPool, job: _Job, options: BuildConfig, shapes: list[tuple[int, int]]) -> _Job:
    """The job with every function that its images are to be divided by, looked at or estimated."""
    if options.illumination != illumination.ESTIMATE:
        illumination.require_sizes(job.sites, shapes)
        return job
    channels = (*names_in(options.channels), *names_in(options.segment_channels))
    plates = list(job.table.sites[PLATE])
    made = illumination.estimate_all(
        pool, job.sites, plates, channels, shapes, job.work / "illumination"
    )
    sites = illumination.with_functions(
        job.sites, plates, channels, {key: path for key, (path, _) in made.items()}
    )
    light = _light(options, {key: digest for key, (_, digest) in made.items()})
    return replace(job, sites=sites, facts={**job.facts, **light})


def _probe(pool: TaskPool, sites: list[workers.Site]) -> tuple[np.dtype, list[tuple[int, int]]]:
    """The one stored type and each site's shape, from headers: bad files are told of before hours of segmenting."""
    probes = list(by_chunks(pool, workers.probe_sites, sites, "checking files"))
    shapes = [shape for _, shape in probes]
    middle = float(np.median([height * width for height, width in shapes]))
    for site, (height, width) in zip(sites, shapes, strict=True):
        if height * width > LARGEST_RATIO * middle:
            raise InputError(
                f"{site.where}: its images claim {height} x {width} pixels, {height * width / middle:.0f} times the "
                "plate's others; leave the row out or mend the files"
            )
    if len(set(shapes)) > 1:
        console.print(
            f"note: sites have {len(set(shapes))} different sizes; --resize N makes them one, as training needs"
        )
    return np.result_type(*{dtype for dtype, _ in probes}), shapes


def _segment(pool: TaskPool, job: _Job) -> None:
    results = pipeline.segmented(pool, job.sites, job.settings)
    found = list(track(results, total=len(job.sites), label="segmenting", unit="sites"))
    if reused := found.count(None):
        console.print(
            f"reused: {reused} of {len(found)} sites have masks of the same pixels and settings already"
        )
    if empty := found.count(0):
        console.print(
            f"note: nothing was found in {empty} of the {len(found) - reused} sites just segmented"
        )


def _write(
    pool: TaskPool,
    job: _Job,
    dtype: np.dtype,
    shapes: list[tuple[int, int]],
    target: Dataset | None,
) -> Path:
    """The complete dataset directory, still in the working folder."""
    folder = job.work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    table, resize = job.table, job.settings.resize
    if target is not None:
        dtype = appending.stored_type(target, dtype)
    prepared = pool.in_order(
        workers.prepare_site, ((site, job.settings, dtype) for site in job.sites)
    )
    pixels = len(table) * resize**2 if resize else sum(height * width for height, width in shapes)

    def elsewhere(shards: list[Shard]) -> Iterator[Written]:
        of = [job.sites[shard.start : shard.start + len(shard.labels)] for shard in shards]
        tasks = (
            (shard, sites, job.settings, dtype) for shard, sites in zip(shards, of, strict=True)
        )
        done = pool.in_order(workers.write_shard, tasks)
        yield from track(done, total=len(shards), label="writing", unit="shards")

    written = write_dataset(
        folder,
        table.sites[["site_id", *table.metadata_columns]],
        track(prepared, total=len(table), label="writing", unit="sites"),
        channel_names=job.facts["channels_stored"],
        image_dtype=dtype,
        label_column=job.facts["label_column"],
        pixel_bytes=pixels * (len(job.facts["channels_stored"]) * dtype.itemsize + 2),
        facts=job.facts,
        classes=() if target is None else class_names(target.path),
        elsewhere=elsewhere if pool.remote else None,
    )
    return (
        written if target is None else append_dataset(target.path, written, job.work / "together")
    )
