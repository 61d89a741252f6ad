"""Read tables of profiles: CSV or TSV (also compressed), parquet, AnnData and SQLite.

All formats follow the rules of `perturbjax.core.text_tables` for metadata and of `feature_columns`
for features, so that the same table gives the same profiles in every format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import MAX_CELLS_PER_BYTE, OPENERS, describe_path, read_parquet
from perturbjax.core.plates import normalize_wells, separate_batches
from perturbjax.core.text_tables import clean_columns, detect_dialect
from perturbjax.dataset import PLATE, SITE, WELL
from perturbjax.profiles.cell_tables import CELL_COUNT, is_large_cell_table, read_wells
from perturbjax.profiles.feature_columns import list_columns, select_features
from perturbjax.profiles.feature_files import CELL_ID, require_anndata
from perturbjax.profiles.object_tables import add_images, read_database
from perturbjax.profiles.profile_table import METADATA, SITE_ID, Profiles, aggregate_to_wells

#: Maximum ratio of unpacked to packed size of a compressed table.
MAX_COMPRESSION = 64
#: Formats that are recognized only to name them in the error message.
_UNSUPPORTED = {".xlsx": "Excel", ".xls": "Excel"}
#: `Image_Metadata_*` are the metadata of a table of images.
_METADATA = re.compile(f"(Image_)?{METADATA}")
_DATABASES = (".sqlite", ".sqlite3", ".db")
_ADVICE = "Write it again, for example with `perturbjax features`"


def read_profiles(paths: Sequence[Path | str | pd.DataFrame], aggregate: str = "none") -> Profiles:
    """Read one or several tables of profiles.

    Tables that share features are concatenated row by row, such as one file per plate. Tables that
    share no feature are joined by site, such as the features of two networks.

    Features are the numeric columns that all concatenated files share, see `feature_columns`.
    `site_id` is read from `site_id` or `Metadata_site_id`; otherwise it is PLATE_WELL or
    PLATE_WELL_SITE.

    Args:
        paths: parquet, CSV, TSV (also `.gz`, `.bz2`, `.xz`), `.h5ad` or `.sqlite` files, or tables
            in memory.
        aggregate: how to aggregate single cells to wells: "median", "mean", or "none" to refuse
            them. Tables of sites or wells are not aggregated here.

    Returns:
        Profiles with notes about everything that was changed or left out.

    Raises:
        InputError: A file cannot be read, has no rows, plates, wells or features; files share
            neither a feature nor a site; the same profile occurs twice.
    """
    if not paths:
        raise InputError("--features: is empty. Give at least one file.")
    groups: list[list[_Table]] = []
    notes: list[str] = []
    for source in paths:
        for table in _read_tables(source, aggregate, notes):
            # A table belongs to the first group with which it shares a feature.
            group = next(
                (group for group in groups if set(group[0].features) & set(table.features)), None
            )
            if group is None:
                groups.append([table])
            else:
                group.append(table)
    if note := separate_batches([table.metadata for group in groups for table in group]):
        notes.append(note)
    # First concatenate files of the same features, then join the groups by site.
    parts = [_concatenate(group, aggregate, notes) for group in groups]
    if any(part.metadata[SITE_ID].duplicated().any() for part in parts):  # single cells
        rows = sum(map(len, parts))
        parts = [aggregate_to_wells(_count_cells(part), aggregate) for part in parts]
        wells = sum(map(len, parts))
        notes.append(f"aggregated {rows} rows to {wells} wells ({aggregate} of each feature)")
    profiles = parts[0]
    for group, part in zip(groups[1:], parts[1:], strict=True):
        profiles = _join(profiles, part, str(paths[0]), str(group[0].path), notes)
    return replace(profiles, notes=tuple(notes))


@dataclass(frozen=True)
class _Table:
    """One file: its metadata as text and its features."""

    path: Path
    metadata: pd.DataFrame
    features: pd.DataFrame


def _count_cells(cells: Profiles) -> Profiles:
    """Add the number of rows of each well as metadata, unless the table has it."""
    if CELL_COUNT in cells.metadata.columns:
        return cells
    keys = [cells.metadata[PLATE], cells.metadata[WELL]]
    count = cells.metadata.groupby(keys)[SITE_ID].transform("size").astype(str)
    return replace(cells, metadata=cells.metadata.assign(**{CELL_COUNT: count}))


def _read_tables(
    source: Path | str | pd.DataFrame, aggregate: str, notes: list[str]
) -> Iterator[_Table]:
    """Read the table of a file, or one table of wells for each kind of object of a database."""
    if isinstance(source, pd.DataFrame):
        yield _make_table(source.reset_index(drop=True), Path("table"), notes)
        return
    path = Path(source)
    if path.suffix.lower() not in _DATABASES or not path.is_file():
        yield _make_table(_read_file(path, aggregate, notes), path, notes)
        return
    if aggregate == "none":
        raise InputError(
            f"{path}: is a database of single cells. Use --aggregate median for one profile per "
            "well."
        )
    for objects in read_database(path):
        # Aggregated at once, because all cells of a plate can exceed the memory.
        table = _make_table(objects, path, notes)
        if note := separate_batches([table.metadata]):
            notes.append(f"{path}: {note}")
        cells = _count_cells(_concatenate([table], aggregate, notes))
        wells = aggregate_to_wells(cells, aggregate)
        notes.append(
            f"{path}: aggregated {len(cells)} rows to {len(wells)} wells ({aggregate} of each "
            "feature)"
        )
        values = pd.DataFrame(wells.values, columns=list(wells.names))
        yield _Table(path, wells.metadata.drop(columns=SITE_ID), values)


def _make_table(table: pd.DataFrame, path: Path, notes: list[str]) -> _Table:
    table.columns = table.columns.astype(str).str.strip()
    if missing := [column for column in (PLATE, WELL) if column not in table.columns]:
        raise InputError(
            f"{path}: no column {missing[0]}. Profiles need the plate and the well of every row."
        )
    if table.empty:
        raise InputError(f"{path}: has no rows")
    if (repeated := table.columns.duplicated()).any():
        raise InputError(
            f"{path}: column {table.columns[repeated][0]!r} occurs twice. Rename one of them."
        )
    # Split the columns into metadata and features.
    columns = [c for c in table.columns if c.startswith(METADATA) or c == SITE_ID]
    metadata, changes = clean_columns(table[columns])
    features, left_out = select_features(table, path)
    notes += [f"{path}: {change}" for change in changes] + left_out
    if not len(features.columns):
        raise InputError(
            f"{path}: no feature columns, only {METADATA}* or columns that are left out. "
            + "; ".join(left_out)
        )
    _normalize_positions(metadata, path, notes)
    return _Table(path, metadata, features)


def _read_file(path: Path, aggregate: str, notes: list[str]) -> pd.DataFrame:
    if path.is_dir():
        if "(option" in (kind := describe_path(path)):
            raise InputError(
                f"{path}: {kind}, not a table of features. Use that option, or write a table with "
                "`perturbjax features`."
            )
        raise InputError(f"{path}: is a folder. Give its files: {path}/*.parquet")
    if not path.is_file():
        raise InputError(f"{path}: file not found. Write one with `perturbjax features`.")
    suffix = path.suffix.lower()
    if name := _UNSUPPORTED.get(suffix):
        raise InputError(f"{path}: {name} is not supported. Export the table as CSV or parquet.")
    if aggregate != "none" and is_large_cell_table(path):
        table = read_wells(path, aggregate)
        rows = pd.to_numeric(table[CELL_COUNT]).sum()
        notes.append(
            f"{path}: aggregated {rows} rows to {len(table)} wells ({aggregate} of each feature)"
        )
        return table
    if suffix in (".parquet", ".pq"):
        return read_parquet(path, _ADVICE)
    if suffix == ".h5ad":
        return _read_anndata(path)
    return add_images(_read_csv(path, notes), path, lambda images: _read_csv(images, notes))


def _read_csv(path: Path, notes: list[str]) -> pd.DataFrame:
    """Read a text file; metadata stay text, so that plate 0012 keeps its zeros."""
    try:
        _check_compression(path)
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            # The limit of 16 MiB protects against files without line breaks.
            header, row = (file.readline(1 << 24).decode("utf-8-sig").strip("\r\n") for _ in "12")
        dialect = detect_dialect(header, row)
        names = [name.strip('"') for name in header.split(dialect.separator)]
        if note := dialect.note():
            notes.append(f"{path}: {note}")
        return pd.read_csv(
            path,
            sep=dialect.separator,
            decimal=dialect.decimal,
            dtype={c: str for c in names if _METADATA.match(c.strip()) or c == SITE_ID},
            low_memory=False,
            encoding="utf-8-sig",
            compression="infer" if path.suffix in OPENERS else None,
        )
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text. Save it as CSV in UTF-8.") from error
    except Exception as error:  # pandas and the decompressors raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as CSV ({reason}). {_ADVICE}.") from error


def _check_compression(path: Path) -> None:
    """Refuse a compressed table that would fill the memory, before parsing it."""
    if path.suffix not in OPENERS:
        return
    # 1 MiB is always allowed, so that small tables are not refused.
    left = MAX_COMPRESSION * path.stat().st_size + (1 << 20)
    with OPENERS[path.suffix](path, "rb") as file:
        while left >= 0 and (part := file.read(1 << 20)):
            left -= len(part)
    if left < 0:
        raise InputError(
            f"{path}: unpacked, it is more than {MAX_COMPRESSION} times larger, which is unusual "
            "for numbers. Unpack it yourself if it is right."
        )


def _read_anndata(path: Path) -> pd.DataFrame:
    """Read `obs` (metadata), `var` (names) and `X` (values) of an AnnData file."""
    require_anndata("--features")
    import h5py
    from anndata.io import read_elem

    try:
        with h5py.File(path) as file:
            # Check the shape before reading: a small damaged file could claim a huge array.
            stored: Any = file["X"]
            shape = stored.shape if isinstance(stored, h5py.Dataset) else stored.attrs["shape"]
            if np.prod(shape, dtype=float) > MAX_CELLS_PER_BYTE * path.stat().st_size:
                raise ValueError(f"{shape[0]} x {shape[1]} values in {path.stat().st_size} bytes")
            values, obs, var = (read_elem(file[key]) for key in ("X", "obs", "var"))
    except Exception as error:  # h5py and anndata raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as AnnData ({reason}). {_ADVICE}.") from error
    return combine_anndata(obs, var, values)


def combine_anndata(obs: pd.DataFrame, var: pd.DataFrame, values: Any) -> pd.DataFrame:
    """Return metadata and features of an AnnData object as one table.

    Args:
        obs: rows; columns that start with `Metadata_` are metadata.
        var: its index has the names of the features.
        values: dense or sparse matrix X.
    """
    values = values.toarray() if hasattr(values, "toarray") else values
    metadata = obs[[c for c in obs.columns if c.startswith(METADATA) or c == SITE_ID]]
    features = pd.DataFrame(values, columns=var.index.astype(str))
    return pd.concat([metadata.reset_index(drop=True), features], axis=1)


def _normalize_positions(metadata: pd.DataFrame, path: Path, notes: list[str]) -> None:
    """Spell wells like A01 and sites like 1, in place."""
    wells = normalize_wells(metadata[WELL], metadata[PLATE], path)
    if (changed := (wells != metadata[WELL]).to_numpy()).any():
        first = int(np.argmax(changed))
        notes.append(
            f"{path}: renamed wells of {changed.sum()} rows (such as "
            f"{metadata[WELL].iloc[first]!r} to {wells.iloc[first]})"
        )
    metadata[WELL] = wells
    if SITE in metadata.columns:
        metadata[SITE] = metadata[SITE].map(
            lambda site: str(int(site)) if re.fullmatch("[0-9]{1,18}", site) else site
        )


def _concatenate(group: list[_Table], aggregate: str, notes: list[str]) -> Profiles:
    """Concatenate files with the same features."""
    names = _shared_features(group, notes)
    metadata = pd.concat([one.metadata for one in group], ignore_index=True).fillna("")
    values = np.concatenate([one.features[names].to_numpy(dtype=np.float32) for one in group])
    # Infinite values can result from ratios with denominator 0.
    if infinite := int(np.isinf(values).sum()):
        notes.append(f"{infinite} infinite values are read as missing")
        values[np.isinf(values)] = np.nan
    metadata.insert(0, SITE_ID, _site_ids(metadata))
    _check_duplicates(group, metadata, aggregate)
    return Profiles(metadata, values, tuple(names))


def _check_duplicates(group: list[_Table], metadata: pd.DataFrame, aggregate: str) -> None:
    """Refuse one plate in two files, and single cells unless they are aggregated."""
    repeated = metadata[metadata[SITE_ID].duplicated(keep=False)]
    if repeated.empty:
        return
    files = pd.Series(np.repeat(np.arange(len(group)), [len(one.metadata) for one in group]))
    # First and last file in which each repeated profile occurs.
    first = files[repeated.index].groupby(repeated[SITE_ID], sort=False).agg(["min", "max"])
    if (twice := first["min"] != first["max"]).any():
        site = twice.idxmax()
        plate = metadata.loc[metadata[SITE_ID] == site, PLATE].iloc[0]
        paths = [str(group[number].path) for number in first.loc[site]]
        raise InputError(
            f"{paths[0]} and {paths[1]}: plate {plate} is in both files (profile {site!r}). Give "
            "each file once, and different plates and the features of different networks "
            "different names. Plates of one name in different batches need a column "
            "Metadata_Batch."
        )
    if aggregate == "none":
        raise InputError(
            f"{group[0].path}: {len(repeated)} rows share their site with other rows (first: "
            f"{repeated[SITE_ID].iloc[0]!r}), as in a table of single cells. Use --aggregate "
            f"median for one profile per well, or add a column {SITE}."
        )


def _join(left: Profiles, right: Profiles, first: str, second: str, notes: list[str]) -> Profiles:
    """Join two tables by site; sites without a partner are left out."""
    # Row of the same site in `right`, or -1.
    partner = pd.Index(right.metadata[SITE_ID]).get_indexer(left.metadata[SITE_ID])
    matched = partner >= 0
    if not matched.any():
        raise InputError(
            f"{first} and {second}: share neither a feature nor a site. Give tables written in "
            "the same way, or tables of the same sites."
        )
    if left_out := len(left) + len(right) - 2 * int(matched.sum()):
        notes.append(f"left out {left_out} rows whose site is only in {first} or only in {second}")
    left, partner = left.take(matched), partner[matched]
    added = right.metadata.iloc[partner].reset_index(drop=True)
    for column in (PLATE, WELL):
        if (different := (left.metadata[column] != added[column]).to_numpy()).any():
            site = left.metadata[SITE_ID].iloc[int(np.argmax(different))]
            raise InputError(
                f"{second}: site {site!r} has another {column} than in {first}. Join tables of "
                "one screen."
            )
    # Metadata of the first table take precedence.
    new = [column for column in added.columns if column not in left.metadata.columns]
    return replace(
        left,
        metadata=pd.concat([left.metadata, added[new]], axis=1),
        values=np.concatenate([left.values, right.values[partner]], axis=1),
        names=(*left.names, *right.names),
    )


def _shared_features(group: list[_Table], notes: list[str]) -> list[str]:
    """Return the features of all files, in the order of the first."""
    names = [set(one.features.columns) for one in group]
    shared = [name for name in group[0].features.columns if all(name in one for one in names)]
    if not shared:
        raise InputError(
            f"{group[0].path} and {group[-1].path}: share no feature. Give tables written in the "
            "same way."
        )
    if absent := set.union(*names) - set(shared):
        notes.append(f"left out {list_columns(sorted(absent))} (not in every file)")
    return shared


def _site_ids(metadata: pd.DataFrame) -> pd.Series:
    if SITE_ID in metadata.columns:
        return metadata.pop(SITE_ID)
    # In tables of `features --level cell`, each row is a cell.
    for column in (CELL_ID, METADATA + SITE_ID):
        if column in metadata.columns:
            return metadata[column]
    columns = [c for c in (WELL, SITE) if c in metadata.columns]
    return metadata[PLATE].str.cat([metadata[c] for c in columns], sep="_")
