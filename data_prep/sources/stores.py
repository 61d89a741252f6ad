"""Plates in Zarr stores: list their sites, and locate the image of a site.

Two layouts are supported: OME-Zarr plates (HCS: the root lists wells, each well lists images), and
JUMP-Lite stores with one array per site named `source__batch__plate__well__site`. `--images` is one
store, or a folder of plates named `PLATE.zarr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from data_prep.sources import zarrs
from data_prep.sources.files import names_of_folder
from data_prep.sources.remote import redacted
from perturbjax.core.errors import InputError
from perturbjax.core.plates import BATCH, PLATE, SITE, WELL, normalize_well

#: Columns whose values form the name of a JUMP-Lite array.
SOURCE = "Metadata_Source"
KEY = (SOURCE, BATCH, PLATE, WELL, SITE)
#: Suffixes after the name of a plate.
SUFFIXES = (zarrs.SUFFIX, f".ome{zarrs.SUFFIX}")
#: Column with the path of the image of a site in the store.
IMAGE = "image"


def is_store(images: str) -> bool:
    """Return whether `--images` is a single Zarr store."""
    return images.rstrip("/").endswith(zarrs.SUFFIX)


def store_table(images: str) -> pd.DataFrame:
    """List the sites at `--images`.

    Returns:
        One row per site, as text: plate, well, site and image; for JUMP-Lite also source and batch.

    Raises:
        InputError: There is no store, or it is neither an OME-Zarr plate nor a JUMP-Lite store.
    """
    if is_store(images):
        return pd.DataFrame(_list_sites(images.rstrip("/")), dtype=object)
    stores = sorted(name for name in names_of_folder(images) if name.endswith(zarrs.SUFFIX))
    if not stores:
        raise InputError(
            f"--images {redacted(images)}: contains no Zarr store (NAME.zarr). Pass --load-data, "
            "a table of the images; `perturbjax table` writes it from their file names"
        )
    rows = [row for name in stores for row in _list_sites(f"{images.rstrip('/')}/{name}")]
    return pd.DataFrame(rows, dtype=object)


class StoreFinder:
    """Find the image of a site by plate, well and site."""

    def __init__(self, images: str):
        self.images = images.rstrip("/")
        self._plates: dict[str, dict[tuple[str, str], str]] = {}

    def find(self, row: Mapping[Any, Any], where: str) -> str:
        """Return the path or URL of the image of a site.

        Raises:
            InputError: The store has no such plate or site.
        """
        if is_store(self.images) and self._is_jump_lite():
            return self._jump_lite(row, where)
        plate = self._plate(row[PLATE], where)
        if (row[WELL], row[SITE]) not in plate:
            sites = sorted(site for well, site in plate if well == row[WELL])
            available = f"sites of the well: {', '.join(sites[:9])}" if sites else "no such well"
            raise InputError(
                f"{where}: site {row[SITE]} of well {row[WELL]} is not in plate {row[PLATE]} "
                f"({available})"
            )
        return plate[row[WELL], row[SITE]]

    def _plate(self, name: str, where: str) -> dict[tuple[str, str], str]:
        if name not in self._plates:
            store = self.images if is_store(self.images) else self._store_in_folder(name)
            # NGFF allows plates that list wells without images; a table need not use them.
            rows = _list_sites(store, all_wells=False)
            # A single store must contain the plate of the table; in a folder, its file name
            # decides.
            if rows and rows[0][PLATE] != name and is_store(self.images):
                raise InputError(
                    f"{where}: plate {name} is not in {redacted(store)}, which contains plate "
                    f"{rows[0][PLATE]}; write that name in the table"
                )
            self._plates[name] = {(row[WELL], row[SITE]): row[IMAGE] for row in rows}
        return self._plates[name]

    def _store_in_folder(self, plate: str) -> str:
        names = [f"{plate}{suffix}" for suffix in SUFFIXES]
        # NAME.ome.zarr if it exists, otherwise NAME.zarr.
        present = [name for name in names[1:] if name in names_of_folder(self.images)]
        return f"{self.images}/{(present or names)[0]}"

    def _is_jump_lite(self) -> bool:
        if not hasattr(self, "_lite"):
            self._lite = _plate_of(self.images) is None
        return self._lite

    def _jump_lite(self, row: Mapping[Any, Any], where: str) -> str:
        for column in (SOURCE, BATCH):
            if not row.get(column):
                raise InputError(
                    f"{where}: {column} is missing; it is part of the array names of "
                    f"{redacted(self.images)}"
                )
        return f"{self.images}/{'__'.join(row[column] for column in KEY)}"


def _plate_of(store: str) -> dict[str, Any] | None:
    """Return the plate metadata of a store; None if it is not an OME-Zarr plate."""
    try:
        metadata = zarrs.attributes(store, f"--images {redacted(store)}")
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # JUMP-Lite stores may have no root
            return None
        raise
    return metadata.get("plate")


def _list_sites(store: str, all_wells: bool = True) -> list[dict[str, str]]:
    """List the sites of a store; with `all_wells`, wells without images are an error."""
    plate = _plate_of(store)
    rows = _jump_lite_sites(store) if plate is None else _plate_sites(store, plate, all_wells)
    if not rows:
        raise InputError(
            f"--images {redacted(store)}: is neither an OME-Zarr plate nor a JUMP-Lite store"
        )
    return rows


def _jump_lite_sites(store: str) -> list[dict[str, str]]:
    names = sorted(name for name in names_of_folder(store) if zarrs.JUMP_LITE.fullmatch(name))
    return [
        {**dict(zip(KEY, name.split("__"), strict=True)), IMAGE: f"{store}/{name}"}
        for name in names
        if name.count("__") == len(KEY) - 1
    ]


def _plate_sites(store: str, plate: dict[str, Any], all_wells: bool) -> list[dict[str, str]]:
    rows = []
    try:
        name = plate.get("name") or store.rpartition("/")[2]
        # The longer suffix `.ome.zarr` first.
        for suffix in SUFFIXES[::-1]:
            name = str(name).removesuffix(suffix)
        for well in plate["wells"]:
            path = _require_inside(well["path"], store)
            # Wells have paths such as `A/1`.
            position = {PLATE: name, WELL: normalize_well(path.replace("/", ""))}
            for site, image in _images_of(store, path, all_wells):
                rows.append({**position, SITE: site, IMAGE: f"{store}/{path}/{image}"})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--images {redacted(store)}: its plate metadata are damaged ({error!r})"
        ) from error
    return rows


def _images_of(store: str, well: str, must_exist: bool) -> list[tuple[str, str]]:
    """Return (site, path) of the images of a well.

    If paths count from 0, sites count from 1; otherwise the path is the name of the site.
    """
    try:
        metadata = zarrs.attributes(f"{store}/{well}", f"--images {redacted(store)}")
    except InputError as error:
        if not must_exist and isinstance(error.__cause__, FileNotFoundError):
            return []
        raise InputError(
            f"{error.message}: the plate metadata list well {well}; the store is incomplete"
        ) from error
    images = metadata["well"]["images"]
    if len({image.get("acquisition") for image in images}) > 1:
        raise InputError(
            f"--images {redacted(store)}: well {well} has several acquisitions; export one "
            "acquisition"
        )
    paths = [_require_inside(image["path"], store) for image in images]
    # True if the paths are 0, 1, 2 and so on.
    counted = sorted(paths) == sorted(map(str, range(len(paths))))
    return [(str(int(path) + 1) if counted else path, path) for path in paths]


def _require_inside(path: Any, store: str) -> str:
    parts = str(path).split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(
            f"--images {redacted(store)}: path {path!r} in its metadata leads outside the store"
        )
    return str(path)
