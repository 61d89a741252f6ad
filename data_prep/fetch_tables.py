"""Download the tables of a plate from the Cell Painting Gallery, and list its images."""

from __future__ import annotations

import html
import os
import re
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep import gallery_listing as gallery
from data_prep.download import NotThere, download
from data_prep.fetch_options import FetchConfig
from data_prep.file_columns import FILE_COLUMN_PATTERN, Locations, file_locations
from data_prep.platemap import join_platemap
from data_prep.platemap_files import read_platemap
from data_prep.site_table import normalise_position
from data_prep.sources.connections import redacted
from perturbjax.core.csv_tables import LARGEST_TABLE, read_table
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder
from perturbjax.core.messages import console
from perturbjax.core.options import names_in
from perturbjax.core.plates import SITE, WELL

#: Maximum number of pages of a folder listing (1,000 names each); more is a faulty server.
MAX_PAGES = 1000
#: Maximum size of a page in bytes, and maximum length of a file name: file systems allow 255 bytes,
#: and temporary names are longer.
LARGEST_PAGE, LONGEST_NAME = 1 << 24, 150


@dataclass(frozen=True)
class PlateImages:
    """Image files of the selected sites.

    Attributes:
        names: Channel → file names, one per site.
        keys: Channel → keys of their folders in the gallery.
        folders: Channel → local folders, relative to the output.
    """

    names: dict[str, list[str]]
    keys: dict[str, list[str]]
    folders: dict[str, list[str]]


def plate_table(options: FetchConfig) -> tuple[pd.DataFrame, PlateImages]:
    """Download the tables of a plate; return the metadata and images of the selected sites."""
    tables = make_folder(options.out / "metadata")
    folder = f"workspace/load_data_csv/{options.batch}/{options.plate}"
    original = _first_table(
        options, [f"{folder}/load_data.csv", f"{folder}/load_data.csv.gz"], tables
    )
    plate = read_table(original)
    # Line numbers in the CSV for messages; line 1 is the header.
    plate.insert(0, "row", range(2, 2 + len(plate)))
    normalise_position(plate, original)
    table = _choose_sites(plate, options, original)
    if options.accession == gallery.IN_JUMP_METADATA:
        table = _join_jump_tables(table, options, tables)
    else:
        table = _join_gallery_platemap(table, options, tables)
    locations = file_locations(table, original)
    channels = names_in(options.channels) or tuple(locations)
    for channel in channels:
        if channel not in locations:
            raise InputError(
                f"--channels {channel}: not on this plate (available: {', '.join(locations)})"
            )
    selected = _repair(options, {channel: locations[channel] for channel in channels})
    names = {channel: list(files) for channel, (files, _) in selected.items()}
    keys = _keys(options, selected)
    # The common folder is that of the whole plate, so that paths do not depend on --wells.
    everywhere = _keys(options, {name: file_locations(plate, original)[name] for name in channels})
    common = os.path.commonpath([key for column in everywhere.values() for key in column])
    folders = {
        channel: [
            os.path.normpath(f"images/{options.plate}/{os.path.relpath(key, common)}")
            for key in column
        ]
        for channel, column in keys.items()
    }
    metadata = [
        column
        for column in table.columns
        if not FILE_COLUMN_PATTERN.match(column) and column != "row"
    ]
    return table[metadata].copy(), PlateImages(names, keys, folders)


def _keys(options: FetchConfig, locations: Locations) -> dict[str, list[str]]:
    # The few distinct folders are converted once.
    keys = {
        folder: _image_key(folder, options)
        for _, column in locations.values()
        for folder in column.unique()
    }
    return {
        channel: [keys[folder] for folder in column] for channel, (_, column) in locations.items()
    }


def _join_jump_tables(table: pd.DataFrame, options: FetchConfig, tables: Path) -> pd.DataFrame:
    for name in gallery.JUMP_TABLES:
        if not (tables / name).is_file():
            base = options.jump_metadata_url or gallery.JUMP_METADATA
            download(f"{base}/{name}", tables / name, LARGEST_TABLE)
    joined, unknown = gallery.jump_perturbations(tables, table, options.source)
    if unknown:
        console.print(
            f"warning: {len(unknown)} wells with images are in no JUMP table "
            f"({', '.join(unknown[:8])}{' …' if len(unknown) > 8 else ''}); their treatments are "
            "unknown, and they are left out"
        )
    if joined.empty:
        raise InputError(
            f"--plate {options.plate}: none of the selected wells is in the JUMP tables"
        )
    return joined


def _join_gallery_platemap(table: pd.DataFrame, options: FetchConfig, tables: Path) -> pd.DataFrame:
    maps = f"workspace/metadata/platemaps/{options.batch}"
    barcodes_file = _table(options, f"{maps}/barcode_platemap.csv", tables)
    barcodes = read_table(barcodes_file)
    gallery.require_columns(barcodes, barcodes_file, ("Assay_Plate_Barcode", "Plate_Map_Name"))
    names = barcodes.loc[barcodes["Assay_Plate_Barcode"] == options.plate, "Plate_Map_Name"]
    if names.empty:
        raise InputError(
            f"--plate {options.plate}: not found in {barcodes_file.name} of batch {options.batch}"
        )
    name = require_file_name(names.iloc[0], f"{barcodes_file}, Plate_Map_Name")
    platemap = _table(options, f"{maps}/platemap/{name}.txt", tables)
    external = "workspace/metadata/external_metadata"
    compounds: Path | None
    try:
        metadata_name = f"{name.replace('_platemap', '_metadata')}.tsv"
        compounds = _table(options, f"{external}/{metadata_name}", tables)
    except NotThere:
        files = _list_folder(options, f"{options.root}/{external}")
        candidates = [file for file in files if file.endswith(".tsv")]
        compounds = None
        # With several tables, the right one cannot be identified.
        if len(candidates) == 1:
            compounds = _table(options, f"{external}/{candidates[0]}", tables)
        else:
            console.print(
                f"warning: the gallery has {len(candidates)} compound tables for this plate; only "
                "the plate map is joined"
            )
    return join_platemap(table, read_platemap(platemap), platemap, compounds)


def _repair(options: FetchConfig, locations: Locations) -> Locations:
    """Correct faults of the tables in the gallery, or report them.

    Raises:
        InputError: Two channels name the same file, and the correct files cannot be identified.
    """
    names = {channel: files for channel, (files, _) in locations.items()}
    if options.accession == gallery.IN_JUMP_METADATA and (
        note := gallery.order_note(options.source, names)
    ):
        console.print(f"warning: {note}")
    pair = gallery.find_duplicates(names)
    if pair is None:
        return locations
    listings: dict[str, list[str]] = {}
    repaired = dict(locations)
    # Only the file names of this accession can be repaired with a listing.
    can_list = options.accession == gallery.ACCESSIONS["cpg0012"][0]
    for channel in pair:
        files, folders = locations[channel]
        correct = []
        for name, folder in zip(files, folders, strict=True):
            key = _image_key(folder, options)
            if key not in listings:
                listings[key] = _list_folder(options, key) if can_list else []
            correct.append(gallery.find_cpg0012_file(name, channel, listings[key]))
        if None in correct:
            raise InputError(
                f"load_data.csv of {options.plate}: channels {pair[0]} and {pair[1]} name the same "
                f"file ({files.iloc[0]}); fetch one of them with --channels"
            )
        repaired[channel] = (pd.Series(correct), folders)
    console.print(
        f"info: load_data.csv names the same files for {pair[0]} and {pair[1]} "
        "(jump-cellpainting/datasets#33); repaired by the channel numbers in the file names"
    )
    return repaired


def _list_folder(options: FetchConfig, folder: str) -> list[str]:
    """Return the file names in a folder of the bucket. Source: S3 API, ListObjectsV2."""
    names: list[str] = []
    token = ""
    where = f"{redacted(options.base_url)}: the listing of {folder}"
    start = time.monotonic()
    for number in range(MAX_PAGES):
        parameters = {"list-type": "2", "prefix": f"{folder}/", "delimiter": "/"}
        if token:
            parameters["continuation-token"] = token
        page = options.out / "metadata" / ".listing"
        url = f"{options.base_url}/?{urllib.parse.urlencode(parameters)}"
        download(url, page, LARGEST_PAGE, start)
        content = page.read_bytes()
        page.unlink()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not UTF-8 text; check the server") from error
        # The keys of a page are XML; a pattern suffices, because keys contain no tags.
        names += [
            html.unescape(key).rpartition("/")[2] for key in re.findall("<Key>(.*?)</Key>", text)
        ]
        # A page has at most 1,000 keys; the token requests the next one.
        following = re.search("<NextContinuationToken>(.*?)</NextContinuationToken>", text)
        if following is None:
            return names
        if html.unescape(following[1]) == token:
            raise InputError(f"{where} repeats a page; check the server")
        token = html.unescape(following[1])
        if number % 100 == 99:
            console.print(f"info: {where}: {number + 1} pages, {len(names)} names")
    raise InputError(f"{where} has more than {MAX_PAGES} pages; check the server")


def _choose_sites(table: pd.DataFrame, options: FetchConfig, source: Path) -> pd.DataFrame:
    wells = names_in(options.wells)
    for well in wells:
        if well not in set(table[WELL]):
            raise InputError(f"--wells {well}: not found in {source}")
    if wells:
        table = table[table[WELL].isin(wells)]
    if options.sites:
        order = (
            # Rank of each site within its well, from 1.
            pd.to_numeric(table[SITE], errors="coerce").groupby(table[WELL]).rank(method="first")
        )
        table = table[order <= options.sites]
    return table.reset_index(drop=True)


def _first_table(options: FetchConfig, keys: list[str], folder: Path) -> Path:
    """Download the first existing table of several keys."""
    for key in keys[:-1]:
        try:
            return _table(options, key, folder)
        except NotThere:
            continue
    return _table(options, keys[-1], folder)


def _table(options: FetchConfig, key: str, folder: Path) -> Path:
    server = redacted(f"{options.base_url}/{options.root}")
    path = folder / require_file_name(key.rsplit("/", 1)[-1], server)
    if not path.is_file():
        download(
            f"{options.base_url}/{urllib.parse.quote(f'{options.root}/{key}')}", path, LARGEST_TABLE
        )
    return path


def _image_key(folder: str, options: FetchConfig) -> str:
    """Return the gallery key of a folder: its path from the batch on, whatever the machine.

    Raises:
        InputError: The path does not contain the batch, or leads to a parent folder.
    """
    parts = [part for part in folder.replace("\\", "/").split("/") if part]
    # A path with `..` could write outside of the output folder.
    if options.batch not in parts or ".." in parts:
        raise InputError(
            f"load_data.csv of {options.plate}: folder {folder!r} is not below batch "
            f"{options.batch}; no image is downloaded"
        )
    # Position of the last folder with the name of the batch.
    start = len(parts) - 1 - parts[::-1].index(options.batch)
    return "/".join([options.root, "images", *parts[start:]])


def require_file_name(name: str, where: str) -> str:
    """Return a name if it is a plain file name without folders, else raise InputError."""
    if name in ("", ".", "..") or any(sign in name for sign in "/\\:\0") or not name.isprintable():
        raise InputError(f"{where}: {name!r} is not a plain file name; no file is written")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise InputError(
            f"{where}: {name[:40]!r}… has more than {LONGEST_NAME} bytes; no file is written"
        )
    return name
