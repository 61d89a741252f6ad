"""Plates that lie in Zarr stores: which sites there are, and where each of them lies.

Two layouts: a plate of OME-Zarr (HCS: the root names its wells, a well its images), and JUMP-Lite's store, one array a
site named `source__batch__plate__well__site`. `--images` is one store, or a folder of plates named `PLATE.zarr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from data_prep.sources import zarrs
from data_prep.sources.files import names_of_folder
from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, SITE, WELL, normalize_well

#: Columns from which the name of an array of JUMP-Lite is made.
SOURCE, BATCH = "Metadata_Source", "Metadata_Batch"
KEY = (SOURCE, BATCH, PLATE, WELL, SITE)
#: Column of a table of stores: where the site's image lies.
IMAGE = "image"


def is_store(images: str) -> bool:
    """Whether `--images` names a Zarr store itself."""
    return images.rstrip("/").endswith(zarrs.SUFFIX)


def store_table(images: str) -> pd.DataFrame:
    """One row a site of what lies at `--images`, as text: plate, well, site (JUMP-Lite: source and batch too), image.

    Raises:
        InputError: there is no store, or it is neither a plate nor JUMP-Lite's.
    """
    if is_store(images):
        return pd.DataFrame(_sites_of(images.rstrip("/")), dtype=object)
    stores = sorted(name for name in names_of_folder(images) if name.endswith(zarrs.SUFFIX))
    if not stores:
        raise InputError(
            f"--images {images}: holds no Zarr store (NAME.zarr); give --load-data, which names files"
        )
    found = [row for name in stores for row in _sites_of(f"{images.rstrip('/')}/{name}")]
    return pd.DataFrame(found, dtype=object)


class StoreFinder:
    """Finds the image of a site that a row of a table tells of by plate, well and site."""

    def __init__(self, images: str):
        self.images = images.rstrip("/")
        self._plates: dict[str, dict[tuple[str, str], str]] = {}

    def find(self, row: Mapping[str, str], where: str) -> str:
        """Path or URL of the site's image.

        Raises:
            InputError: the plate or the site is not there.
        """
        if is_store(self.images) and self._is_jump_lite():
            return self._jump_lite(row, where)
        plate = self._plate(row[PLATE], where)
        if (row[WELL], row[SITE]) not in plate:
            there = sorted(site for well, site in plate if well == row[WELL])
            has = f"its sites are {', '.join(there[:9])}" if there else "it has no such well"
            raise InputError(
                f"{where}: site {row[SITE]} of well {row[WELL]} is not in plate {row[PLATE]}; {has}"
            )
        return plate[row[WELL], row[SITE]]

    def _plate(self, name: str, where: str) -> dict[tuple[str, str], str]:
        if name not in self._plates:
            store = self.images if is_store(self.images) else f"{self.images}/{name}{zarrs.SUFFIX}"
            rows = _sites_of(store)
            if rows and rows[0][PLATE] != name and is_store(self.images):
                raise InputError(
                    f"{where}: plate {name} is not in {store}, which holds plate {rows[0][PLATE]}"
                )
            self._plates[name] = {(row[WELL], row[SITE]): row[IMAGE] for row in rows}
        return self._plates[name]

    def _is_jump_lite(self) -> bool:
        if not hasattr(self, "_lite"):
            self._lite = _plate_of(self.images) is None
        return self._lite

    def _jump_lite(self, row: Mapping[str, str], where: str) -> str:
        for column in (SOURCE, BATCH):
            if not row.get(column):
                raise InputError(
                    f"{where}: {column} is missing; arrays of {self.images} are named by it"
                )
        return f"{self.images}/{'__'.join(row[column] for column in KEY)}"


def _plate_of(store: str) -> dict[str, Any] | None:
    """The plate's metadata in a store; None where it is no plate of OME-Zarr, or has no metadata at its root."""
    try:
        metadata = zarrs.attributes(store, f"--images {store}")
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # JUMP-Lite's arrays may lie in no group
            return None
        raise
    return metadata.get("plate")


def _sites_of(store: str) -> list[dict[str, str]]:
    plate = _plate_of(store)
    rows = _jump_lite_sites(store) if plate is None else _plate_sites(store, plate)
    if not rows:
        raise InputError(
            f"--images {store}: is neither a plate of OME-Zarr nor has arrays named as JUMP-Lite's"
        )
    return rows


def _jump_lite_sites(store: str) -> list[dict[str, str]]:
    names = sorted(name for name in names_of_folder(store) if zarrs.JUMP_LITE.fullmatch(name))
    return [
        {**dict(zip(KEY, name.split("__"), strict=True)), IMAGE: f"{store}/{name}"}
        for name in names
        if name.count("__") == len(KEY) - 1
    ]


def _plate_sites(store: str, plate: dict[str, Any]) -> list[dict[str, str]]:
    name = plate.get("name") or store.rpartition("/")[2].removesuffix(zarrs.SUFFIX)
    found = []
    try:
        for well in plate["wells"]:
            path = _inside(well["path"], store)
            position = {PLATE: str(name), WELL: normalize_well(path.replace("/", ""))}
            for site, image in _images_of(store, path):
                found.append({**position, SITE: site, IMAGE: f"{store}/{path}/{image}"})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--images {store}: its metadata are no plate's ({error!r})") from error
    return found


def _images_of(store: str, well: str) -> list[tuple[str, str]]:
    """(site, path) of a well's images: sites count from 1 where paths count from 0, and else are called as paths."""
    try:
        images = zarrs.attributes(f"{store}/{well}", f"--images {store}")["well"]["images"]
    except InputError as error:
        raise InputError(
            f"{error}: the plate's metadata name well {well}; the store is half there"
        ) from error
    if len({image.get("acquisition") for image in images}) > 1:
        raise InputError(
            f"--images {store}: well {well} has several acquisitions, and nothing says which is meant"
        )
    paths = [_inside(image["path"], store) for image in images]
    counted = sorted(paths) == sorted(map(str, range(len(paths))))
    return [(str(int(path) + 1) if counted else path, path) for path in paths]


def _inside(path: Any, store: str) -> str:
    parts = str(path).split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(f"--images {store}: path {path!r} in its metadata leads out of the store")
    return str(path)
