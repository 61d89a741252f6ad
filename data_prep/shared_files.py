"""Detect rows and channels of a table that resolve to one image file.

Microscopes repeat file names: Opera Phenix uses the same names on every plate. If only the images
of one plate were copied, a search by name would return them for the rows of every plate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from data_prep.file_columns import Locations
from data_prep.sources import Plane, probe_planes
from data_prep.sources.plane import COLORS
from perturbjax.core.csv_tables import FIRST_ROW
from perturbjax.core.errors import InputError


def check_shared_files(
    locations: Locations, planes: Mapping[str, Sequence[Plane]], source: Path | str
) -> list[str]:
    """Refuse files shared by different folders, and describe other planes that are used twice.

    Args:
        locations: File names and folders as written in the table.
        planes: Planes of each channel, one per row.
        source: The table, for messages.

    Returns:
        Warnings about two rows of a channel, or two channels of a row, with the same plane.

    Raises:
        InputError: Rows that name different folders resolve to one file.
    """
    _refuse_different_folders(locations, planes, source)
    return [*_repeated_rows(planes, source), *_repeated_channels(planes, source)]


def _refuse_different_folders(
    locations: Locations, planes: Mapping[str, Sequence[Plane]], source: Path | str
) -> None:
    first: dict[str, tuple[int, str]] = {}
    for channel, (names, folders) in locations.items():
        rows = zip(planes[channel], names, folders, strict=True)
        for row, (plane, name, folder) in enumerate(rows, FIRST_ROW):
            if not plane.file:
                continue
            # First row that resolved to this file, and its folder in the table.
            other_row, other_folder = first.setdefault(plane.file, (row, folder))
            if not _same_folder(folder, other_folder):
                raise InputError(
                    f"{source}, row {row}, channel {channel}: {name} of {folder} does not exist "
                    f"below --images; the only file of this name, {plane.file}, is the image of "
                    f"row {other_row} ({other_folder}). Copy the missing images, or correct the "
                    "paths"
                )
            if len(folder) > len(other_folder):  # compare the next rows with the full path
                first[plane.file] = (other_row, folder)


def _same_folder(first: str, second: str) -> bool:
    """Return whether two spellings can be one folder: one path is the end of the other."""
    if first == second:
        return True
    parts = [
        [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
        for path in (first, second)
    ]
    short, long = sorted(parts, key=len)
    # The folders agree from the end: `B/C` and `/A/B/C` can be the same folder.
    return not short or long[-len(short) :] == short


def _repeated_rows(planes: Mapping[str, Sequence[Plane]], source: Path | str) -> list[str]:
    warnings = []
    for channel, column in planes.items():
        first: dict[Plane, int] = {}
        repeated = []
        for row, plane in enumerate(column, FIRST_ROW):
            # `setdefault` returns the first row with this plane.
            if plane.file and first.setdefault(plane, row) != row:
                repeated.append((first[plane], row, plane))
        if repeated:
            one, two, plane = repeated[0]
            warnings.append(
                f"{source}, rows {one} and {two}, channel {channel}: both sites use the same image "
                f"{plane} ({len(repeated)} repeated images of this channel)"
            )
    return warnings


def _repeated_channels(planes: Mapping[str, Sequence[Plane]], source: Path | str) -> list[str]:
    warnings = []
    for one, two in combinations(planes, 2):
        shared = [
            (row, plane)
            for row, (plane, other) in enumerate(
                zip(planes[one], planes[two], strict=True), FIRST_ROW
            )
            if plane.file and _can_be_same(plane, other)
        ]
        # One file is probed for each pair of channels, because reading all headers takes minutes.
        if shared and _ignores_channel(shared[0][1]):
            row, plane = shared[0]
            warnings.append(
                f"{source}, row {row}: channels {one} and {two} use the same image {plane} "
                f"({len(shared)} such rows)"
            )
    return warnings


def _can_be_same(plane: Plane, other: Plane) -> bool:
    """Return whether two planes of a row differ in their channel names only, R, G and B apart."""
    if plane.channel != other.channel and {plane.channel, other.channel} <= set(COLORS):
        return False
    return replace(plane, channel="") == replace(other, channel="")


def _ignores_channel(plane: Plane) -> bool:
    """Return whether a file has one plane only, so that all channels would read the same pixels."""
    try:
        probe_planes([replace(plane, channel="")], "")
    except InputError:  # several channels; or unreadable, which the caller reports later
        return False
    return True
