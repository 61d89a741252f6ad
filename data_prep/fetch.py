"""`perturbjax fetch`: a plate of the JUMP pilot from the public Cell Painting Gallery, over plain HTTPS.

The gallery's layout (its documentation: https://broadinstitute.github.io/cellpainting-gallery/data_structure.html),
below `cpg0000-jump-pilot/source_4`:

    workspace/load_data_csv/BATCH/PLATE/load_data.csv
    workspace/metadata/platemaps/BATCH/barcode_platemap.csv          plate → name of its platemap
    workspace/metadata/platemaps/BATCH/platemap/NAME.txt             well → broad_sample
    workspace/metadata/external_metadata/….tsv                       broad_sample → compound
    images/BATCH/images/PLATE__DATE-Measurement1/Images/….tiff       named by the load_data.csv
"""

from __future__ import annotations

import fcntl
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep.platemap import join_platemap
from data_prep.sites import FILE_COLUMN_PATTERN, file_locations, normalise_position
from data_prep.tables import read_table
from perturbjax.console import InputError, console, names_in, require, require_output, require_sound, track
from perturbjax.files import atomic, make_folder
from perturbjax.plates import SITE, WELL

GALLERY = "https://cellpainting-gallery.s3.amazonaws.com"
SOURCE = "cpg0000-jump-pilot/source_4"
#: Tries for each file, seconds before the second one (doubled each time), seconds without a byte that end a try.
TRIES, PAUSE_S, TIMEOUT_S = 5, 1.0, 60.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class FetchConfig:
    """A plate from the public Cell Painting Gallery.

    perturbjax fetch --plate BR00116991 --out plate
    perturbjax fetch --plate BR00116991 --out plate --wells A01,A02 --sites 1
    """

    plate: str
    """Barcode, as BR00116991."""
    out: Path
    """Folder for images/PLATE/ and load_data.csv; run again to go on after a stop."""
    batch: str = "2020_11_04_CPJUMP1"
    """Batch the plate was imaged in."""
    channels: str = ""
    """Names of the channels to fetch, with commas; empty takes all the plate has."""
    wells: str = ""
    """Wells to fetch, with commas; empty takes all."""
    sites: int = 0
    """Sites to fetch of each well, the lowest numbers first; 0 takes all."""
    downloads: int = 8
    """Files fetched at the same time."""
    base_url: str = GALLERY
    """Where the gallery is served, without its last slash."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("sites", self.sites, self.sites >= 0, "0 (all) or more")
        require("downloads", self.downloads, self.downloads >= 1, "at least one")


def fetch(options: FetchConfig) -> None:
    """Fetch images, then write load_data.csv with what each well got: it is there only when all files are.

    Raises:
        InputError: the plate, a channel or a well is unknown, the gallery cannot be reached, or the output cannot
            be written.
    """
    _plain_name(options.plate, "--plate")
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
    images = make_folder(options.out / "images" / options.plate)
    wanted = {
        images / name: f"{options.base_url}/{urllib.parse.quote(f'{_image_key(folder, options)}/{name}')}"
        for names, folders in locations.values()
        for name, folder in zip(names, folders, strict=True)
    }
    missing = {path: url for path, url in wanted.items() if not path.is_file()}
    if len(missing) < len(wanted):
        console.print(f"resuming: {len(wanted) - len(missing)} of {len(wanted)} images are already there")
    results = _in_parallel(lambda item: download(item[1], item[0]), missing.items(), options.downloads)
    received = sum(track(results, total=len(wanted), label="fetching", unit="images", done=len(wanted) - len(missing)))
    for channel, (names, _) in locations.items():
        table[f"FileName_Orig{channel}"] = names
        table[f"PathName_Orig{channel}"] = f"images/{options.plate}"
    with atomic(options.out / "load_data.csv") as temporary:
        table.to_csv(temporary, index=False)
    console.print(f"{options.out}: {len(table)} sites, {len(wanted)} images ({received / 1e9:.2f} GB received)")


def download(url: str, path: Path) -> int:
    """Fetch a file under its final name, whole or not at all; tries again after what may pass. Its bytes.

    Raises:
        InputError: there is no such file, or no try succeeded.
    """
    pause = PAUSE_S
    for attempt in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply, atomic(path) as temporary:
                return _copy(reply, temporary)
        except urllib.error.HTTPError as error:
            error.close()  # it is the reply, too
            reason = f"HTTP {error.code}"
            if error.code in (400, 401, 403, 404, 410):
                raise InputError(
                    f"{url}: cannot be fetched ({reason}); check --plate, --batch and --base-url"
                ) from error
        except (OSError, EOFError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        if attempt < TRIES:
            time.sleep(pause)
            pause *= 2
    raise InputError(f"{url}: cannot be fetched after {TRIES} tries ({reason}); run the same command again to go on")


def _copy(reply, path: Path) -> int:
    """Write a reply to a file and hold it to the length it announced."""
    announced = reply.headers.get("Content-Length")
    with open(path, "wb") as file:
        while chunk := _read(reply):
            file.write(chunk)
        size = file.tell()
    if announced is not None and str(size) != announced.strip():
        raise EOFError(f"{size} of {announced} bytes came")
    return size


def _read(reply) -> bytes:
    try:
        return reply.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:  # told apart from a disk that is full
        raise EOFError(f"the connection broke: {error}") from error


def _plate_table(options: FetchConfig) -> tuple[pd.DataFrame, dict[str, tuple[pd.Series, pd.Series]]]:
    """The chosen sites with all metadata, and channel → (file names, folders)."""
    tables = make_folder(options.out / "metadata")
    original = _table(options, f"workspace/load_data_csv/{options.batch}/{options.plate}/load_data.csv", tables)
    table = read_table(original)
    table.insert(0, "row", range(2, 2 + len(table)))
    normalise_position(table, original)
    table = _choose_sites(table, options, original)
    locations = file_locations(table, original)
    chosen = names_in(options.channels) or tuple(locations)
    for channel in chosen:
        if channel not in locations:
            raise InputError(f"--channels {channel}: the plate has no such channel; it has {', '.join(locations)}")

    maps = f"workspace/metadata/platemaps/{options.batch}"
    barcodes_file = _table(options, f"{maps}/barcode_platemap.csv", tables)
    barcodes = read_table(barcodes_file)
    for column in ("Assay_Plate_Barcode", "Plate_Map_Name"):
        if column not in barcodes.columns:
            raise InputError(f"{barcodes_file}: column {column} is missing; delete the file and try again")
    names = barcodes.loc[barcodes["Assay_Plate_Barcode"] == options.plate, "Plate_Map_Name"]
    if names.empty:
        raise InputError(f"--plate {options.plate}: is not in {barcodes_file.name} of batch {options.batch}")
    name = _plain_name(names.iloc[0], f"{barcodes_file}, Plate_Map_Name")
    platemap = _table(options, f"{maps}/platemap/{name}.txt", tables)
    external = name.replace("_platemap", "_metadata")
    compounds = _table(options, f"workspace/metadata/external_metadata/{external}.tsv", tables)
    joined = join_platemap(table, read_table(platemap, sep="\t"), platemap, compounds)
    kept = [column for column in joined.columns if not FILE_COLUMN_PATTERN.match(column) and column != "row"]
    return joined[kept].copy(), {channel: locations[channel] for channel in chosen}


def _choose_sites(table: pd.DataFrame, options: FetchConfig, source: Path) -> pd.DataFrame:
    wells = names_in(options.wells)
    for well in wells:
        if well not in set(table[WELL]):
            raise InputError(f"--wells {well}: {source} has no such well")
    if wells:
        table = table[table[WELL].isin(wells)]
    if options.sites:
        order = pd.to_numeric(table[SITE], errors="coerce").groupby(table[WELL]).rank(method="first")
        table = table[order <= options.sites]
    return table.reset_index(drop=True)


def _table(options: FetchConfig, key: str, folder: Path) -> Path:
    path = folder / _plain_name(key.rsplit("/", 1)[-1], f"{options.base_url}/{SOURCE}")
    if not path.is_file():
        download(f"{options.base_url}/{urllib.parse.quote(f'{SOURCE}/{key}')}", path)
    return path


def _image_key(folder: str, options: FetchConfig) -> str:
    """Key of the folder a row names: the path that follows the batch, whatever machine it was written on.

    Raises:
        InputError: the path does not name the batch.
    """
    parts = [part for part in folder.replace("\\", "/").split("/") if part]
    if options.batch not in parts:
        raise InputError(f"load_data.csv of {options.plate}: folder {folder!r} does not name batch {options.batch}")
    return "/".join([SOURCE, "images", *parts[len(parts) - 1 - parts[::-1].index(options.batch) :]])


def _in_parallel(function: Callable, items, threads: int) -> Iterator[int]:
    """Results in order, a bounded number of items ahead; the first failure ends it."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future] = deque()
        try:
            for item in items:
                if len(pending) >= 4 * threads:
                    yield pending.popleft().result()
                pending.append(pool.submit(function, item))
            while pending:
                yield pending.popleft().result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise
