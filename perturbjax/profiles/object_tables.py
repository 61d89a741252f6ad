"""Read measurements of objects as CellProfiler writes them: SQLite databases and CSV files.

CellProfiler writes one table of images, with plate and well as `Metadata_*`, and one table for each
kind of object (Cells, Nuclei, Cytoplasm). Rows of both refer to each other by `ImageNumber` (and
`TableNumber`, if several runs were merged). Two layouts of a database are recognized:

- ExportToDatabase: `PREFIX_Per_Image`, with `PREFIX_Per_Object` or `PREFIX_Per_Cells` and so on.
- cytominer-database and CytoTable: `Image`, `Cells`, `Nuclei`, `Cytoplasm`.

Each kind of object is aggregated separately, so objects need not be matched with each other.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.profile_table import METADATA

#: Columns by which objects refer to images.
IMAGE_NUMBER, TABLE_NUMBER = "ImageNumber", "TableNumber"
OBJECT_NUMBER = "ObjectNumber"
_IMAGES = re.compile(r"(.*_)?(Per_)?Image", re.IGNORECASE)
_OBJECTS = re.compile(r"(?:.*_Per_|Per_)?([A-Za-z0-9]+)")
#: Tables of a database that contain neither images nor objects.
_OTHER = re.compile(r".*(Experiment|Well|Relationships?|RelationshipTypes|Properties|View).*", re.I)
_COMPARTMENT = re.compile(r"(Cells|Nuclei|Cytoplasm)_")


def read_database(path: Path) -> Iterator[pd.DataFrame]:
    """Read the objects of a SQLite database of CellProfiler, one kind of object after the other.

    Yields:
        One row per object: `Metadata_*` of its image, and its measurements, named `KIND_*`.

    Raises:
        InputError: It is not such a database, or is damaged.
    """
    uri = f"file:{quote(str(path.resolve()))}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as database:
            # Definitions in an untrusted file must not call functions with side effects.
            database.execute("PRAGMA trusted_schema = OFF")
            names = [
                name
                for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
            ]
            images, objects = _choose_tables(database, names, path)
            metadata = _image_metadata(_select(database, images), f"{path}, table {images}")
            for name, kind in objects.items():
                where = f"{path}, table {name}"
                yield _join_images(_select(database, name), metadata, kind, where)
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        reason = str(error).splitlines()[-1]
        raise InputError(
            f"{path}: cannot be read as a SQLite database of CellProfiler ({reason}). Export it "
            "again, or give CSV or parquet."
        ) from error


def add_images(
    table: pd.DataFrame, path: Path, read: Callable[[Path], pd.DataFrame]
) -> pd.DataFrame:
    """Add plate and well to a CSV of objects from the CSV of images in its folder.

    `PREFIX_Cells.csv` belongs to `PREFIX_Image.csv`. Tables that are not of this kind are returned
    unchanged.

    Args:
        table: the table of objects.
        path: its file.
        read: reader of the table of images.

    Raises:
        InputError: The table of images is missing or has no plates and wells.
    """
    if not {IMAGE_NUMBER, OBJECT_NUMBER} <= set(table.columns):
        return table
    stem, suffix = path.name.partition(".")[0], path.name.partition(".")[2]
    prefix, _, kind = stem.rpartition("_")
    table = _name_features(table, kind)
    if {PLATE, WELL} <= set(table.columns):
        return table
    images = path.with_name(f"{prefix}{'_' * bool(prefix)}Image.{suffix}")
    if not images.is_file():
        raise InputError(
            f"{path}: no column {PLATE}. Plate and well of its {IMAGE_NUMBER} are expected in "
            f"{images}, which does not exist. Copy it there, or export {METADATA}* with "
            "the objects."
        )
    metadata = _image_metadata(read(images), str(images))
    return _join_images(table, metadata, kind, str(path))


def _choose_tables(
    database: sqlite3.Connection, names: list[str], path: Path
) -> tuple[str, dict[str, str]]:
    """Return the table of images, and the kind of object of each table of objects."""
    with_images = [name for name in names if IMAGE_NUMBER in _columns(database, name)]
    images = [name for name in with_images if _IMAGES.fullmatch(name)]
    objects = {
        name: match[1]
        for name in with_images
        if name not in images and not _OTHER.fullmatch(name) and (match := _OBJECTS.fullmatch(name))
    }
    if len(images) != 1 or not objects:
        raise InputError(
            f"{path}: is not a database of CellProfiler with one table of images (Image or "
            f"Per_Image) and tables of objects (Cells, Per_Object). Tables: {', '.join(names[:8])}"
        )
    return images[0], objects


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in database.execute(f"PRAGMA table_info({_quoted(table)})")]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _select(database: sqlite3.Connection, table: str) -> pd.DataFrame:
    return pd.read_sql_query(f"SELECT * FROM {_quoted(table)}", database)


def _image_metadata(images: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the keys and `Metadata_*` columns of a table of images."""
    names = {name: name.removeprefix("Image_") for name in map(str, images.columns)}
    images = images.rename(columns={n: new for n, new in names.items() if new.startswith(METADATA)})
    if missing := [name for name in (PLATE, WELL, IMAGE_NUMBER) if name not in images.columns]:
        raise InputError(
            f"{where}: no column {missing[0]}. Plate and well of every image are needed: extract "
            "them with CellProfiler's module Metadata."
        )
    keys = [name for name in (TABLE_NUMBER, IMAGE_NUMBER) if name in images.columns]
    images = images[[*keys, *(name for name in images.columns if name.startswith(METADATA))]]
    if (repeated := images[keys].duplicated().to_numpy()).any():
        raise InputError(
            f"{where}: {IMAGE_NUMBER} {images.loc[repeated, IMAGE_NUMBER].iloc[0]} "
            "occurs twice. Give the runs of CellProfiler as separate files."
        )
    return images


def _join_images(
    objects: pd.DataFrame, images: pd.DataFrame, kind: str, where: str
) -> pd.DataFrame:
    keys = [name for name in (TABLE_NUMBER, IMAGE_NUMBER) if name in images.columns]
    if missing := [name for name in keys if name not in objects.columns]:
        raise InputError(f"{where}: no column {missing[0]}, by which the images are identified.")
    features = objects.drop(columns=[c for c in objects.columns if c.startswith(METADATA)])
    joined = _name_features(features, kind).merge(
        images, on=keys, how="left", validate="many_to_one", indicator="_found"
    )
    if (unmatched := (joined["_found"] == "left_only").to_numpy()).any():
        raise InputError(
            f"{where}: {IMAGE_NUMBER} {joined.loc[unmatched, IMAGE_NUMBER].iloc[0]} is not in the "
            f"table of images ({unmatched.sum()} objects)."
        )
    return joined.drop(columns=["_found", *keys])


def _name_features(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Add the kind of object to the names of features, unless they have one already.

    `AreaShape_Area` of cells and of nuclei would otherwise be one feature.
    """
    fixed = (IMAGE_NUMBER, TABLE_NUMBER, OBJECT_NUMBER)
    names = [c for c in map(str, table.columns) if c not in fixed and not c.startswith(METADATA)]
    if any(_COMPARTMENT.match(name) or name.startswith(f"{kind}_") for name in names):
        return table
    return table.rename(columns={name: f"{kind}_{name}" for name in names})
