"""Tasks of a build for one site or one shard; they run in worker processes."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt, UInt16

from data_prep import segment
from data_prep.channel_images import (
    Aggregate,
    aggregate_channels,
    resize_image,
    resize_mask,
    stack_planes,
)
from data_prep.illumination import correct
from data_prep.mask_cache import MaskStore, mask_key
from data_prep.quality import site_quality
from data_prep.segment.propagation import propagate
from data_prep.site import Site
from data_prep.sources import Plane, pixel_digest, probe_planes, read_planes
from data_prep.sources.pixel_size import common_size
from perturbjax.core.errors import InputError
from perturbjax.dataset import SitePixels, site_statistics
from perturbjax.dataset.writer import Shard, WrittenShard
from perturbjax.dataset.writer import write_shard as write


@dataclass(frozen=True)
class Settings:
    """Processing settings, the same for all sites of a build."""

    segmenter: segment.SegmenterConfig
    masks: MaskStore
    aggregate: Aggregate = "median"
    resize: int = 0
    """Height and width of the stored image in pixels; 0 keeps the size."""
    cells: dict[str, Any] = field(default_factory=dict)
    """Provenance of the cells that are extended from nuclei; empty if the masks are final."""
    described: dict[str, Any] = field(default_factory=dict)
    """Provenance of the segmenter, part of the key of every mask. Workers that only read or write
    sites receive it here, so they need not load the network."""


def worker_count(workers: int, engine: str) -> int:
    """Return the number of worker processes.

    Args:
        workers: Value of `--workers`; 0 selects one process per core, or one if cellpose-torch
            runs on a GPU.
        engine: Name of the segmenter.
    """
    if workers:
        return workers
    # Several processes would load the network several times into the memory of one GPU.
    if engine == "cellpose-torch" and Path("/dev/nvidia0").exists():
        return 1
    # Cores that this process may use, which can be fewer than the machine has (Slurm, containers).
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _segmenter(config: segment.SegmenterConfig) -> segment.Segmenter:
    return segment.create(config)


@functools.cache
def describe_segmenter(config: segment.SegmenterConfig) -> dict[str, Any]:
    """Return the provenance of a segmenter.

    Raises:
        InputError: The segmenter cannot run with this configuration.
    """
    return _segmenter(config).describe()


class SiteHeader(NamedTuple):
    """Properties of the images of a site from their headers."""

    dtype: str
    """Name of the data type in the files: uint16 if one stored channel is uint16, or float."""
    shape: tuple[int, int]
    """(height, width)."""
    floats: tuple[str, ...]
    """Channels with float pixels."""
    pixel_size: float
    """Micrometers; 0 if the files do not state it, or channels differ."""


def probe_sites(sites: list[Site]) -> list[SiteHeader]:
    """Read the file headers of sites.

    Raises:
        InputError: A file is missing, unreadable or truncated, or the channels of a site differ in
            size.
    """
    probes = []
    for site in sites:
        headers = probe_planes(site.planes, site.where)
        first, shape = site.planes[0], headers[site.planes[0]].shape
        # All channels of a site must have one size, since they are stacked.
        for plane, header in headers.items():
            if header.shape != shape:
                raise InputError(
                    f"{site.where}: {plane} has shape {header.shape}, but {first} of the same site "
                    f"has shape {shape}"
                )
        dtype = np.result_type(*(headers[plane].dtype for plane in site.stored))
        floats = [name for name in site.channels if headers[site.plane_of(name)].dtype.kind == "f"]
        # Channels without a pixel size have that of the others.
        pixel_size = common_size(h.pixel_size for h in headers.values() if h.pixel_size)
        probes.append(SiteHeader(dtype.name, shape, tuple(dict.fromkeys(floats)), pixel_size))
    return probes


def digest_sites(sites: list[Site]) -> list[str]:
    """Return the SHA-256 of the pixels of each site, as the dataset index stores it."""
    return [pixel_digest(read_planes(site.planes, site.where).values()) for site in sites]


class SegmentedSite(NamedTuple):
    """Result of segmenting one site."""

    where: str
    """Table and row of the site, for messages."""
    objects: int | None
    """Number of objects; None if the mask existed already."""
    failure: str = ""
    """Reason if the site could not be segmented."""


def segment_site(task: tuple[Site, Settings]) -> SegmentedSite:
    """Segment a site and store its mask."""
    site, settings = task
    key, image = read_site(task)
    if image is None:
        return SegmentedSite(site.where, None)
    try:
        # The segmenter is created once in each process and reused.
        mask = _segmenter(settings.segmenter).segment(image, site.diameter)
    except Exception as error:  # scikit-image, torch and XLA raise many kinds
        return store_mask(site, key, segment.Failure(f"{error}".split("\n")[0]), settings)
    return store_mask(site, key, mask, settings)


def store_mask(
    site: Site, key: str, mask: UInt16[np.ndarray, "h w"] | segment.Failure, settings: Settings
) -> SegmentedSite:
    """Store the mask of a site, or that its segmentation failed."""
    if isinstance(mask, segment.Failure):
        settings.masks.put_failure(key, mask.reason)
        return SegmentedSite(site.where, 0, mask.reason)
    settings.masks.put(key, mask)
    return SegmentedSite(site.where, int(mask.max(initial=0)))


def read_site(task: tuple[Site, Settings]) -> tuple[str, UInt[np.ndarray, "h w c"] | None]:
    """Return the mask key of a site and the image to segment; None if the mask exists already."""
    site, settings = task
    image = read_segmented_image(task)
    key = mask_key(image, settings.described, site.diameter)
    return key, None if settings.masks.find(key) else image


def read_segmented_image(task: tuple[Site, Settings]) -> UInt[np.ndarray, "h w c"]:
    """Read the image of a site that is segmented."""
    site, settings = task
    planes = correct(read_planes(site.segmented or site.stored, site.where), site)
    return _segmented_image(site, settings, planes)


def prepare_site(task: tuple[Site, Settings, np.dtype]) -> SitePixels:
    """Return the stored image of a site with its masks, statistics and quality metrics.

    Raises:
        InputError: A file cannot be read, or changed since its segmentation.
    """
    site, settings, dtype = task
    raw = read_planes(site.planes, site.where)
    planes = correct(raw, site)
    image = aggregate_channels(stack_planes(planes, site.stored, site.where), settings.aggregate)
    segmented = _segmented_image(site, settings, planes) if site.segmented else image
    # The key is computed from the pixels, so a mask of other pixels can never be used.
    key = mask_key(segmented, settings.described, site.diameter)
    failed = settings.masks.failed(key)
    # A site without segmentation remains in the dataset, with an empty mask.
    mask = np.zeros(image.shape[:2], np.uint16) if failed else settings.masks.get(key)
    if mask is None or mask.shape != image.shape[:2]:
        raise InputError(
            f"{site.where}: the images changed during the build; run the same command again"
        )
    # Quality is measured on the raw planes, before illumination correction.
    quality = site_quality(
        {name: raw[site.plane_of(name)] for name in site.channels}, mask, segmented[..., 0], failed
    )
    nuclei = None
    if site.cells:
        nuclei, mask = mask, _extend_nuclei(site, settings, mask, planes[site.cells[0]], key)
    if settings.resize:
        # Quality is measured and cells are segmented at full size, before this step.
        image, mask = resize_image(image, settings.resize), resize_mask(mask, settings.resize)
        nuclei = None if nuclei is None else resize_mask(nuclei, settings.resize)
    pixels = np.ascontiguousarray(image.astype(dtype))
    digest = pixel_digest(raw.values())
    return SitePixels(pixels, mask, site_statistics(image), digest, quality, nuclei)


def _extend_nuclei(
    site: Site,
    settings: Settings,
    nuclei: UInt16[np.ndarray, "h w"],
    stain: UInt[np.ndarray, "h w"],
    nuclei_key: str,
) -> UInt16[np.ndarray, "h w"]:
    """Return the whole cells of a site, from the stored masks if they were computed before."""
    if not nuclei.any():
        return nuclei.copy()
    # The key of the nuclei stands for everything that they depend on.
    settings_of_cells = {**settings.cells, "nuclei": nuclei_key}
    key = mask_key(stain[..., None], settings_of_cells, site.diameter)
    cells = settings.masks.get(key) if settings.masks.find(key) else None
    if cells is None or cells.shape != nuclei.shape:
        cells = propagate(nuclei, stain, site.diameter or settings.segmenter.pixels)
        settings.masks.put(key, cells)
    return cells


def write_shard(task: tuple[Shard, list[Site], Settings, np.dtype]) -> WrittenShard:
    """Prepare the sites of one shard and write the shard.

    Raises:
        InputError: As in `prepare_site`, or the shard cannot be written.
    """
    shard, sites, settings, dtype = task
    return write(shard, (prepare_site((site, settings, dtype)) for site in sites))


def _segmented_image(
    site: Site, settings: Settings, planes: dict[Plane, UInt[np.ndarray, "_ _"]]
) -> UInt[np.ndarray, "h w c"]:
    """Return the image that the segmenter receives."""
    if site.segmented:
        return stack_planes(planes, site.segmented, site.where)
    return aggregate_channels(stack_planes(planes, site.stored, site.where), settings.aggregate)
