"""The plan of a build and its steps: describe, check files, process sites, write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import perturbjax
from data_prep import append_sites, illumination, site_tasks
from data_prep.float_images import scale_floats
from data_prep.layout_warnings import bit_depth_warnings
from data_prep.pixel_sizes import plate_pixel_sizes
from data_prep.process_pool import TaskPool, map_in_chunks
from data_prep.segment import pipeline
from data_prep.site import Site, set_functions
from data_prep.site_table import SiteTable
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder
from perturbjax.core.messages import console
from perturbjax.core.progress import track
from perturbjax.dataset import PIXEL_SIZES, Dataset, DatasetPlan
from perturbjax.dataset.append import append_dataset, read_class_names
from perturbjax.dataset.writer import Shard, WrittenShard, write_plan

#: Maximum size of a site in multiples of the median site. Larger sizes come from damaged headers.
MAX_SIZE_RATIO = 64


@dataclass(frozen=True)
class Plan:
    """Everything that determines the content of a dataset."""

    table: SiteTable
    sites: list[Site]
    """Sites in the order of the table."""
    settings: site_tasks.Settings
    facts: dict[str, Any]
    """Start of the provenance."""
    created: str
    """UTC time of the build."""
    illumination: str
    """Value of `--illumination`."""
    target: Dataset | None
    """Existing dataset to which the sites are appended."""
    dtypes: tuple[str, ...] = ()
    """Data type of the images of each site, from the file headers."""
    shapes: tuple[tuple[int, int], ...] = ()
    """(height, width) of each site, from the file headers."""

    @property
    def dtype(self) -> np.dtype:
        """Stored data type: uint8 if all images have it, otherwise uint16."""
        return np.dtype(np.uint8 if set(self.dtypes) == {"uint8"} else np.uint16)


def describe_plan(plan: Plan, pool: TaskPool) -> Plan:
    """Add the segmenter to the provenance.

    Raises:
        InputError: The segmenter cannot run with these settings.
    """
    described = pipeline.describe(pool, plan.settings.segmenter)
    facts = {**plan.facts, "segmenter": {**described, **plan.facts["segmenter"]}}
    return replace(plan, facts=facts, settings=replace(plan.settings, described=described))


def check_files(plan: Plan, pool: TaskPool) -> Plan:
    """Read all file headers, so that unusable files are reported before hours of segmentation.

    Float images are read as a whole, to choose their mapping to uint16. The checksum of all
    settings, which include these mappings, is added to the provenance.

    Raises:
        InputError: A file cannot be used.
    """
    headers = list(map_in_chunks(pool, site_tasks.probe_sites, plan.sites, "Checking files"))
    dtypes, shapes, floats, pixel_sizes = zip(*headers, strict=True)
    # Median number of pixels of a site.
    median = float(np.median([height * width for height, width in shapes]))
    for site, (height, width) in zip(plan.sites, shapes, strict=True):
        if height * width > MAX_SIZE_RATIO * median:
            raise InputError(
                f"{site.where}: the images have {height} x {width} pixels according to their "
                f"headers, {height * width / median:.0f} times the median site; remove the row or "
                "repair the files"
            )
    sites, scales = scale_floats(plan.sites, floats, pool)
    facts = plan.facts | scales
    sizes = plate_pixel_sizes(plan.table, shapes, pixel_sizes, plan.settings.resize)
    # Datasets without pixel sizes keep the checksum of their settings.
    facts |= {PIXEL_SIZES: sizes} if sizes else {}
    facts |= {
        # The checksum covers the facts above, without version and time of this build.
        "settings_sha256": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "created_by": f"perturbjax {perturbjax.__version__}",
        "created": plan.created,
    }
    return replace(plan, sites=sites, facts=facts, dtypes=dtypes, shapes=shapes)


def check_sites(plan: Plan) -> Plan:
    """Check that the sites can be processed and stored together.

    Raises:
        InputError: An illumination function cannot be used, or the sites do not match the dataset
            to which they are appended.
    """
    if plan.target is not None:
        table = append_sites.match_columns(plan.target, plan.facts, plan.table)
        plan = replace(plan, table=table)
    if (sizes := len(set(plan.shapes))) > 1:
        console.print(
            f"warning: sites have {sizes} different sizes, but training requires one size; pass "
            "--resize N to store N x N pixels"
        )
    for warning in bit_depth_warnings((site.plate for site in plan.sites), plan.dtypes, "sites"):
        console.print(f"warning: {warning}")
    if plan.illumination != illumination.ESTIMATE:
        illumination.check_functions(plan.sites, plan.shapes)
    return plan


def process_sites(plan: Plan, pool: TaskPool, work: Path) -> Plan:
    """Estimate illumination functions and diameters if required, and segment all sites.

    Returns:
        The plan with illumination functions and diameters.

    Raises:
        InputError: A site cannot be read, or no site can be segmented.
    """
    make_folder(plan.settings.masks.folder)
    if plan.illumination == illumination.ESTIMATE:
        estimates = illumination.estimate_functions(
            pool, plan.sites, plan.shapes, work / "illumination"
        )
        checksums = {key: checksum for key, (_, checksum) in estimates.items()}
        plan = replace(
            plan,
            sites=set_functions(plan.sites, {key: path for key, (path, _) in estimates.items()}),
            facts=plan.facts | illumination.illumination_facts(illumination.ESTIMATE, checksums),
        )
    # Diameters are estimated first, because they are part of the key of each mask.
    sites, diameters = pipeline.estimate_diameters(pool, plan.sites, plan.settings)
    plan = replace(plan, sites=sites, facts={**plan.facts, "diameters": diameters})
    pipeline.segment_sites(pool, plan.sites, plan.settings)
    return plan


def write_sites(plan: Plan, pool: TaskPool, work: Path) -> Path:
    """Write the dataset into the working folder, appended to the target if there is one.

    Returns:
        Folder of the complete dataset.

    Raises:
        InputError: A site changed since its segmentation, or a file cannot be written.
    """
    folder, table, target = work / "dataset", plan.table, plan.target
    channels = plan.facts["channels_stored"]
    shutil.rmtree(folder, ignore_errors=True)
    dtype = plan.dtype if target is None else append_sites.require_storable(target, plan.dtype)
    size, has_nuclei = plan.settings.resize, bool(plan.settings.cells)
    # Pixels of all stored sites, from the headers or from --resize.
    n_pixels = len(table) * size**2 if size else sum(h * w for h, w in plan.shapes)
    tasks = ((site, plan.settings, dtype) for site in plan.sites)
    # A generator: workers start only when the records are written.
    prepared = pool.in_order(site_tasks.prepare_site, tasks)

    def write_on_workers(shards: list[Shard]) -> Iterator[WrittenShard]:
        """Write whole shards on the machines of a cluster, so that pixels do not travel."""
        tasks = (
            (shard, plan.sites[shard.start : shard.stop], plan.settings, dtype) for shard in shards
        )
        written = pool.in_order(site_tasks.write_shard, tasks)
        yield from track(written, total=len(shards), label="Writing", unit="shards")

    dataset = DatasetPlan(
        table.sites[["site_id", *table.metadata_columns]],
        channel_names=tuple(channels),
        image_dtype=dtype,
        label_column=plan.facts["label_column"],
        # Each pixel has one value per channel and a 16-bit mask, with nuclei two masks.
        pixel_bytes=n_pixels * (len(channels) * dtype.itemsize + (4 if has_nuclei else 2)),
        facts=plan.facts,
        leading_classes=() if target is None else read_class_names(target.path),
        has_nuclei=has_nuclei,
    )
    written = write_plan(
        folder,
        dataset,
        track(prepared, total=len(table), label="Writing", unit="sites"),
        write_remotely=write_on_workers if pool.remote else None,
    )
    if target is None:
        return written
    return append_dataset(target.path, written, work / "together")
