"""`perturbjax build`: from a site table and images to a dataset directory.

A build has three steps: plan (read the table, check options), process sites (check headers,
estimate illumination, segment) and write. All work happens in `.OUT.building` next to the output.
That folder stores one mask per finished site, under the checksum of its pixels, so that a killed
build resumes where it ended. The complete dataset is moved to the output path by one rename.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from data_prep import append_sites, existing_dataset, illumination, quality, site_tasks
from data_prep import mask_cache as masks
from data_prep.build_steps import (
    Plan,
    check_files,
    check_sites,
    describe_plan,
    process_sites,
    write_sites,
)
from data_prep.channel_images import Aggregate
from data_prep.cluster import ClusterConfig, open_pool
from data_prep.layout_warnings import design_warnings
from data_prep.output import creation_time, remove_work_folder, work_folder, work_path
from data_prep.process_pool import TaskPool
from data_prep.segment import (
    Diameter,
    Engine,
    EngineChoice,
    Precision,
    SegmenterConfig,
    parse_diameter,
    pipeline,
)
from data_prep.segment.propagation import describe_propagation
from data_prep.site import Site, set_functions
from data_prep.site_table import FILE, SiteTable, choose_label, merged_identities, read_sites
from data_prep.sources import Project
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest, make_folder
from perturbjax.core.messages import console, counted
from perturbjax.core.options import names_in, python_only, require, require_output, require_sound
from perturbjax.core.plates import PLATE
from perturbjax.dataset import SCHEMA_VERSION, open_dataset
from perturbjax.report.pages.preview import PREVIEW, write_preview

#: Suffix of the working folder.
ACTIVITY = "building"


@dataclass(frozen=True)
class BuildConfig:
    """Build a dataset from images and load_data.csv: cell masks, images and metadata."""

    images: str | Path
    """Folder of the paths in the CSV, Zarr store (NAME.zarr), folder of stores, or URL (s3://, https://)."""
    out: Path
    """Dataset directory to write."""
    load_data: Path | None = None
    """CSV with one row per site: FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL>, Metadata_*."""
    channels: str = ""
    """Channels to use, separated by commas; by default all."""
    aggregate: Aggregate = "median"
    """Combination of the channels into one image; none keeps separate channels."""
    segmenter: EngineChoice = "auto"
    """Segmentation engine; auto: nuclei for one channel, watershed for several."""
    weights: str = ""
    """Weights for cellpose: nuclei, cyto, cyto2, cyto3, cpsam or a file."""
    segment_channels: str = ""
    """Channels to segment; by default the aggregated image."""
    cells_channel: str = ""
    """Channel that shows whole cells: nuclei are extended to cells in it, and both are stored."""
    diameter: Diameter = "auto"
    """Object diameter: pixels, per-plate, per-site, or auto (the engine's default)."""
    precision: Precision = python_only("auto")
    """Number format of the segmentation network; auto: bfloat16 for cpsam, float32 for others."""
    label_column: str = ""
    """Label column, or none; by default Metadata_pert_iname, Metadata_broad_sample or
    Metadata_moa."""
    platemap: Path | None = None
    """Plate map with the treatments (CSV, TSV, XLSX), if the CSV has none."""
    compounds: Path | None = None
    """TSV of compounds (broad_sample, pert_iname, …), joined to the plate map."""
    project: Project = "none"
    """Projection of focal planes; none refuses stacks. middle: the upper one of an even number."""
    illumination: str = ""
    """Illumination correction: estimate, or a folder of PLATE_IllumCHANNEL.npy."""
    resize: int = 0
    """Height and width of stored images in pixels; 0 keeps the size."""
    workers: int = 0
    """Processes; 0: one per core, one with a GPU."""
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
        parse_diameter(self.diameter)
        require("resize", self.resize, self.resize >= 0, "0 (keeps the size) or more")
        require("workers", self.workers, self.workers >= 0, "0 (every core) or more")
        is_clear = not (self.append and self.overwrite)
        require("append", "--overwrite", is_clear, "used without --overwrite")


def build(options: BuildConfig) -> None:
    """Build a dataset directory, or resume an interrupted build.

    Raises:
        InputError: Input, settings or output cannot be used. No output is created then.
    """
    plan = make_plan(options)
    workers = site_tasks.worker_count(options.workers, plan.settings.segmenter.engine)
    with open_pool(workers, options.where) as pool:
        plan = check_files(describe_plan(plan, pool), pool)
        # A repeated build of the same images and settings ends here, before the segmentation.
        if is_built(plan, options, pool):
            console.print(
                f"info: {options.out} is already built from these images with these settings "
                f"({len(plan.table)} sites)"
            )
            remove_work_folder(options.out, ACTIVITY)
            return
        plan = check_sites(plan)
        with work_folder(options.out.absolute(), ACTIVITY) as work:
            plan = process_sites(plan, pool, work)
            complete = write_sites(plan, pool, work)
            write_preview(open_dataset(complete))
            existing_dataset.publish(complete, options.out)
            shutil.rmtree(work)
        if plan.settings.masks.cache is not None:
            # Only after the build, so that none of its masks is removed while it runs.
            masks.trim(plan.settings.masks.cache)
    label = plan.facts["label_column"]
    classes = "no labels"
    if label:
        classes = f"{counted(plan.table.sites[label].nunique(), 'class', 'classes')} of {label}"
    console.print(f"{options.out}: {counted(len(plan.table), 'site')}, {classes}")
    console.print(f"Next step: check the masks in {options.out / PREVIEW}")


def make_plan(options: BuildConfig) -> Plan:
    """Read the site table, choose segmenter and label, and check the options. Reads no images.

    Raises:
        InputError: The table or the options cannot be used.
    """
    created = creation_time()
    segmented, cells = names_in(options.segment_channels), names_in(options.cells_channel)
    table = read_sites(
        options.load_data,
        options.images,
        channels=names_in(options.channels),
        also=(*segmented, *cells),
        platemap=options.platemap,
        compounds=options.compounds,
        project=options.project,
    )
    stored = names_in(options.channels) or table.channels
    # A suitable segmenter depends on the number of channels.
    engine: Engine = (
        pipeline.suited(stored, segmented) if options.segmenter == "auto" else options.segmenter
    )
    pipeline.check_channels(engine, stored, segmented)
    pipeline.check_cells_channel(cells, stored, segmented)
    if options.aggregate == "none" and len(stored) > 1 and not segmented:
        raise InputError(
            "--aggregate none: there is no single image to segment; pass the channel to segment "
            f"with --segment-channels (available: {', '.join(stored)})"
        )
    label_column = choose_label(table.sites, options.label_column, table.source)
    functions = {}
    if options.illumination not in ("", illumination.ESTIMATE):
        plates = table.sites[PLATE].unique()
        folder = Path(options.illumination)
        functions = illumination.find_functions(folder, plates, (*stored, *segmented, *cells))
    # Problems of the layout are reported before hours of segmentation.
    for note in merged_identities(table.sites, label_column):
        console.print(f"info: {note}")
    for warning in design_warnings(table.sites, label_column) if label_column else []:
        console.print(f"warning: {warning}")
    make_folder(options.out.parent)
    # A build that was killed during its last rename can have left the old dataset as a backup.
    existing_dataset.restore(options.out)
    cache = Path(options.mask_cache) if options.mask_cache else masks.default_cache()
    # Masks of this build remain in the working folder, so that a killed build resumes.
    mask_folder = work_path(options.out.absolute(), ACTIVITY) / "masks"
    # The checksums become part of the settings, so changed functions cause another build.
    checksums = {key: file_digest(path) for key, path in functions.items()}
    propagation = describe_propagation(cells[0]) if cells else {}
    return Plan(
        table=table,
        sites=set_functions(_list_sites(table, stored, segmented, cells), functions),
        settings=site_tasks.Settings(
            SegmenterConfig(engine, options.weights, options.diameter, options.precision),
            masks.MaskStore(mask_folder, None if options.mask_cache == "none" else cache),
            options.aggregate,
            options.resize,
            cells=propagation,
        ),
        facts={
            "schema_version": SCHEMA_VERSION,
            "channels": list(stored),
            "channels_stored": list(stored) if options.aggregate == "none" else ["aggregate"],
            "aggregate": options.aggregate,
            **({} if options.project == "none" else {"project": options.project}),
            "resize": options.resize,
            "quality": quality.VERSION,
            "label_column": label_column,
            "segmenter": {
                "channels": list(segmented) or ["aggregate"],
                **({"cells": propagation} if cells else {}),
            },
            **illumination.illumination_facts(options.illumination, checksums),
            "source": {"name": Path(table.source).name, "sha256": table.sha256},
        },
        created=created,
        illumination=options.illumination,
        target=append_sites.open_target(options.out) if options.append else None,
    )


def _list_sites(
    table: SiteTable,
    stored: tuple[str, ...],
    segmented: tuple[str, ...],
    cells: tuple[str, ...],
) -> list[Site]:
    return [
        Site(
            name=row["site_id"],
            where=table.where(row),
            stored=tuple(row[FILE + channel] for channel in stored),
            segmented=tuple(row[FILE + channel] for channel in segmented),
            cells=tuple(row[FILE + channel] for channel in cells),
            channels=(*stored, *segmented, *cells),
            plate=row[PLATE],
        )
        for row in table.sites.to_dict("records")
    ]


def is_built(plan: Plan, options: BuildConfig, pool: TaskPool) -> bool:
    """Return whether the output already contains these sites with these settings.

    Raises:
        InputError: The output contains something else and may not be replaced.
    """
    if plan.target is not None:
        return append_sites.is_appended(plan.target, plan.facts, plan.sites, pool)
    return existing_dataset.is_built(options.out, options.overwrite, plan.facts, plan.sites, pool)
