"""From a site table to a dataset directory: check, segment, write; resumable site by site.

All work happens in `.OUT.building` beside the output: `settings.json`, and one mask a finished site. The output
appears complete, by one rename, or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import perturbjax
from data_prep import workers
from data_prep.images import Aggregate
from data_prep.segment import Engine, SegmenterConfig
from data_prep.sites import FILE, SiteTable, channels_of, choose_label, merged_identities, read_sites
from perturbjax.console import InputError, console, track
from perturbjax.dataset import PROVENANCE, SCHEMA_VERSION, write_dataset
from perturbjax.files import make_folder, read_json, write_json

#: Sites whose headers are read in one task.
PROBE_CHUNK = 32
SETTINGS = "settings.json"


@dataclass(frozen=True)
class BuildOptions:
    """TIFFs and load_data.csv to a dataset directory."""

    load_data: Path
    """CSV with FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL> and Metadata_* columns, one row a site."""
    images: Path
    """Folder the paths in the CSV start from."""
    out: Path
    """Dataset directory to make."""
    channels: str = ""
    """Names of the channels to use, with commas; empty takes all."""
    aggregate: Aggregate = "median"
    """How channels become one image; none keeps them apart."""
    segmenter: Engine = "watershed"
    """Engine of the instance masks."""
    weights: str = ""
    """For cellpose: name of a built-in model, or path of a weights file."""
    segment_channels: str = ""
    """Channels to segment, with commas; empty segments the aggregated image."""
    diameter: float = 0.0
    """Typical diameter in pixels of what is segmented; 0 leaves it to the engine."""
    label_column: str = ""
    """Column of the label; empty takes the first of Metadata_pert_iname, Metadata_broad_sample, Metadata_moa."""
    platemap: Path | None = None
    """TSV with well_position and broad_sample, where the CSV does not say what a well got."""
    compounds: Path | None = None
    """TSV with broad_sample, pert_iname, InChIKey … to join to the platemap."""
    resize: int = 0
    """Store images and masks at N x N pixels; 0 keeps their size."""
    workers: int = 0
    """Processes; 0 uses every core, or one where a GPU runs the network."""
    overwrite: bool = False
    """Replace a dataset that was built with other settings."""


def build(options: BuildOptions) -> None:
    """Make the dataset directory, or go on making it.

    Raises:
        InputError: input, settings or output cannot be used; nothing is left under the output's name.
    """
    if options.resize < 0:
        raise InputError(f"--resize {options.resize}: must not be negative; 0 keeps the size")
    stored = _names(options.channels) or tuple(channels_of(options.load_data))
    segmented = _names(options.segment_channels)
    if options.aggregate == "none" and len(stored) > 1 and not segmented:
        raise InputError("--aggregate none: there is no one image to segment; name its channel with --segment-channels")
    table = read_sites(
        options.load_data,
        options.images,
        channels=tuple(dict.fromkeys(stored + segmented)),
        platemap=options.platemap,
        compounds=options.compounds,
    )
    label_column = choose_label(table.sites, options.label_column, options.load_data)
    for note in merged_identities(table.sites, label_column):
        console.print(f"note: {note}")
    make_folder(options.out.parent)

    settings = workers.Settings(
        SegmenterConfig(options.segmenter, options.weights, options.diameter), options.aggregate, options.resize
    )
    with workers.Pool(workers.worker_count(options.workers, options.segmenter)) as pool:
        segmenter = pool.call(workers.describe_segmenter, settings.segmenter)
        segmenter["channels"] = list(segmented) or ["aggregate"]
        facts = _facts(options, table, stored, label_column, segmenter)
        work = options.out.with_name(f".{options.out.name}.building")
        if _already_built(options, facts["fingerprint"]):
            console.print(f"{options.out}: is already built with these settings ({len(table)} sites)")
            if _made_with(work, facts):  # killed between the last rename and the tidying
                shutil.rmtree(work)
            return
        job = _Job(table, _sites(table, stored, segmented, work / "masks"), settings, facts, work)
        dtype, shapes = _probe(pool, job.sites)
        with _working_folder(work, facts):
            _segment(pool, job)
            _publish(_write(pool, job, dtype, shapes), options)
            shutil.rmtree(work)
    console.print(f"{options.out}: {len(table)} sites, {table.sites[label_column].nunique()} classes of {label_column}")


@dataclass(frozen=True)
class _Job:
    """What is built, of what, and where."""

    table: SiteTable
    sites: list[workers.Site]
    settings: workers.Settings
    facts: dict[str, Any]
    work: Path


def _facts(
    options: BuildOptions, table: SiteTable, stored: tuple[str, ...], label_column: str, segmenter: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides the dataset's content, and its fingerprint: the start of its provenance."""
    facts = {
        "schema_version": SCHEMA_VERSION,
        "channels": list(stored),
        "channels_stored": list(stored) if options.aggregate == "none" else ["aggregate"],
        "aggregate": options.aggregate,
        "resize": options.resize,
        "label_column": label_column,
        "segmenter": segmenter,
        "source": {"name": options.load_data.name, "sha256": table.sha256},
    }
    return {**facts, "fingerprint": fingerprint(facts)}


def fingerprint(facts: dict[str, Any]) -> str:
    """SHA-256 of everything that decides the dataset's content."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sites(table: SiteTable, stored: tuple[str, ...], segmented: tuple[str, ...], masks: Path) -> list[workers.Site]:
    return [
        workers.Site(
            name=row["site_id"],
            where=f"{table.source}, row {row['row']}",
            stored=tuple(row[FILE + channel] for channel in stored),
            segmented=tuple(row[FILE + channel] for channel in segmented),
            mask=masks / f"{position:07d}.tiff",
        )
        for position, row in enumerate(table.sites.to_dict("records"))
    ]


def _already_built(options: BuildOptions, wanted: str) -> bool:
    """Whether the output is there, complete and of these settings; refuses to touch anything else there."""
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "dataset_info.json").is_file():
        raise InputError(f"--out {out}: exists and is not a dataset; choose another name or remove it")
    if (out / PROVENANCE).is_file() and read_json(out / PROVENANCE).get("fingerprint") == wanted:
        return True
    if not options.overwrite:
        raise InputError(f"--out {out}: holds a dataset of other settings; choose another name or give --overwrite")
    return False


@contextmanager
def _working_folder(work: Path, facts: dict[str, Any]) -> Iterator[None]:
    """The folder that survives a kill, emptied if it was made with other settings, for one process at a time.

    Raises:
        InputError: it cannot be made, or another build works there.
    """
    make_folder(work / "masks")
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{work}: another build is at work there; wait for it or choose another --out") from error
        if (work / SETTINGS).is_file() and not _made_with(work, facts):
            console.print(f"the settings have changed since the interrupted build in {work}: starting over")
            shutil.rmtree(work / "masks")
            make_folder(work / "masks")
        write_json(work / SETTINGS, facts)
        yield


def _made_with(work: Path, facts: dict[str, Any]) -> bool:
    return (work / SETTINGS).is_file() and read_json(work / SETTINGS) == facts


def _probe(pool: workers.Pool, sites: list[workers.Site]) -> tuple[np.dtype, list[tuple[int, int]]]:
    """The one stored type and each site's shape, from headers: bad files are told of before hours of segmenting."""
    chunks = [sites[start : start + PROBE_CHUNK] for start in range(0, len(sites), PROBE_CHUNK)]
    probes: list[tuple[str, tuple[int, int]]] = []
    results = (probe for chunk in pool.in_order(workers.probe_sites, chunks) for probe in chunk)
    for probe in track(results, total=len(sites), label="checking files", unit="sites"):
        probes.append(probe)
    shapes = [shape for _, shape in probes]
    if len(set(shapes)) > 1:
        console.print(
            f"note: sites have {len(set(shapes))} different sizes; --resize N makes them one, as training needs"
        )
    return np.result_type(*{dtype for dtype, _ in probes}), shapes


def _segment(pool: workers.Pool, job: _Job) -> None:
    missing = [site for site in job.sites if not site.mask.is_file()]
    reused = len(job.sites) - len(missing)
    if reused:
        console.print(f"resuming: {reused} of {len(job.sites)} sites are already segmented and are reused")
    results = pool.as_completed(workers.segment_site, ((site, job.settings) for site in missing))
    shown = track(results, total=len(job.sites), label="segmenting", unit="sites", done=reused)
    empty = sum(cells == 0 for cells in shown)
    if empty:
        console.print(f"note: nothing was found in {empty} of the {len(missing)} sites just segmented")


def _write(pool: workers.Pool, job: _Job, dtype: np.dtype, shapes: list[tuple[int, int]]) -> Path:
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
        facts={**job.facts, "created": _now(), "created_by": f"perturbjax {perturbjax.__version__}"},
    )


def _publish(complete: Path, options: BuildOptions) -> None:
    """Give the finished directory its name; an old dataset steps aside only now."""
    out = options.out
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists() and any(out.iterdir()):
            os.rename(out, old)
        os.rename(complete, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another output") from error
    shutil.rmtree(old, ignore_errors=True)


def _now() -> str:
    """UTC to the second; SOURCE_DATE_EPOCH, where set, makes two builds the same byte for byte."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.isoformat(timespec="seconds")
