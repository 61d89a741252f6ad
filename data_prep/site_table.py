"""Read a JUMP-style load_data.csv into one validated row per site.

A row names one file per channel (`FileName_Orig<CHANNEL>` and `PathName_Orig<CHANNEL>`, or
`URL_Orig<CHANNEL>`) and describes the site (`Metadata_*`). Channels are identified by the names of
their columns, never by position. For files with several planes, `Series_Orig<CHANNEL>`,
`Channel_Orig<CHANNEL>` and `Frame_Orig<CHANNEL>` select one.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.file_columns import file_locations
from data_prep.platemap import join_platemap
from data_prep.platemap_files import read_platemap
from data_prep.shared_files import check_shared_files
from data_prep.sources import Plane, Project, stores, zarrs
from data_prep.sources.files import names_of_folder
from data_prep.sources.finder import FileFinder
from data_prep.sources.remote import redacted
from perturbjax.core.csv_tables import FIRST_ROW, read_table
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE, SITE, SOLVENT, WELL, normalize_wells, separate_batches

#: Default label columns; the first one in the table is used unless `--label-column` is given.
LABEL_COLUMNS = ("Metadata_pert_iname", "Metadata_broad_sample", "Metadata_moa")
#: Value of `--label-column` for sites without labels, which can only be predicted.
NO_LABEL = "none"
#: Columns that identify the treatment. Values of one may correspond to several values of another.
IDENTITY_COLUMNS = (
    "Metadata_pert_iname",
    "Metadata_broad_sample",
    "Metadata_InChIKey",
    "Metadata_moa",
    "Metadata_concentration_uM",
)
#: Prefix of the columns with the `Plane` of each channel.
FILE = "file_"
#: Columns that select an image and a plane of a file, counted from 0 (as in CellProfiler LoadData).
NUMBERS = {"Series": "series", "Frame": "frame"}


@dataclass(frozen=True)
class SiteTable:
    """All sites of a load_data.csv, in its order.

    Attributes:
        sites: `site_id` (unique), `row` (line of the CSV), every `Metadata_*` as text, and
            `file_<CHANNEL>` as a `Plane`, whose `file` is empty if the file does not exist.
        channels: Selected channels, in the requested order.
        source: The CSV, or the Zarr store that lists the sites.
        sha256: Checksum of each input file by its option; of the list of sites if a store has it.
    """

    sites: pd.DataFrame
    channels: tuple[str, ...]
    source: Path | str
    sha256: dict[str, str]

    def __len__(self) -> int:
        return len(self.sites)

    def where(self, row: Mapping[Any, Any]) -> str:
        """Name a site in messages: its row of the CSV, or its plate, well and site in the store."""
        if isinstance(self.source, Path):
            return f"{self.source}, row {row['row']}"
        return f"{self.source}, plate {row[PLATE]}, well {row[WELL]}, site {row[SITE]}"

    @property
    def metadata_columns(self) -> list[str]:
        """Names of the `Metadata_*` columns."""
        return [column for column in self.sites.columns if column.startswith("Metadata_")]


def read_sites(
    load_data: Path | None,
    images: Path | str,
    *,
    channels: Sequence[str] = (),
    also: Sequence[str] = (),
    platemap: Path | None = None,
    compounds: Path | None = None,
    must_exist: bool = True,
    project: Project = "none",
) -> SiteTable:
    """Read and validate a load_data.csv, or list the sites of a Zarr store.

    Args:
        load_data: CSV (`.gz` too) or parquet; None to use the list of sites in a Zarr store.
        images: Folder of relative paths (absolute paths of another machine are matched by their
            last folders), a Zarr store, or a folder of Zarr stores.
        channels: Channels to use, in this order; by default all.
        also: Channels that are added if `channels` does not contain them.
        platemap: Plate map (CSV, TSV or XLSX), joined by well, and by plate if it names plates.
        compounds: TSV with `broad_sample` and its annotations, joined by `broad_sample`.
        must_exist: Refuse tables that name missing files.
        project: Projection of a stack of planes.

    Raises:
        InputError: The table is missing, empty or malformed; a column, channel or file is missing;
            a plate, well or site is empty; two rows have the same plate, well and site; or rows
            with different folders resolve to one file.
    """
    images = str(images)
    source = redacted(images) if load_data is None else Path(load_data)
    table = stores.store_table(images) if load_data is None else read_table(load_data)
    if names_files := _names_files(table, images, load_data):
        file_locations(table, source)  # report missing columns of files before anything else
    sites = table[[column for column in table.columns if column.startswith("Metadata_")]].copy()
    sites.insert(0, "row", range(FIRST_ROW, FIRST_ROW + len(sites)))
    normalise_position(sites, source)
    written = sites.copy()
    if note := separate_batches([sites]):
        console.print(f"info: {source}: {note}")
    # PLATE_WELL_SITE is unique, as the next check ensures.
    sites.insert(0, "site_id", sites[PLATE] + "_" + sites[WELL] + "_" + sites[SITE])
    _refuse_duplicates(sites, source)
    if platemap is not None:
        sites = join_platemap(sites, read_platemap(platemap), platemap, compounds)
    elif compounds is not None:
        raise InputError("--compounds: is joined to the plate map; pass --platemap as well")

    resolve = _resolve_files if names_files else _resolve_stores
    available, files_of = resolve(table, written, images, source, must_exist)
    chosen = _select_channels(tuple(channels), tuple(also), available, source)
    for channel in chosen:
        selections = _selections(table, channel, source)
        sites[FILE + channel] = [
            Plane(file, project=project, **selection)
            for file, selection in zip(files_of(channel), selections, strict=True)
        ]
    if names_files:
        locations = {name: file_locations(table, source)[name] for name in chosen}
        planes = {name: list(sites[FILE + name]) for name in chosen}
        for warning in check_shared_files(locations, planes, source):
            console.print(f"warning: {warning}")
    files = {"load_data": load_data, "platemap": platemap, "compounds": compounds}
    # The checksums become part of the provenance of the dataset.
    sha256 = {name: file_digest(Path(path)) for name, path in files.items() if path}
    if load_data is None:
        # Without the column of paths, so that moving the store does not change the checksum.
        listing = table.drop(columns=stores.IMAGE).to_csv(index=False)
        sha256["images"] = hashlib.sha256(listing.encode()).hexdigest()
    return SiteTable(sites, chosen, source, sha256)


#: The available channels, and a function that returns the files of one of them, one per site.
ChannelFiles = tuple[tuple[str, ...], Callable[[str], list[str]]]


def _names_files(table: pd.DataFrame, images: str, load_data: Path | None) -> bool:
    """Return whether rows name files; otherwise sites are found in stores by plate, well, site."""
    if load_data is None or stores.is_store(images):
        return False
    # Columns with file names take precedence over stores of the same plate.
    if any(re.match("(FileName|URL)_", column) for column in table.columns):
        return True
    plates = table[PLATE] if PLATE in table.columns else []
    # Stores named by plate in the images folder.
    names = {f"{plate}{suffix}" for plate in plates for suffix in stores.SUFFIXES}
    return not names & set(names_of_folder(images))


def _resolve_files(
    table: pd.DataFrame, sites: pd.DataFrame, images: str, source: Path | str, must_exist: bool
) -> ChannelFiles:
    locations = file_locations(table, source)
    finder = FileFinder(images, must_exist)

    def files_of(channel: str) -> list[str]:
        names, folders = locations[channel]
        return [
            finder.find(folder, name, f"{source}, row {row}, channel {channel}")
            for row, folder, name in zip(sites["row"], folders, names, strict=True)
        ]

    return tuple(locations), files_of


def _resolve_stores(
    table: pd.DataFrame, sites: pd.DataFrame, images: str, source: Path | str, _: bool
) -> ChannelFiles:
    finder = stores.StoreFinder(images)
    files = (
        list(table[stores.IMAGE])
        if stores.IMAGE in table.columns
        else [finder.find(row, f"{source}, row {row['row']}") for row in sites.to_dict("records")]
    )
    prefix = "Channel_Orig"
    named = [name.removeprefix(prefix) for name in table.columns if name.startswith(prefix)]
    available = tuple(named or zarrs.channel_names(files[0], str(source)))
    if not available:
        raise InputError(
            f"{redacted(files[0])}: has no channel names; add columns Channel_Orig<CHANNEL> with "
            "channel "
            "numbers to the table of --load-data"
        )
    return available, lambda channel: files


def _select_channels(
    requested: tuple[str, ...],
    also: tuple[str, ...],
    available: tuple[str, ...],
    source: Path | str,
) -> tuple[str, ...]:
    chosen = requested or available
    for channel in chosen + also:
        if channel not in available:
            raise InputError(
                f"--channels {channel}: not found in {source} (available: {', '.join(available)})"
            )
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--channels {','.join(chosen)}: a channel occurs twice")
    # Without duplicates, in order.
    return tuple(dict.fromkeys(chosen + also))


def choose_label(sites: pd.DataFrame, label_column: str, load_data: Path | str) -> str:
    """Return the requested label column, or the first of `LABEL_COLUMNS` in the table.

    Returns:
        Name of the column; "" if `label_column` is `NO_LABEL`.

    Raises:
        InputError: The column is missing, no column qualifies, or a site has no value in it.
    """
    if label_column == NO_LABEL:
        return ""
    columns = [column for column in sites.columns if column.startswith("Metadata_")]
    available = ", ".join(columns)
    if not label_column:
        label_column = next((column for column in LABEL_COLUMNS if column in columns), "")
    if not label_column:
        raise InputError(
            f"{load_data}: no label column ({', '.join(LABEL_COLUMNS)}); choose one with "
            f"--label-column (available: {available}), join --platemap and --compounds, or pass "
            f"--label-column {NO_LABEL} for sites that are only predicted"
        )
    if label_column not in columns:
        if isinstance(load_data, Path) and label_column in read_table(load_data).columns:
            raise InputError(
                f"--label-column {label_column}: columns of {load_data} that describe a site begin "
                f"with Metadata_; rename it there to Metadata_{label_column}"
            )
        similar = difflib.get_close_matches(label_column, columns, 1)
        hint = f". Did you mean {similar[0]}?" if similar else ""
        raise InputError(
            f"--label-column {label_column}: not found in {load_data} (available: "
            f"{available}){hint}"
        )
    empty = sites.loc[sites[label_column] == "", "row"]
    if len(empty):
        raise InputError(
            f"{load_data}, row {empty.iloc[0]}: {label_column} is empty or NA ({len(empty)} rows "
            f"in total); fill it in ({SOLVENT} for the solvent), join --platemap, or choose "
            f"another --label-column ({NO_LABEL} for sites that are only predicted)"
        )
    return label_column


def merged_identities(sites: pd.DataFrame, label_column: str) -> list[str]:
    """Describe labels that merge several values of another identity column."""
    notes: list[str] = []
    for column in IDENTITY_COLUMNS if label_column else ():
        if column == label_column or column not in sites.columns:
            continue
        # Number of different values of the column for each label.
        values = sites[sites[column] != ""].groupby(label_column)[column].nunique()
        several = values[values > 1]
        if len(several):
            examples = ", ".join(f"{label} ({count})" for label, count in several.head(4).items())
            notes.append(
                f"{label_column} merges several {column} in {len(several)} of its classes: "
                f"{examples}"
            )
    return notes


def _selections(table: pd.DataFrame, channel: str, source: Path | str) -> list[dict[str, Any]]:
    """Return the fields of `Plane` by which each row selects a plane of its file.

    Raises:
        InputError: A series or a frame is not a number.
    """
    empty = pd.Series("", index=table.index)

    def column(kind: str) -> pd.Series:
        # Both spellings of CellProfiler tables are accepted.
        return table.get(f"{kind}_Orig{channel}", table.get(f"{kind}_{channel}", empty))

    selections: list[dict[str, Any]] = [{"channel": name or channel} for name in column("Channel")]
    for kind, field in NUMBERS.items():
        for row, (text, selection) in enumerate(
            zip(column(kind), selections, strict=True), FIRST_ROW
        ):
            if text and not re.fullmatch("[0-9]{1,9}", text):
                raise InputError(
                    f"{source}, row {row}: {kind}_Orig{channel} is {text!r}; it must be a number "
                    "from 0"
                )
            selection[field] = int(text) if text else None
    return selections


def normalise_position(sites: pd.DataFrame, source: Path | str) -> None:
    """Normalize the spelling of wells and sites in place: `a1` to `A01`, site `01` to `1`.

    Raises:
        InputError: The column of plate, well or site is missing, or empty in a row; or a plate has
            wells with and without quadrant.
    """
    for column in (PLATE, WELL, SITE):
        if column not in sites.columns:
            raise InputError(f"{source}: column {column} is missing")
        empty = sites.loc[sites[column] == "", "row"]
        if len(empty):
            raise InputError(f"{source}, row {empty.iloc[0]}: {column} is empty")
    sites[WELL] = normalize_wells(sites[WELL], sites[PLATE], source)
    sites[SITE] = sites[SITE].map(
        # Numbers only; other names of sites remain unchanged. int() removes leading zeros.
        lambda site: str(int(site)) if re.fullmatch("[0-9]{1,18}", site) else site
    )


def _refuse_duplicates(sites: pd.DataFrame, source: Path | str) -> None:
    # `keep=False` marks all rows of a duplicate, so that the message can name two of them.
    repeated = sites[sites["site_id"].duplicated(keep=False)]
    if len(repeated):
        first = repeated.iloc[0]
        rows = repeated.loc[repeated["site_id"] == first["site_id"], "row"]
        raise InputError(
            f"{source}, rows {rows.iloc[0]} and {rows.iloc[1]}: both are plate {first[PLATE]}, "
            f"well {first[WELL]}, site {first[SITE]}; a site may occur only once. Plates of one "
            "name in different batches need a column Metadata_Batch"
        )
