"""Columns of load_data.csv that name image files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pandas as pd

from perturbjax.core.errors import InputError

#: Columns that name files, as (pattern in front of the channel, content); the first kind is used.
FILE_COLUMNS = (
    ("FileName_Orig", "name"),
    ("URL_Orig", "url"),
    ("FileName_(?!Illum)", "name"),
    ("URL_(?!Illum)", "url"),
)
FILE_COLUMN_PATTERN = re.compile("(FileName|PathName|URL|Series|Frame|Channel)_")

#: Channel → (file names, folders), one per row.
Locations = dict[str, tuple[pd.Series, pd.Series]]


def file_locations(table: pd.DataFrame, source: Path | str) -> Locations:
    r"""Return file names and folders of each channel, in the order of the table's columns.

    File names may contain folders (`img/A01.tif`, `TimePoint_1\A01.tif`, absolute paths); these
    are added to the folder. `file://` URLs are percent-decoded, as CellProfiler encodes them.

    Raises:
        InputError: No column names files.
    """
    for prefix, kind in FILE_COLUMNS:
        columns = {
            match[1]: column
            for column in table.columns
            if (match := re.fullmatch(prefix + "(.+)", column))
        }
        if columns and kind == "url":
            return {name: _split(table[column].map(_path_of)) for name, column in columns.items()}
        if columns:
            empty = pd.Series("", index=table.index)
            # The folder column of a channel; without one, the folder is empty.
            folders = {
                name: table.get(column.replace("FileName_", "PathName_", 1), empty)
                for name, column in columns.items()
            }
            return {
                name: _join(folders[name], *_split(table[column]))
                for name, column in columns.items()
            }
    raise InputError(
        f"{source}: has no FileName_Orig<CHANNEL> column, so no channel can be identified "
        f"(columns: {', '.join(map(str, table.columns[:8]))})"
    )


def _path_of(url: str) -> str:
    # Replaces scheme and slashes by one slash: `file:///data/a.tif` becomes `/data/a.tif`.
    path = re.sub(r"^[a-z0-9]+:/+", "/", url)
    return unquote(path) if url.startswith("file:") else path


def _split(paths: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Split paths into names and folders."""
    parts = paths.str.replace("\\", "/").str.rpartition("/")
    # The folder of "/a.tif" is "/", not the empty text of a name without a folder.
    return parts[2], parts[0].mask((parts[0] == "") & (parts[1] == "/"), "/")


def _join(folders: pd.Series, names: pd.Series, inner: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Add the folders within file names to the folders of their rows."""
    # A slash, or a drive letter of Windows.
    absolute = inner.str.match(r"/|[A-Za-z]:")
    # Without slashes at the end, so that the join has exactly one.
    both = folders.str.replace(r"[/\\]+$", "", regex=True) + "/" + inner
    joined = both.where((folders != "") & ~absolute, inner)
    return names, joined.where(inner != "", folders)
