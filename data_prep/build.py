"""From a site table to a dataset directory: check, segment, write; resumable site by site.

All work happens in `.OUT.building` beside the output: one mask a finished site, under the digest of its pixels, and
the dataset until it is whole. The output appears complete, by one rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import perturbjax
from data_prep import masks, workers
from data_prep.images import Aggregate
from data_prep.output import creation_time, tidy, work_folder
from data_prep.pool import Pool
from data_prep.segment import Engine, Precision, SegmenterConfig, pipeline
from data_prep.sites import FILE, SiteTable, choose_label, merged_identities, read_sites
from data_prep.sources import Project
from perturbjax.console import InputError, console, names_in, require, require_output, require_sound, track
from perturbjax.dataset import INDEX, PROVENANCE, SCHEMA_VERSION, SOURCE_DIGEST, open_dataset, write_dataset
from perturbjax.files import make_folder, read_json
from perturbjax.pages.preview import PREVIEW, write_preview

#: Sites whose files are looked at in one task.
CHUNK = 32
#: A site may have this many times the pixels of the plate's middle one: more is a header that lies.
LARGEST_RATIO = 64
#: Files of a dataset of any version; whatever else lies in its folder is somebody's own.
DATASET_FILES = ("*.array_record*", "*.labels.txt", "dataset_info.json", "features.json", INDEX, PROVENANCE, PREVIEW)


@dataclass(frozen=True)
class BuildConfig:
    """Images and load_data.csv to a dataset directory.

    perturbjax build --load-data load_data.csv --images DIR --out dataset
    perturbjax build --images plate.zarr --platemap map.tsv --out dataset --resize 128
    """

    images: str | Path
    """Folder the paths in the CSV start from, or a Zarr store of plates (NAME.zarr), or a folder of them; or the URL of
    one: s3://…, https://…"""
    out: Path
    """Dataset directory to make."""
    load_data: Path | None = None
    """CSV with FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL> and Metadata_* columns, one row a site. A store needs no
    file names in it, and none at all where --platemap says what the wells got."""
    channels: str = ""
    """Names of the channels to use, with commas; empty takes all."""
    aggregate: Aggregate = "median"
    """How channels become one image; none keeps them apart."""
    segmenter: Literal[Engine, "auto"] = "auto"
    """Engine of the instance masks; auto takes nuclei where one channel is segmented, and watershed for a mixture."""
    weights: str = ""
    """For cellpose: nuclei, cyto, cyto2, cyto3 or cpsam, or path of a weights file."""
    segment_channels: str = ""
    """Channels to segment, with commas; empty segments the aggregated image."""
    diameter: float = 0.0
    """Typical diameter in pixels of what is segmented; 0 leaves it to the engine."""
    precision: Precision = "auto"
    """What the segmenting network computes in; auto is bfloat16 for cpsam and float32 for the others."""
    label_column: str = ""
    """Column of the label; empty takes the first of Metadata_pert_iname, Metadata_broad_sample, Metadata_moa. none: the
    sites have no labels, and are there to be predicted."""
    platemap: Path | None = None
    """TSV with well_position and broad_sample, where the CSV does not say what a well got."""
    compounds: Path | None = None
    """TSV with broad_sample, pert_iname, InChIKey … to join to the platemap."""
    project: Project = "none"
    """How a stack of focal planes becomes one; none refuses stacks. middle: of an even number the upper one."""
    resize: int = 0
    """Store images and masks at N x N pixels; 0 keeps their size."""
    workers: int = 0
    """Processes; 0 uses every core, or one where a GPU runs the network."""
    mask_cache: str = ""
    """Folder of finished masks that builds share, kept below 4 GB; empty takes one in the user's cache, none none."""
    overwrite: bool = False
    """Replace a dataset that was built with other settings or of other images."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("diameter", self.diameter, self.diameter >= 0, "0 (the engine estimates it) or more")
        require("resize", self.resize, self.resize >= 0, "0 (keeps the size) or more")
        require("workers", self.workers, self.workers >= 0, "0 (every core) or more")


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
    chosen: Engine = pipeline.suited(stored, segmented) if options.segmenter == "auto" else options.segmenter
    options = replace(options, segmenter=chosen)
    pipeline.check_channels(chosen, stored, segmented)
    if options.aggregate == "none" and len(stored) > 1 and not segmented:
        raise InputError("--aggregate none: there is no one image to segment; name its channel with --segment-channels")
    label_column = choose_label(table.sites, options.label_column, table.source)
    for note in merged_identities(table.sites, label_column):
        console.print(f"note: {note}")
    make_folder(options.out.parent)

    engine = SegmenterConfig(chosen, options.weights, options.diameter, options.precision)
    with Pool(workers.worker_count(options.workers, chosen)) as pool:
        described = pipeline.describe(pool, engine)
        segmenter = {**described, "channels": list(segmented) or ["aggregate"]}
        facts = {**_facts(options, table, stored, label_column, segmenter), "created": created}
        sites = _sites(table, stored, segmented)
        if _already_built(options, facts, sites, pool):
            console.print(f"{options.out}: is already built of these images with these settings ({len(table)} sites)")
            tidy(options.out, "building")
            return
        dtype, shapes = _probe(pool, sites)
        with work_folder(options.out, "building") as work:
            store = masks.MaskStore(make_folder(work / "masks"), _cache(options))
            job = _Job(
                table, sites, workers.Settings(engine, store, options.aggregate, options.resize, described), facts, work
            )
            _segment(pool, job)
            complete = _write(pool, job, dtype, shapes)
            write_preview(open_dataset(complete))
            _publish(complete, options)
            shutil.rmtree(work)
        if store.cache is not None:
            masks.trim(store.cache)
    classes = f"{table.sites[label_column].nunique()} classes of {label_column}" if label_column else "no labels"
    console.print(f"{options.out}: {len(table)} sites, {classes}")
    console.print(f"look at it: {options.out / PREVIEW}")


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
    options: BuildConfig, table: SiteTable, stored: tuple[str, ...], label_column: str, segmenter: dict[str, Any]
) -> dict[str, Any]:
    """Everything but the images that decides the dataset's content, and its digest: the start of its provenance."""
    facts = {
        "schema_version": SCHEMA_VERSION,
        "channels": list(stored),
        "channels_stored": list(stored) if options.aggregate == "none" else ["aggregate"],
        "aggregate": options.aggregate,
        **({} if options.project == "none" else {"project": options.project}),
        "resize": options.resize,
        "label_column": label_column,
        "segmenter": segmenter,
        "source": {"name": Path(table.source).name, "sha256": table.sha256},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {**facts, "settings_sha256": digest, "created_by": f"perturbjax {perturbjax.__version__}"}


def _sites(table: SiteTable, stored: tuple[str, ...], segmented: tuple[str, ...]) -> list[workers.Site]:
    return [
        workers.Site(
            name=row["site_id"],
            where=table.where(row),
            stored=tuple(row[FILE + channel] for channel in stored),
            segmented=tuple(row[FILE + channel] for channel in segmented),
        )
        for row in table.sites.to_dict("records")
    ]


def _already_built(options: BuildConfig, facts: dict[str, Any], sites: list[workers.Site], pool: Pool) -> bool:
    """Whether the output is there, whole, and of these settings and images; refuses to touch anything else there."""
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "dataset_info.json").is_file():
        raise InputError(f"--out {out}: exists and is not a dataset; choose another name or remove it")
    _refuse_foreign(out)
    try:
        other = _difference(out, facts, sites, pool)
    except InputError as error:
        if not options.overwrite:
            raise InputError(f"{error}, with --overwrite") from error
        return False
    if other and not options.overwrite:
        raise InputError(f"--out {out}: holds a dataset of {other}; choose another name or give --overwrite")
    return not other


def _difference(out: Path, facts: dict[str, Any], sites: list[workers.Site], pool: Pool) -> str:
    """How the dataset at `out` is another one than is asked for; empty where it is the same."""
    found = read_json(out / PROVENANCE) if (out / PROVENANCE).is_file() else None
    if not isinstance(found, dict) or found.get("settings_sha256") != facts["settings_sha256"]:
        return "other settings"
    built = open_dataset(out).column(SOURCE_DIGEST)
    digests = _by_chunks(pool, workers.digest_sites, sites, "comparing images")
    changed = [site for site, new, old in zip(sites, digests, built, strict=True) if new != old]
    return f"other images ({len(changed)} of {len(sites)} sites, first {changed[0].where})" if changed else ""


def _refuse_foreign(out: Path) -> None:
    """Refuse to replace a dataset's folder in which somebody keeps something else."""
    for path in sorted(out.iterdir()):
        if path.is_dir() or not any(path.match(pattern) for pattern in DATASET_FILES):
            raise InputError(f"--out {out}: {path.name} in it is no part of a dataset; move it away or choose another")


def _by_chunks(pool: Pool, function: Any, sites: list[workers.Site], label: str) -> Iterable[Any]:
    """The results of a function of many sites, one a site, in their order."""
    chunks = [sites[start : start + CHUNK] for start in range(0, len(sites), CHUNK)]
    results = (result for chunk in pool.in_order(function, chunks) for result in chunk)
    return track(results, total=len(sites), label=label, unit="sites")


def _probe(pool: Pool, sites: list[workers.Site]) -> tuple[np.dtype, list[tuple[int, int]]]:
    """The one stored type and each site's shape, from headers: bad files are told of before hours of segmenting."""
    probes = list(_by_chunks(pool, workers.probe_sites, sites, "checking files"))
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


def _segment(pool: Pool, job: _Job) -> None:
    results = pipeline.segmented(pool, job.sites, job.settings)
    found = list(track(results, total=len(job.sites), label="segmenting", unit="sites"))
    if reused := found.count(None):
        console.print(f"reused: {reused} of {len(found)} sites have masks of the same pixels and settings already")
    if empty := found.count(0):
        console.print(f"note: nothing was found in {empty} of the {len(found) - reused} sites just segmented")


def _write(pool: Pool, job: _Job, dtype: np.dtype, shapes: list[tuple[int, int]]) -> Path:
    """The complete dataset directory, still in the working folder."""
    folder = job.work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    table, resize = job.table, job.settings.resize
    prepared = pool.in_order(workers.prepare_site, ((site, job.settings, dtype) for site in job.sites))
    pixels = len(table) * resize**2 if resize else sum(height * width for height, width in shapes)
    return write_dataset(
        folder,
        table.sites[["site_id", *table.metadata_columns]],
        track(prepared, total=len(table), label="writing", unit="sites"),
        channel_names=job.facts["channels_stored"],
        image_dtype=dtype,
        label_column=job.facts["label_column"],
        pixel_bytes=pixels * (len(job.facts["channels_stored"]) * dtype.itemsize + 2),
        facts=job.facts,
    )


def _publish(complete: Path, options: BuildConfig) -> None:
    """Give the finished directory its name; an old dataset steps aside only now."""
    out = options.out
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists() and any(out.iterdir()):
            _refuse_foreign(out)  # what was put there meanwhile
            os.rename(out, old)
        os.rename(complete, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another output") from error
    shutil.rmtree(old, ignore_errors=True)
