"""From a JUMP-style load_data.csv to one validated row per site.

A row names one file per channel (`FileName_Orig<CHANNEL>`, `PathName_Orig<CHANNEL>`, or `URL_Orig<CHANNEL>`) and what
is known of the site (`Metadata_*`). Channels are found by the name in their column, never by their position. Where a
file holds several, `Series_Orig<CHANNEL>`, `Channel_Orig<CHANNEL>` and `Frame_Orig<CHANNEL>` say what is meant.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.csv_tables import FIRST_ROW, SOLVENT, read_table
from data_prep.platemap import join_platemap
from data_prep.sources import Plane, Project, stores, zarrs
from data_prep.sources.files import names_of_folder
from data_prep.sources.finder import FileFinder
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.core.plates import PLATE, SITE, WELL, normalize_well

#: The label is the first of these that a table has, unless `--label-column` says otherwise.
LABEL_COLUMNS = ("Metadata_pert_iname", "Metadata_broad_sample", "Metadata_moa")
#: What `--label-column` says of sites that have no label: they can be predicted.
NO_LABEL = "none"
#: Columns that each claim to say which perturbation it was; one may have several values where another has one.
IDENTITY_COLUMNS = (
    "Metadata_pert_iname",
    "Metadata_broad_sample",
    "Metadata_InChIKey",
    "Metadata_moa",
    "Metadata_concentration_uM",
)
#: Prefix of the columns this module adds: where each channel lies, as a `Plane`.
FILE = "file_"
#: Columns that name files, as (pattern before the channel, what they hold), the first kind found being used.
FILE_COLUMNS = (("FileName_Orig", "name"), ("URL_Orig", "url"), ("FileName_(?!Illum)", "name"))
FILE_COLUMN_PATTERN = re.compile("(FileName|PathName|URL|Series|Frame|Channel)_")
#: Columns that say which image and which plane of a file is meant (CellProfiler's LoadData has the same), from 0.
NUMBERS = {"Series": "series", "Frame": "frame"}


@dataclass(frozen=True)
class SiteTable:
    """All sites of a load_data.csv, in its order.

    Attributes:
        sites: `site_id` (unique), `row` (line in the CSV), every `Metadata_*` as text, `file_<CHANNEL>` as a `Plane`,
            whose file is empty where there is none.
        channels: the channels asked for, in the order asked for.
        source: the CSV, or the store whose sites these are.
        sha256: of each file it was read from, by the flag that names it; of the list of sites where a store gave it.
    """

    sites: pd.DataFrame
    channels: tuple[str, ...]
    source: Path | str
    sha256: dict[str, str]

    def __len__(self) -> int:
        return len(self.sites)

    def where(self, row: Mapping[Any, Any]) -> str:
        """What messages call a site by: its row of the CSV, or its place in the store."""
        if isinstance(self.source, Path):
            return f"{self.source}, row {row['row']}"
        return f"{self.source}, plate {row[PLATE]}, well {row[WELL]}, site {row[SITE]}"

    @property
    def metadata_columns(self) -> list[str]:
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
    """Read and validate a load_data.csv, or the list of sites that a Zarr store of plates has.

    Args:
        load_data: the CSV (`.gz` too), or parquet; None where a store says itself which sites there are.
        images: folder that relative paths start from; absolute paths of another machine are looked for below it. Or a
            Zarr store, or a folder of them: sites are found in it by plate, well and site.
        channels: names to use, in this order; empty takes all there are.
        also: names that must be among them, and are added where they are not.
        platemap: TSV with `well_position` and `broad_sample`, joined on the well.
        compounds: TSV with `broad_sample` and what is known of it, joined on `broad_sample`.
        must_exist: every file of every row must be there.
        project: how a stack of planes becomes one.

    Raises:
        InputError: the CSV is missing, empty or malformed; a column, a channel or a file is missing; a plate, well or
            site is empty; two rows are the same (plate, well, site).
    """
    images = str(images)
    source = images if load_data is None else Path(load_data)
    table = stores.store_table(images) if load_data is None else read_table(load_data)
    if names_files := _names_files(table, images, load_data):
        file_locations(table, source)  # a table that names none is told of first
    sites = table[[column for column in table.columns if column.startswith("Metadata_")]].copy()
    sites.insert(0, "row", range(FIRST_ROW, FIRST_ROW + len(sites)))
    normalise_position(sites, source)
    sites.insert(0, "site_id", sites[PLATE] + "_" + sites[WELL] + "_" + sites[SITE])
    _refuse_duplicates(sites, source)
    if platemap is not None:
        sites = join_platemap(sites, read_table(platemap, sep="\t"), platemap, compounds)
    elif compounds is not None:
        raise InputError("--compounds: is joined to the platemap; give --platemap as well")

    find = _in_files if names_files else _in_stores
    available, place = find(table, sites, images, source, must_exist)
    chosen = _choose(tuple(channels), tuple(also), available, source)
    for channel in chosen:
        sites[FILE + channel] = [
            Plane(file, project=project, **selection)
            for file, selection in zip(
                place(channel), _selections(table, channel, source), strict=True
            )
        ]
    files = {"load_data": load_data, "platemap": platemap, "compounds": compounds}
    sha256 = {name: file_digest(Path(path)) for name, path in files.items() if path}
    if load_data is None:
        sha256["images"] = hashlib.sha256(
            table.drop(columns=stores.IMAGE).to_csv(index=False).encode()
        ).hexdigest()
    return SiteTable(sites, chosen, source, sha256)


#: Channels that there are, and what gives the file of each site for one of them.
Places = tuple[tuple[str, ...], Callable[[str], list[str]]]


def _names_files(table: pd.DataFrame, images: str, load_data: Path | None) -> bool:
    """Whether rows name files; else sites are looked for in stores, by plate, well and site."""
    if load_data is None or stores.is_store(images):
        return False
    if any(re.match("(FileName|URL)_", column) for column in table.columns):
        return True
    plates = table[PLATE] if PLATE in table.columns else []
    return not {f"{plate}.zarr" for plate in plates} & set(names_of_folder(images))


def _in_files(
    table: pd.DataFrame, sites: pd.DataFrame, images: str, source: Path | str, must_exist: bool
) -> Places:
    locations = file_locations(table, source)
    finder = FileFinder(images, must_exist)

    def place(channel: str) -> list[str]:
        names, folders = locations[channel]
        return [
            finder.find(folder, name, f"{source}, row {row}, channel {channel}")
            for row, folder, name in zip(sites["row"], folders, names, strict=True)
        ]

    return tuple(locations), place


def _in_stores(
    table: pd.DataFrame, sites: pd.DataFrame, images: str, source: Path | str, _: bool
) -> Places:
    finder = stores.StoreFinder(images)
    files = (
        list(table[stores.IMAGE])
        if stores.IMAGE in table.columns
        else [finder.find(row, f"{source}, row {row['row']}") for row in sites.to_dict("records")]
    )
    named = [
        column.removeprefix("Channel_Orig")
        for column in table.columns
        if column.startswith("Channel_Orig")
    ]
    available = tuple(named or zarrs.channel_names(files[0], str(source)))
    if not available:
        raise InputError(
            f"{files[0]}: names no channels; say which is which in columns Channel_Orig<CHANNEL> of --load-data"
        )
    return available, lambda channel: files


def _choose(
    asked: tuple[str, ...], also: tuple[str, ...], available: tuple[str, ...], source: Path | str
) -> tuple[str, ...]:
    chosen = asked or available
    for channel in chosen + also:
        if channel not in available:
            raise InputError(
                f"--channels {channel}: {source} has no such channel; it has {', '.join(available)}"
            )
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--channels {','.join(chosen)}: a channel is named twice")
    return tuple(dict.fromkeys(chosen + also))


def choose_label(sites: pd.DataFrame, label_column: str, load_data: Path | str) -> str:
    """The label column asked for, or the first of `LABEL_COLUMNS` there is; none where `NO_LABEL` was asked for.

    Raises:
        InputError: there is no such column, none at all, or a site has no value in it.
    """
    if label_column == NO_LABEL:
        return ""
    have = [column for column in sites.columns if column.startswith("Metadata_")]
    if not label_column:
        label_column = next((column for column in LABEL_COLUMNS if column in have), "")
    if not label_column:
        raise InputError(
            f"{load_data}: none of {', '.join(LABEL_COLUMNS)} is there to be the label; "
            f"choose one with --label-column (there are {', '.join(have)}), or join --platemap and --compounds; "
            f"sites without labels, to predict, are built with --label-column {NO_LABEL}"
        )
    if label_column not in have:
        if isinstance(load_data, Path) and label_column in read_table(load_data).columns:
            raise InputError(
                f"--label-column {label_column}: columns of {load_data} that tell of a site begin with Metadata_; "
                f"rename it there to Metadata_{label_column}"
            )
        raise InputError(
            f"--label-column {label_column}: {load_data} has no such column; it has {', '.join(have)}"
        )
    empty = sites.loc[sites[label_column] == "", "row"]
    if len(empty):
        raise InputError(
            f"{load_data}, row {empty.iloc[0]}: {label_column} is empty ({len(empty)} such rows); "
            f"fill it in ({SOLVENT} for the solvent), join --platemap, or choose another --label-column "
            f"({NO_LABEL} for sites that are only to be predicted)"
        )
    return label_column


def merged_identities(sites: pd.DataFrame, label_column: str) -> list[str]:
    """One sentence for each identity column in which some labels stand for several values."""
    notes: list[str] = []
    for column in IDENTITY_COLUMNS if label_column else ():
        if column == label_column or column not in sites.columns:
            continue
        values = sites[sites[column] != ""].groupby(label_column)[column].nunique()
        several = values[values > 1]
        if len(several):
            examples = ", ".join(f"{label} ({count})" for label, count in several.head(4).items())
            notes.append(
                f"{label_column} merges several {column} in {len(several)} of its classes: {examples}"
            )
    return notes


def file_locations(
    table: pd.DataFrame, source: Path | str
) -> dict[str, tuple[pd.Series, pd.Series]]:
    """Channel → (file names, folders), one a row, in the order of the table's columns.

    Raises:
        InputError: no column names files.
    """
    nowhere = pd.Series("", index=table.index)
    for prefix, kind in FILE_COLUMNS:
        columns = {
            match[1]: column
            for column in table.columns
            if (match := re.fullmatch(prefix + "(.+)", column))
        }
        if kind == "name":
            found = {
                channel: (
                    table[column],
                    table.get(column.replace("FileName_", "PathName_", 1), nowhere),
                )
                for channel, column in columns.items()
            }
        else:
            paths = {
                channel: table[column]
                .str.replace(r"^[a-z0-9]+:/+", "/", regex=True)
                .str.rpartition("/")
                for channel, column in columns.items()
            }
            found = {channel: (path[2], path[0]) for channel, path in paths.items()}
        if found:
            return found
    raise InputError(
        f"{source}: has no FileName_Orig<CHANNEL> column, so no channel can be found by name"
    )


def _selections(table: pd.DataFrame, channel: str, source: Path | str) -> list[dict[str, Any]]:
    """What each row says of where in its file a channel lies, as fields of a `Plane`.

    Raises:
        InputError: a series or a frame is no number.
    """
    nothing = pd.Series("", index=table.index)

    def column(kind: str) -> pd.Series:
        return table.get(f"{kind}_Orig{channel}", table.get(f"{kind}_{channel}", nothing))

    found: list[dict[str, Any]] = [{"channel": name or channel} for name in column("Channel")]
    for kind, field in NUMBERS.items():
        for row, (text, selection) in enumerate(zip(column(kind), found, strict=True), FIRST_ROW):
            if text and not re.fullmatch("[0-9]{1,9}", text):
                raise InputError(
                    f"{source}, row {row}: {kind}_Orig{channel} is {text!r}; it must be a number from 0"
                )
            selection[field] = int(text) if text else None
    return found


def normalise_position(sites: pd.DataFrame, source: Path | str) -> None:
    """Spell wells and sites alike, in place.

    Raises:
        InputError: plate, well or site is no column, or empty in a row.
    """
    for column in (PLATE, WELL, SITE):
        if column not in sites.columns:
            raise InputError(f"{source}: column {column} is missing")
        empty = sites.loc[sites[column] == "", "row"]
        if len(empty):
            raise InputError(f"{source}, row {empty.iloc[0]}: {column} is empty")
    sites[WELL] = sites[WELL].map(normalize_well)
    sites[SITE] = sites[SITE].map(
        lambda site: str(int(site)) if re.fullmatch("[0-9]{1,18}", site) else site
    )


def _refuse_duplicates(sites: pd.DataFrame, source: Path | str) -> None:
    twice = sites[sites["site_id"].duplicated(keep=False)]
    if len(twice):
        first = twice.iloc[0]
        rows = twice.loc[twice["site_id"] == first["site_id"], "row"]
        raise InputError(
            f"{source}, rows {rows.iloc[0]} and {rows.iloc[1]}: both are plate {first[PLATE]}, well {first[WELL]}, "
            f"site {first[SITE]}; a site may stand only once"
        )
