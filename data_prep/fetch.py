"""`perturbjax fetch`: a plate of the public Cell Painting Gallery, over plain HTTPS.

Where things lie there, and what is known to be wrong, stands in `gallery.py`.
"""

from __future__ import annotations

import fcntl
import html
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from data_prep import gallery_listing as gallery
from data_prep.csv_tables import read_table
from data_prep.download import NotThere, download, download_if_there, in_parallel
from data_prep.gallery_listing import GALLERY
from data_prep.platemap import join_platemap
from data_prep.site_table import FILE_COLUMN_PATTERN, file_locations, normalise_position
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder
from perturbjax.core.messages import console
from perturbjax.core.options import names_in, python_only, require, require_output, require_sound
from perturbjax.core.plates import SITE, WELL
from perturbjax.core.progress import track


@dataclass(frozen=True)
class FetchConfig:
    """Download a plate of the public Cell Painting Gallery."""

    plate: str
    """Plate barcode, such as BR00116991."""
    out: Path
    """Folder for images/PLATE/ and load_data.csv. The same command resumes an interrupted download."""
    accession: str = "cpg0000"
    """Data set of the gallery: a number (cpg0000, cpg0016) or its full name."""
    source: str = ""
    """Imaging site, such as source_4; by default the only one."""
    batch: str = ""
    """Imaging batch; by default 2020_11_04_CPJUMP1 for cpg0000."""
    channels: str = ""
    """Channels to download, separated by commas; by default all."""
    wells: str = ""
    """Wells to download, separated by commas; by default all."""
    sites: int = 0
    """Sites to download for each well, lowest numbers first; 0: all."""
    illumination: bool = False
    """Download the illumination functions into illum/PLATE/ too, for build --illumination."""
    tables_only: bool = False
    """Download no images; build --images s3://cellpainting-gallery reads them."""
    downloads: int = python_only(8, env="PERTURBJAX_DOWNLOADS")
    """Number of simultaneous downloads."""
    base_url: str = python_only(GALLERY, env="PERTURBJAX_GALLERY_URL")
    """URL of the gallery, without the last slash."""
    jump_metadata_url: str = python_only("", env="PERTURBJAX_JUMP_METADATA_URL")
    """URL of JUMP's well and compound tables for cpg0016; empty: JUMP's repository."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("sites", self.sites, self.sites >= 0, "0 (all) or more")
        require("downloads", self.downloads, self.downloads >= 1, "at least 1")

    @property
    def root(self) -> str:
        """What all keys of the source begin with."""
        return f"{self.accession}/{self.source}"


def fetch(options: FetchConfig) -> None:
    """Fetch images, then write load_data.csv with what each well got: it is there only when all files are.

    Sites of which the gallery has not every image are left out of the table, told of, and listed in missing_images.csv.

    Raises:
        InputError: the plate, a channel or a well is unknown, the gallery cannot be reached, or the output cannot
            be written.
    """
    accession, source, batch = gallery.named(options.accession, options.source, options.batch)
    options = replace(options, accession=accession, source=source, batch=batch)
    for flag in ("plate", "accession", "source", "batch"):
        _plain_name(getattr(options, flag), f"--{flag}")
    make_folder(options.out)
    with _alone(options.out):
        _fetch(options)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One fetch at a time into a folder, so that what a killed one left half-written may go.

    Raises:
        InputError: another fetch is at work there.
    """
    with open(out / ".fetching", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"--out {out}: another fetch is at work there; wait for it") from error
        for half in [path for pattern in (".*.tmp.*", ".*.tmp") for path in out.rglob(pattern)]:
            half.unlink(missing_ok=True)
        yield
        (out / ".fetching").unlink(missing_ok=True)


def _plain_name(name: str, where: str) -> str:
    """The name, if it is one of a file and names no folder.

    Raises:
        InputError: it is not.
    """
    if name in ("", ".", "..") or any(sign in name for sign in "/\\:\0") or not name.isprintable():
        raise InputError(f"{where}: {name!r} is no plain file name; nothing is written under it")
    return name


def _fetch(options: FetchConfig) -> None:
    table, locations = _plate_table(options)
    for channel, (names, _) in locations.items():
        for row, name in enumerate(names, 1):
            _plain_name(name, f"load_data.csv of {options.plate}, site {row}, channel {channel}")
    keys = {
        channel: [_image_key(folder, options) for folder in folders]
        for channel, (_, folders) in locations.items()
    }
    if options.illumination:
        _illumination(options, locations)
    if options.tables_only:
        _write_table(options, table, locations, keys)
        at = "s3://cellpainting-gallery" if options.base_url == GALLERY else options.base_url
        console.print(
            f"{options.out}: {len(table)} sites; build --load-data {options.out / 'load_data.csv'} --images {at}"
        )
        return
    table, locations, received = _images(options, table, locations, keys)
    folder = f"images/{options.plate}"
    _write_table(
        options, table, locations, {channel: [folder] * len(table) for channel in locations}
    )
    count = len(table) * len(locations)
    console.print(
        f"{options.out}: {len(table)} sites, {count} images ({received / 1e9:.2f} GB received)"
    )


#: Channel → (file names, folders), one a site.
Locations = dict[str, tuple[pd.Series, pd.Series]]


def _images(
    options: FetchConfig, table: pd.DataFrame, locations: Locations, keys: dict[str, list[str]]
) -> tuple[pd.DataFrame, Locations, int]:
    """Fetch the images; the sites that have all of them, and the bytes received."""
    images = make_folder(options.out / "images" / options.plate)
    wanted = {
        images / name: f"{options.base_url}/{urllib.parse.quote(f'{key}/{name}')}"
        for channel, (names, _) in locations.items()
        for name, key in zip(names, keys[channel], strict=True)
    }
    missing = {path: url for path, url in wanted.items() if not path.is_file()}
    if len(missing) < len(wanted):
        console.print(
            f"resuming: {len(wanted) - len(missing)} of {len(wanted)} images are already there"
        )
    results = in_parallel(
        lambda item: download_if_there(item[1], item[0]), missing.items(), options.downloads
    )
    followed = track(
        results, total=len(wanted), label="fetching", unit="images", done=len(wanted) - len(missing)
    )
    sizes = dict(zip(missing, followed, strict=True))
    whole = pd.Series(True, index=table.index)
    for names, _ in locations.values():
        whole &= pd.Series(
            [sizes.get(images / name) is not None or images / name not in sizes for name in names]
        )
    gone = {path: wanted[path] for path, size in sizes.items() if size is None}
    _tell_missing(options, gone, table, whole)
    kept: Locations = {
        channel: (names[whole].reset_index(drop=True), folders[whole].reset_index(drop=True))
        for channel, (names, folders) in locations.items()
    }
    return table[whole].reset_index(drop=True), kept, sum(size or 0 for size in sizes.values())


def _tell_missing(
    options: FetchConfig, gone: dict[Path, str], table: pd.DataFrame, whole: pd.Series
) -> None:
    """Say which sites are left out since the gallery lacks images of them (jump-cellpainting/datasets#78)."""
    listed = options.out / "missing_images.csv"
    if not gone:
        listed.unlink(missing_ok=True)
        return
    if not whole.any():
        raise InputError(
            f"{next(iter(gone.values()))}: no site has all its images there (HTTP 404); check --plate"
        )
    with atomic(listed) as temporary:
        pd.DataFrame({"url": list(gone.values())}).to_csv(temporary, index=False)
    first = table[~whole].iloc[0]
    console.print(
        f"note: {int((~whole).sum())} of {len(table)} sites lack images at the gallery ({len(gone)}, the first of "
        f"well {first[WELL]}, site {first[SITE]}); they are left out, see {listed}"
    )


def _write_table(
    options: FetchConfig, table: pd.DataFrame, locations: Locations, paths: dict[str, list[str]]
) -> None:
    for channel, (names, _) in locations.items():
        table[f"FileName_Orig{channel}"] = list(names)
        table[f"PathName_Orig{channel}"] = paths[channel]
    with atomic(options.out / "load_data.csv") as temporary:
        table.to_csv(temporary, index=False)


def _illumination(options: FetchConfig, locations: Locations) -> None:
    """The plate's functions; a channel that has none is told of."""
    folder = make_folder(options.out / "illum" / options.plate)
    for channel in locations:
        name = _plain_name(f"{options.plate}_Illum{channel}.npy", "load_data.csv")
        key = f"{options.root}/images/{options.batch}/illum/{options.plate}/{name}"
        if (
            download_if_there(f"{options.base_url}/{urllib.parse.quote(key)}", folder / name)
            is None
        ):
            console.print(
                f"note: the gallery has no illumination function of channel {channel} of {options.plate}"
            )


def _plate_table(options: FetchConfig) -> tuple[pd.DataFrame, Locations]:
    """The chosen sites with all metadata, and where their files lie."""
    tables = make_folder(options.out / "metadata")
    folder = f"workspace/load_data_csv/{options.batch}/{options.plate}"
    original = _first_table(
        options, [f"{folder}/load_data.csv", f"{folder}/load_data.csv.gz"], tables
    )
    table = read_table(original)
    table.insert(0, "row", range(2, 2 + len(table)))
    normalise_position(table, original)
    table = _choose_sites(table, options, original)
    if options.accession == gallery.IN_JUMP_METADATA:
        joined = _of_jump(table, options, tables)
    else:
        joined = _of_platemap(table, options, tables)
    locations = file_locations(joined, original)
    chosen = names_in(options.channels) or tuple(locations)
    for channel in chosen:
        if channel not in locations:
            raise InputError(
                f"--channels {channel}: the plate has no such channel; it has {', '.join(locations)}"
            )
    found = _checked(options, {channel: locations[channel] for channel in chosen})
    kept = [
        column
        for column in joined.columns
        if not FILE_COLUMN_PATTERN.match(column) and column != "row"
    ]
    return joined[kept].copy(), found


def _of_jump(table: pd.DataFrame, options: FetchConfig, tables: Path) -> pd.DataFrame:
    for name in gallery.JUMP_TABLES:
        if not (tables / name).is_file():
            download(f"{options.jump_metadata_url or gallery.JUMP_METADATA}/{name}", tables / name)
    joined, unknown = gallery.jump_perturbations(tables, table, options.source)
    if unknown:
        console.print(
            f"note: {len(unknown)} wells have images and stand in no table of JUMP's ({', '.join(unknown[:8])}"
            f"{' …' if len(unknown) > 8 else ''}); nobody knows what they got, and they are left out"
        )
    if joined.empty:
        raise InputError(f"--plate {options.plate}: JUMP's tables know none of the chosen wells")
    return joined


def _of_platemap(table: pd.DataFrame, options: FetchConfig, tables: Path) -> pd.DataFrame:
    maps = f"workspace/metadata/platemaps/{options.batch}"
    barcodes_file = _table(options, f"{maps}/barcode_platemap.csv", tables)
    barcodes = read_table(barcodes_file)
    for column in ("Assay_Plate_Barcode", "Plate_Map_Name"):
        if column not in barcodes.columns:
            raise InputError(
                f"{barcodes_file}: column {column} is missing; delete the file and try again"
            )
    names = barcodes.loc[barcodes["Assay_Plate_Barcode"] == options.plate, "Plate_Map_Name"]
    if names.empty:
        raise InputError(
            f"--plate {options.plate}: is not in {barcodes_file.name} of batch {options.batch}"
        )
    name = _plain_name(names.iloc[0], f"{barcodes_file}, Plate_Map_Name")
    platemap = _table(options, f"{maps}/platemap/{name}.txt", tables)
    external = "workspace/metadata/external_metadata"
    try:
        compounds = _table(
            options, f"{external}/{name.replace('_platemap', '_metadata')}.tsv", tables
        )
    except NotThere:
        others = [
            found
            for found in _listed(options, f"{options.root}/{external}")
            if found.endswith(".tsv")
        ]
        if len(others) != 1:
            console.print(
                f"note: the gallery has {len(others)} tables of compounds for this plate; platemap alone is joined"
            )
            return join_platemap(table, read_table(platemap, sep="\t"), platemap, None)
        compounds = _table(options, f"{external}/{others[0]}", tables)
    return join_platemap(table, read_table(platemap, sep="\t"), platemap, compounds)


def _checked(options: FetchConfig, locations: Locations) -> Locations:
    """The files of the channels, what is known to be wrong mended or told of.

    Raises:
        InputError: two channels name the same file, and it cannot be told whose it is.
    """
    names = {channel: files for channel, (files, _) in locations.items()}
    if options.accession == gallery.IN_JUMP_METADATA and (
        note := gallery.order_note(options.source, names)
    ):
        console.print(f"note: {note}")
    pair = gallery.twins(names)
    if pair is None:
        return locations
    listings: dict[str, list[str]] = {}
    mended = dict(locations)
    for channel in pair:
        files, folders = locations[channel]
        found = []
        for name, folder in zip(files, folders, strict=True):
            key = _image_key(folder, options)
            if key not in listings:
                listings[key] = (
                    _listed(options, key)
                    if options.accession == gallery.ACCESSIONS["cpg0012"][0]
                    else []
                )
            found.append(gallery.untwinned(name, channel, listings[key]))
        if None in found:
            raise InputError(
                f"load_data.csv of {options.plate}: channels {pair[0]} and {pair[1]} name the same file "
                f"({files.iloc[0]}); fetch one of them, with --channels"
            )
        mended[channel] = (pd.Series(found), folders)
    console.print(
        f"note: load_data.csv names the same files for {pair[0]} and {pair[1]} (jump-cellpainting/datasets#33); mended "
        "by the numbers in the names of the files that are there"
    )
    return mended


def _listed(options: FetchConfig, folder: str) -> list[str]:
    """Names of the files in a folder of the bucket (S3's ListObjectsV2)."""
    found: list[str] = []
    token = ""
    while True:
        asked = {"list-type": "2", "prefix": f"{folder}/", "delimiter": "/"}
        query = urllib.parse.urlencode(
            {**asked, **({"continuation-token": token} if token else {})}
        )
        page = options.out / "metadata" / ".listing"
        download(f"{options.base_url}/?{query}", page)
        text = page.read_text()
        page.unlink()
        found += [
            html.unescape(key).rpartition("/")[2] for key in re.findall("<Key>(.*?)</Key>", text)
        ]
        following = re.search("<NextContinuationToken>(.*?)</NextContinuationToken>", text)
        if following is None:
            return found
        token = html.unescape(following[1])


def _choose_sites(table: pd.DataFrame, options: FetchConfig, source: Path) -> pd.DataFrame:
    wells = names_in(options.wells)
    for well in wells:
        if well not in set(table[WELL]):
            raise InputError(f"--wells {well}: {source} has no such well")
    if wells:
        table = table[table[WELL].isin(wells)]
    if options.sites:
        order = (
            pd.to_numeric(table[SITE], errors="coerce").groupby(table[WELL]).rank(method="first")
        )
        table = table[order <= options.sites]
    return table.reset_index(drop=True)


def _first_table(options: FetchConfig, keys: list[str], folder: Path) -> Path:
    """The first table of several names that is there."""
    for key in keys[:-1]:
        try:
            return _table(options, key, folder)
        except NotThere:
            continue
    return _table(options, keys[-1], folder)


def _table(options: FetchConfig, key: str, folder: Path) -> Path:
    path = folder / _plain_name(key.rsplit("/", 1)[-1], f"{options.base_url}/{options.root}")
    if not path.is_file():
        download(f"{options.base_url}/{urllib.parse.quote(f'{options.root}/{key}')}", path)
    return path


def _image_key(folder: str, options: FetchConfig) -> str:
    """Key of the folder a row names: the path that follows the batch, whatever machine it was written on.

    Raises:
        InputError: the path does not name the batch.
    """
    parts = [part for part in folder.replace("\\", "/").split("/") if part]
    if options.batch not in parts:
        raise InputError(
            f"load_data.csv of {options.plate}: folder {folder!r} does not name batch {options.batch}"
        )
    return "/".join(
        [options.root, "images", *parts[len(parts) - 1 - parts[::-1].index(options.batch) :]]
    )
