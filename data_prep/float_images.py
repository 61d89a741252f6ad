"""Choose the mapping of float images to uint16 for each plate and channel, before a build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_prep.process_pool import TaskPool, map_in_chunks
from data_prep.site import Site
from data_prep.sources import measure_floats
from data_prep.sources.floats import FloatRange, FloatScale, choose_scale, join_ranges
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console

#: Maximum number of mappings that are printed.
_PRINTED = 12
#: A warning is printed if the largest value of a plate is this many times the median of the largest
#: values of its sites: typical sites then have fewer than 8 bits.
_OUTLIER = 256


def scale_floats(
    sites: Sequence[Site], floats: Sequence[tuple[str, ...]], pool: TaskPool
) -> tuple[list[Site], dict[str, Any]]:
    """Measure all float images, and set the mapping of each plate and channel.

    Args:
        sites: All sites of the build.
        floats: Channels with float pixels of each site.
        pool: Workers that read the images.

    Returns:
        The sites with the mapping of each plane, and the entry of the provenance; empty without
        float images.

    Raises:
        InputError: An image cannot be read, or a plate has no finite value in a channel.
    """
    selected = [(site, names) for site, names in zip(sites, floats, strict=True) if names]
    if not selected:
        return list(sites), {}
    measured = map_in_chunks(pool, measure_sites, selected, "Measuring float images")
    groups: dict[tuple[str, str], list[FloatRange]] = {}
    for (site, names), ranges in zip(selected, measured, strict=True):
        for name, pixels in zip(names, ranges, strict=True):
            groups.setdefault((site.plate, name), []).append(pixels)
    ranges_of = {key: join_ranges(ranges) for key, ranges in groups.items()}
    for (plate, channel), pixels in ranges_of.items():
        if pixels.low > pixels.high:
            raise InputError(
                f"plate {plate}, channel {channel}: all float pixels are NaN or infinite; check "
                "the program that wrote the images"
            )
    scales = {key: choose_scale(pixels) for key, pixels in ranges_of.items()}
    _print_scales(scales, ranges_of, groups)
    return [_set_scales(site, scales) for site in sites], _describe(scales, ranges_of)


def measure_sites(tasks: list[tuple[Site, tuple[str, ...]]]) -> list[list[FloatRange]]:
    """Measure the range of the pixels of float channels of sites; runs in worker processes."""
    ranges = []
    for site, channels in tasks:
        planes = [site.plane_of(channel) for channel in channels]
        measured = measure_floats(planes, site.where)
        ranges.append([measured[plane] for plane in planes])
    return ranges


def _set_scales(site: Site, scales: Mapping[tuple[str, str], FloatScale]) -> Site:
    planes = [
        replace(plane, scale=scales.get((site.plate, channel)))
        for plane, channel in zip((*site.stored, *site.segmented), site.channels, strict=True)
    ]
    count = len(site.stored)
    return replace(site, stored=tuple(planes[:count]), segmented=tuple(planes[count:]))


def _describe(
    scales: Mapping[tuple[str, str], FloatScale], ranges: Mapping[tuple[str, str], FloatRange]
) -> dict[str, Any]:
    by_plate: dict[str, dict[str, Any]] = {}
    for (plate, channel), scale in scales.items():
        pixels = ranges[plate, channel]
        by_plate.setdefault(plate, {})[channel] = {
            "step": scale.step,
            "zero": scale.zero,
            "minimum": pixels.low,
            "maximum": pixels.high,
            "replaced_pixels": pixels.replaced,
        }
    return {"float_images": by_plate}


def _print_scales(
    scales: Mapping[tuple[str, str], FloatScale],
    ranges: Mapping[tuple[str, str], FloatRange],
    groups: Mapping[tuple[str, str], list[FloatRange]],
) -> None:
    for (plate, channel), scale in list(scales.items())[:_PRINTED]:
        pixels = ranges[plate, channel]
        replaced = f"; {pixels.replaced} NaN or infinite pixels become 0" if pixels.replaced else ""
        console.print(
            f"info: plate {plate}, channel {channel}: float values from {pixels.low:g} to "
            f"{pixels.high:g} are stored as uint16, value = (stored - {scale.zero}) x "
            f"{scale.step:g}{replaced}"
        )
    if len(scales) > _PRINTED:
        console.print(
            f"info: {len(scales) - _PRINTED} more mappings of float values are listed in "
            "provenance.json"
        )
    for (plate, channel), group in groups.items():
        largest = max(abs(ranges[plate, channel].low), abs(ranges[plate, channel].high))
        sizes = [max(abs(one.low), abs(one.high)) for one in group if math.isfinite(one.low)]
        if largest > _OUTLIER * np.median(sizes) > 0:
            console.print(
                f"warning: plate {plate}, channel {channel}: the largest float value {largest:g} "
                f"is {largest / np.median(sizes):.0f} times that of a typical site, so most sites "
                "are stored with few gray levels; remove the outlier"
            )
