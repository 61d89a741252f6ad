"""The work on one site, as it runs in a worker process."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

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
from data_prep.sources import Plane, pixel_digest, probe_planes, read_planes
from perturbjax.core.errors import InputError
from perturbjax.dataset import SitePixels, site_statistics
from perturbjax.dataset.writer import Shard, Written
from perturbjax.dataset.writer import write_shard as write


@dataclass(frozen=True)
class Site:
    """What a worker needs to know of a site."""

    name: str
    """`site_id`."""
    where: str
    """CSV and row, for messages."""
    stored: tuple[Plane, ...]
    """The channels that make the stored image."""
    segmented: tuple[Plane, ...]
    """The channels that are segmented; empty segments the stored image."""
    channels: tuple[str, ...] = ()
    """Names of `stored`, then of `segmented`."""
    functions: tuple[Path, ...] = ()
    """What each of `stored`, then of `segmented`, is divided by for even light; empty leaves them as they are."""

    @property
    def planes(self) -> tuple[Plane, ...]:
        return tuple(dict.fromkeys((*self.stored, *self.segmented)))


@dataclass(frozen=True)
class Settings:
    """How every site is treated."""

    segmenter: segment.SegmenterConfig
    masks: MaskStore
    aggregate: Aggregate = "median"
    resize: int = 0
    """Side of the stored image in pixels; 0 keeps the size."""
    described: dict[str, Any] = field(default_factory=dict)
    """The engine's provenance, which is part of every mask's key: workers need no network to know it."""


def worker_count(asked: int, engine: segment.Engine) -> int:
    """`asked`, or where it is 0 one for each core, and one where a GPU runs the network."""
    if asked:
        return asked
    if engine == "cellpose-torch" and Path("/dev/nvidia0").exists():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _segmenter(config: segment.SegmenterConfig) -> segment.Segmenter:
    return segment.create(config)


@functools.cache
def describe_segmenter(config: segment.SegmenterConfig) -> dict[str, Any]:
    """Provenance of the engine; raises where it cannot run as configured."""
    return _segmenter(config).describe()


def probe_sites(sites: list[Site]) -> list[tuple[str, tuple[int, int]]]:
    """Stored type and (height, width) of each site from its files' headers.

    Raises:
        InputError: a plane is not there, cannot be read, or is cut short, or channels of a site differ in shape.
    """
    found = []
    for site in sites:
        probes = probe_planes(site.planes, site.where)
        first, shape = site.planes[0], probes[site.planes[0]].shape
        for plane, probe in probes.items():
            if probe.shape != shape:
                raise InputError(
                    f"{site.where}: {plane} is {probe.shape}, but {first} of the same site is {shape}"
                )
        found.append((np.result_type(*(probes[plane].dtype for plane in site.stored)).name, shape))
    return found


def digest_sites(sites: list[Site]) -> list[str]:
    """SHA-256 of the pixels each site is made from, as a build records it."""
    return [pixel_digest(read_planes(site.planes, site.where).values()) for site in sites]


def segment_site(task: tuple[Site, Settings]) -> int | None:
    """Segment a site and keep its mask; the number of its cells, or None where its mask was there already."""
    site, settings = task
    image = _segmented(
        site, settings, correct(read_planes(site.segmented or site.stored, site.where), site)
    )
    key = mask_key(image, settings.described)
    if settings.masks.find(key):
        return None
    try:
        mask = _segmenter(settings.segmenter).segment(image)
    except InputError as error:
        raise InputError(f"{site.where}: {error}") from error
    settings.masks.keep(key, mask)
    return int(np.unique(mask[mask > 0]).size)


def read_site(task: tuple[Site, Settings]) -> tuple[str, UInt[np.ndarray, "h w c"] | None]:
    """The key of a site's mask, and what is to be segmented; None where its mask is there already."""
    site, settings = task
    image = _segmented(
        site, settings, correct(read_planes(site.segmented or site.stored, site.where), site)
    )
    key = mask_key(image, settings.described)
    return key, None if settings.masks.find(key) else image


def prepare_site(task: tuple[Site, Settings, np.dtype]) -> SitePixels:
    """The stored image of a site, the mask made from these very pixels, and the image's statistics.

    Raises:
        InputError: a file cannot be read, or changed since it was segmented.
    """
    site, settings, dtype = task
    raw = read_planes(site.planes, site.where)
    planes = correct(raw, site)
    image = aggregate_channels(stack_planes(planes, site.stored, site.where), settings.aggregate)
    segmented = _segmented(site, settings, planes) if site.segmented else image
    mask = settings.masks.get(mask_key(segmented, settings.described))
    if mask is None or mask.shape != image.shape[:2]:
        raise InputError(
            f"{site.where}: its images changed while they were built; run the same command again"
        )
    named = dict(zip(site.channels, (*site.stored, *site.segmented), strict=True))
    quality = site_quality(
        {name: raw[plane] for name, plane in named.items()}, mask, segmented[..., 0]
    )
    if settings.resize:
        image, mask = resize_image(image, settings.resize), resize_mask(mask, settings.resize)
    pixels = np.ascontiguousarray(image.astype(dtype))
    return SitePixels(pixels, mask, site_statistics(image), pixel_digest(raw.values()), quality)


def write_shard(task: tuple[Shard, list[Site], Settings, np.dtype]) -> Written:
    """Make a whole shard of the dataset: `prepare_site` of each of its sites, one after the other.

    Raises:
        InputError: as `prepare_site`, or the shard cannot be written.
    """
    shard, sites, settings, dtype = task
    return write(shard, (prepare_site((site, settings, dtype)) for site in sites))


def _segmented(
    site: Site, settings: Settings, planes: dict[Plane, UInt[np.ndarray, "_ _"]]
) -> UInt[np.ndarray, "h w c"]:
    """What the engine is given."""
    if site.segmented:
        return stack_planes(planes, site.segmented, site.where)
    return aggregate_channels(stack_planes(planes, site.stored, site.where), settings.aggregate)
