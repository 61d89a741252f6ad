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
#: Column that selects an acquisition (`id` in the metadata) if a plate has several.
ACQUISITION = "Metadata_Acquisition"


def is_store(images: str) -> bool:
    """Return whether `--images` is a single Zarr store."""
    return images.rstrip("/").endswith(zarrs.SUFFIX)


def store_table(images: str) -> pd.DataFrame:
    """List the sites at `--images`.

    Returns:
        One row per site, as text: plate, well, site and image; for JUMP-Lite also source and batch.

    Raises:
        InputError: There is no store, or it is neither an OME-Zarr plate nor a JUMP-Lite store, or
            a plate has several acquisitions.
    """
    if is_store(images):
        return _table_of([images.rstrip("/")])
    stores = sorted(name for name in names_of_folder(images) if name.endswith(zarrs.SUFFIX))
    if not stores:
        raise InputError(
            f"--images {redacted(images)}: contains no Zarr store (NAME.zarr). Pass --load-data, "
            "a table of the images; `perturbjax table` writes it from their file names"
        )
    return _table_of([f"{images.rstrip('/')}/{name}" for name in stores])


def _table_of(stores: list[str]) -> pd.DataFrame:
    rows = []
    for store in stores:
        sites = _list_sites(store)
        acquisitions = sorted({site.pop(ACQUISITION, "") for site in sites})
        if len(acquisitions) > 1:
            raise InputError(
                f"--images {redacted(store)}: the plate has acquisitions {', '.join(acquisitions)}"
                f"; to select one, pass --load-data with columns {PLATE}, {WELL}, {SITE} and "
                f"{ACQUISITION}"
            )
        rows += sites
    return pd.DataFrame(rows, dtype=object)


class StoreFinder:
    """Find the image of a site by plate, well and site, and by acquisition if there are several."""

    def __init__(self, images: str):
        self.images = images.rstrip("/")
        #: Plate -> acquisition -> (well, site) -> image.
        self._plates: dict[str, dict[str, dict[tuple[str, str], str]]] = {}

    def find(self, row: Mapping[Any, Any], where: str) -> str:
        """Return the path or URL of the image of a site.

        Raises:
            InputError: The store has no such plate or site, or the plate has several acquisitions
                and the row does not select one.
        """
        if is_store(self.images) and self._is_jump_lite():
            return self._jump_lite(row, where)
        plate = self._acquisition(row, where)
        if (row[WELL], row[SITE]) not in plate:
            sites = sorted(site for well, site in plate if well == row[WELL])
            available = f"sites of the well: {', '.join(sites[:9])}" if sites else "no such well"
            raise InputError(
                f"{where}: site {row[SITE]} of well {row[WELL]} is not in plate {row[PLATE]} "
                f"({available})"
            )
        return plate[row[WELL], row[SITE]]

    def _acquisition(self, row: Mapping[Any, Any], where: str) -> dict[tuple[str, str], str]:
        acquisitions = self._plate(row[PLATE], where)
        if len(acquisitions) == 1:
            return next(iter(acquisitions.values()))
        name = row.get(ACQUISITION, "")
        if not name or name not in acquisitions:
            raise InputError(
                f"{where}: plate {row[PLATE]} has acquisitions {', '.join(sorted(acquisitions))}, "
                f"and {ACQUISITION} is {name or 'missing'}; write one of them into that column"
            )
        return acquisitions[name]

    def _plate(self, name: str, where: str) -> dict[str, dict[tuple[str, str], str]]:
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
            plate: dict[str, dict[tuple[str, str], str]] = {}
            for row in rows:
                sites = plate.setdefault(row.get(ACQUISITION, ""), {})
                sites[row[WELL], row[SITE]] = row[IMAGE]
            self._plates[name] = plate
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
            for acquisition, site, image in _images_of(store, path, all_wells):
                where = {SITE: site, IMAGE: f"{store}/{path}/{image}", ACQUISITION: acquisition}
                rows.append({**position, **where})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--images {redacted(store)}: its plate metadata are damaged ({error!r})"
        ) from error
    return rows


def _images_of(store: str, well: str, must_exist: bool) -> list[tuple[str, str, str]]:
    """Return (acquisition, site, path) of the images of a well.

    If paths count from 0, the sites of each acquisition count from 1; otherwise the path is the
    name of the site. Source of `acquisition`: NGFF 0.5, well metadata.
    """
    try:
        metadata = zarrs.attributes(f"{store}/{well}", f"--images {redacted(store)}")
    except InputError as error:
        if not must_exist and isinstance(error.__cause__, FileNotFoundError):
            return []
        raise InputError(
            f"{error.message}: the plate metadata list well {well}; the store is incomplete"
        ) from error
    images = [
        (str(image.get("acquisition", "")), _require_inside(image["path"], store))
        for image in metadata["well"]["images"]
    ]
    # True if the paths are 0, 1, 2 and so on.
    counted = sorted(path for _, path in images) == sorted(map(str, range(len(images))))

    def site(acquisition: str, path: str) -> str:
        if not counted:
            return path
        return str(sum(name == acquisition and int(other) <= int(path) for name, other in images))

    return [(acquisition, site(acquisition, path), path) for acquisition, path in images]


def _require_inside(path: Any, store: str) -> str:
    parts = str(path).split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(
            f"--images {redacted(store)}: path {path!r} in its metadata leads outside the store"
        )
    return str(path)
