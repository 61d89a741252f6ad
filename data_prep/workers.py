"""The work on one site, as it runs in a worker process."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from data_prep import segment
from data_prep.images import (
    Aggregate,
    aggregate_channels,
    decode_plane,
    probe_plane,
    read_file,
    resize_image,
    resize_mask,
    stack_planes,
)
from data_prep.masks import MaskStore, mask_key
from perturbjax.console import InputError
from perturbjax.dataset import SitePixels, site_statistics


@dataclass(frozen=True)
class Site:
    """What a worker needs to know of a site."""

    name: str
    """`site_id`."""
    where: str
    """CSV and row, for messages."""
    stored: tuple[str, ...]
    """Files of the channels that make the stored image."""
    segmented: tuple[str, ...]
    """Files of the channels that are segmented; empty segments the stored image."""

    @property
    def files(self) -> tuple[str, ...]:
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
        InputError: a file is no TIFF of one plane, is cut short, or channels of a site differ in shape.
    """
    found = []
    for site in sites:
        paths = (*site.stored, *site.segmented)
        probes = [probe_plane(path, site.where) for path in paths]
        for path, (_, shape) in zip(paths, probes, strict=True):
            if shape != probes[0][1]:
                raise InputError(f"{site.where}: {path} is {shape}, but {paths[0]} of the same site is {probes[0][1]}")
        stored = [dtype for dtype, _ in probes[: len(site.stored)]]
        found.append((np.result_type(*stored).name, probes[0][1]))
    return found


def digest_sites(sites: list[Site]) -> list[str]:
    """SHA-256 of the files each site is made from, as a build records it."""
    return [_digest([read_file(path, site.where) for path in site.files]) for site in sites]


def segment_site(task: tuple[Site, Settings]) -> int | None:
    """Segment a site and keep its mask; the number of its cells, or None where its mask was there already."""
    site, settings = task
    contents = {path: read_file(path, site.where) for path in site.segmented or site.stored}
    image = _segmented(site, settings, contents)
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
    contents = {path: read_file(path, site.where) for path in site.segmented or site.stored}
    image = _segmented(site, settings, contents)
    key = mask_key(image, settings.described)
    return key, None if settings.masks.find(key) else image


def prepare_site(task: tuple[Site, Settings, np.dtype]) -> SitePixels:
    """The stored image of a site, the mask made from these very pixels, and the image's statistics.

    Raises:
        InputError: a file cannot be read, or changed since it was segmented.
    """
    site, settings, dtype = task
    contents = {path: read_file(path, site.where) for path in site.files}
    image = aggregate_channels(_stack(site, site.stored, contents), settings.aggregate)
    segmented = _segmented(site, settings, contents) if site.segmented else image
    mask = settings.masks.get(mask_key(segmented, settings.described))
    if mask is None or mask.shape != image.shape[:2]:
        raise InputError(f"{site.where}: its images changed while they were built; run the same command again")
    if settings.resize:
        image, mask = resize_image(image, settings.resize), resize_mask(mask, settings.resize)
    digest = _digest(list(contents.values()))
    return SitePixels(np.ascontiguousarray(image.astype(dtype)), mask, site_statistics(image), digest)


def _segmented(site: Site, settings: Settings, contents: dict[str, bytes]) -> UInt[np.ndarray, "h w c"]:
    """What the engine is given."""
    if site.segmented:
        return _stack(site, site.segmented, contents)
    return aggregate_channels(_stack(site, site.stored, contents), settings.aggregate)


def _stack(site: Site, paths: tuple[str, ...], contents: dict[str, bytes]) -> UInt[np.ndarray, "h w c"]:
    return stack_planes({path: decode_plane(contents[path], path, site.where) for path in paths}, paths, site.where)


def _digest(contents: list[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
