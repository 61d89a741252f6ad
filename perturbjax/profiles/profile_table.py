"""Profiles: one row a site or a well, `Metadata_*` columns first, then one number a feature.

Reads what `perturbjax features` writes and what CellProfiler, pycytominer and their kin write. Nothing here is fitted:
missing values, constant columns and scales are dealt with in `normalize`, on training rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32

from perturbjax.core.errors import InputError
from perturbjax.core.files import OPENERS, read_parquet
from perturbjax.dataset import PLATE, SITE, WELL

METADATA = "Metadata_"
#: Begins the names of features that are a dataset's index's own statistics, and not a network's.
STATISTIC = "index_"
SITE_ID = "site_id"
#: Columns that some writers put beside features and that are no measurement of a cell.
NOT_FEATURES = (SITE_ID, "label", "part", "ImageNumber", "TableNumber")
#: A packed table of numbers unfolds to a few times its size.
MOST_UNFOLDED = 64


@dataclass(frozen=True)
class Profiles:
    """A table of profiles.

    Attributes:
        metadata: one row a profile: `site_id`, unique, and the `Metadata_*` columns, all as text ("" where empty).
        values: one row a profile, one column a feature; NaN where a value is missing or infinite.
        names: of the features, in the order of the columns.
        notes: what was done to the files, one sentence each.
        label_column: what is predicted where nothing else is asked for.
        measured: a dataset's index beside its metadata, row by row; None of tables.
    """

    metadata: pd.DataFrame
    values: Float32[np.ndarray, "n d"]
    names: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    label_column: str = "Metadata_pert_iname"
    measured: pd.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.metadata)

    def column(self, name: str) -> pd.Series:
        """A metadata column, as text.

        Raises:
            InputError: there is none of that name; the message lists those there are.
        """
        if name not in self.metadata.columns:
            raise InputError(
                f"features: no column {name!r}; there are {', '.join(self.metadata.columns)}"
            )
        return self.metadata[name]

    def take(self, rows: Bool[np.ndarray, " n"] | np.ndarray) -> Profiles:
        """The rows of a boolean mask, or of positions."""
        measured = None if self.measured is None else self.measured.loc[rows].reset_index(drop=True)
        metadata = self.metadata.loc[rows].reset_index(drop=True)
        return replace(self, metadata=metadata, values=self.values[rows], measured=measured)

    def frame(self) -> pd.DataFrame:
        """Metadata and features as one table, `Metadata_*` first: what pycytominer and copairs read."""
        first = self.metadata[[c for c in self.metadata.columns if c.startswith(METADATA)]]
        return pd.concat(
            [first, pd.DataFrame(self.values, columns=list(self.names), index=first.index)], axis=1
        )


def read_profiles(paths: Sequence[Path | str]) -> Profiles:
    """Read one or several files (parquet, or CSV/TSV, also compressed): below each other those that share features,
    and beside each other those that share none, row by row of the same site (such as those of two networks).

    Features are the numeric columns that all files below each other share. Left out, each with a note: columns that
    some of those lack, columns that are not numbers, and sites that are not on both sides. Infinite values become NaN,
    with a note. `site_id` is the file's own (`site_id` or `Metadata_site_id`) or, where it has none, plate_well(_site).

    Raises:
        InputError: a file cannot be read, has no rows, no `Metadata_Plate` or `Metadata_Well`, no numeric feature; the
            files share neither a feature nor a site; or a profile occurs twice.
    """
    if not paths:
        raise InputError("--features: needs at least one file")
    groups: list[list[_Table]] = []
    notes: list[str] = []
    for path in map(Path, paths):
        table = _read_table(path)
        new = _Table(path, table, _numeric(table, path, notes))
        below = next((group for group in groups if set(group[0].numeric) & set(new.numeric)), None)
        if below is None:
            groups.append([new])
        else:
            below.append(new)
    first, *others = [_below(group, notes) for group in groups]
    for group, other in zip(groups[1:], others, strict=True):
        first = _beside(first, other, str(paths[0]), str(group[0].path), notes)
    return replace(first, notes=tuple(notes))


@dataclass(frozen=True)
class _Table:
    """A file of profiles, and its columns that are features."""

    path: Path
    table: pd.DataFrame
    numeric: list[str]


def _below(group: list[_Table], notes: list[str]) -> Profiles:
    """Files of the same features, one below the other."""
    shared = _shared_features(group, notes)
    metadata = pd.concat([_text_metadata(one.table) for one in group], ignore_index=True).fillna("")
    values = np.concatenate([one.table[shared].to_numpy(dtype=np.float32) for one in group])
    if infinite := int(np.isinf(values).sum()):
        notes.append(f"{infinite} infinite values are taken as missing")
        values[np.isinf(values)] = np.nan
    metadata.insert(0, SITE_ID, _site_ids(metadata))
    if (twice := metadata[SITE_ID].duplicated()).any():
        raise InputError(
            f"{group[0].path}{' …' if len(group) > 1 else ''}: profile {metadata.loc[twice, SITE_ID].iloc[0]!r} occurs "
            "more than once; give every file once, rows of one well a Metadata_Site, and features of two networks "
            "names of their own (`perturbjax features --prefix`)"
        )
    return Profiles(metadata, values, tuple(shared))


def _beside(left: Profiles, right: Profiles, first: str, second: str, notes: list[str]) -> Profiles:
    """The sites that both know, with the features of both."""
    at = pd.Index(right.metadata[SITE_ID]).get_indexer(left.metadata[SITE_ID])
    known = at >= 0
    if not known.any():
        raise InputError(
            f"{first} and {second}: share neither a feature column nor a site; give files made in the same way, or of "
            "the same sites"
        )
    if left_out := len(left) + len(right) - 2 * int(known.sum()):
        notes.append(
            f"{left_out} rows of {first} or {second} have no row of the same site in the other, left out"
        )
    left, at = left.take(known), at[known]
    theirs = right.metadata.iloc[at].reset_index(drop=True)
    for column in (PLATE, WELL):
        if (other := (left.metadata[column] != theirs[column]).to_numpy()).any():
            site = left.metadata[SITE_ID].iloc[int(np.argmax(other))]
            raise InputError(
                f"{second}: site {site!r} has another {column} than in {first}; join files of one screen"
            )
    new = [column for column in theirs.columns if column not in left.metadata.columns]
    return replace(
        left,
        metadata=pd.concat([left.metadata, theirs[new]], axis=1),
        values=np.concatenate([left.values, right.values[at]], axis=1),
        names=(*left.names, *right.names),
    )


def _read_table(path: Path) -> pd.DataFrame:
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such features file; make one with `perturbjax features`")
    if name.endswith((".parquet", ".pq")):
        table = read_parquet(path, "make it again")
    else:
        table = _read_csv(path, "\t" if ".tsv" in name else ",")
    if missing := [column for column in (PLATE, WELL) if column not in table.columns]:
        raise InputError(
            f"{path}: no column {missing[0]}; profiles need the plate and the well of every row"
        )
    if table.empty:
        raise InputError(f"{path}: has no rows")
    if (repeated := table.columns.duplicated()).any():
        raise InputError(f"{path}: column {table.columns[repeated][0]!r} is twice there")
    return table


def _read_csv(path: Path, sep: str) -> pd.DataFrame:
    try:
        _require_sane(path)
        return pd.read_csv(
            path, sep=sep, low_memory=False, compression="infer" if path.suffix in OPENERS else None
        )
    except InputError:
        raise
    except (
        Exception
    ) as error:  # pandas and the packers raise many kinds; to the user they all mean the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as CSV ({reason}); make it again") from error


def _require_sane(path: Path) -> None:
    """Refuse a packed table that would fill the memory, before anything of it is kept."""
    if path.suffix not in OPENERS:
        return
    left = MOST_UNFOLDED * path.stat().st_size + (1 << 20)
    with OPENERS[path.suffix](path, "rb") as file:
        while left >= 0 and (part := file.read(1 << 20)):
            left -= len(part)
    if left < 0:
        raise InputError(
            f"{path}: unfolds to more than {MOST_UNFOLDED} times its size, as no table of numbers does; unpack it "
            "yourself if it is right"
        )


def _numeric(table: pd.DataFrame, path: Path, notes: list[str]) -> list[str]:
    """The columns of a file that are features."""
    candidates = [c for c in table.columns if not c.startswith(METADATA) and c not in NOT_FEATURES]
    numbers = [
        c for c in candidates if pd.api.types.is_numeric_dtype(table[c]) or table[c].isna().all()
    ]
    if texts := [c for c in candidates if c not in set(numbers)]:
        notes.append(f"{path}: {_some(texts)} not numbers, left out")
    if not numbers:
        raise InputError(
            f"{path}: no numeric feature column beside {METADATA}*; give a table of features"
        )
    return numbers


def _shared_features(group: list[_Table], notes: list[str]) -> list[str]:
    """Features of all files, in the first one's order."""
    every = [set(one.numeric) for one in group]
    shared = [name for name in group[0].numeric if all(name in names for names in every)]
    if not shared:
        paths = f"{group[0].path} and {group[-1].path}"
        raise InputError(f"{paths}: share no feature column; give files made in the same way")
    if lacking := set.union(*every) - set(shared):
        notes.append(f"{_some(sorted(lacking))} not in every file, left out")
    return shared


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:3])) + (" …" if len(names) > 3 else "")
    return f"{len(names)} column{'' if len(names) == 1 else 's'} ({shown}) {'is' if len(names) == 1 else 'are'}"


def _text_metadata(table: pd.DataFrame) -> pd.DataFrame:
    columns = [c for c in table.columns if c.startswith(METADATA) or c == SITE_ID]
    return pd.DataFrame({column: as_text(table[column]) for column in columns})


def as_text(column: pd.Series) -> pd.Series:
    """Text; whole numbers without a decimal point, and "" where empty."""
    if pd.api.types.is_float_dtype(column) and column.dropna().mod(1).eq(0).all():
        column = column.astype("Int64")
    return column.astype("string").fillna("").astype(object)


def _site_ids(metadata: pd.DataFrame) -> pd.Series:
    if SITE_ID in metadata.columns:
        return metadata.pop(SITE_ID)
    if METADATA + SITE_ID in metadata.columns:
        return metadata[METADATA + SITE_ID]
    parts = [metadata[PLATE], metadata[WELL]] + (
        [metadata[SITE]] if SITE in metadata.columns else []
    )
    return parts[0].str.cat(parts[1:], sep="_")


def aggregate_to_wells(profiles: Profiles, how: str = "median") -> Profiles:
    """One profile a well: the median (or mean) of its sites, missing values left out.

    Metadata that differ between the sites of a well (`Metadata_Site`) are dropped; `site_id` becomes plate_well.

    Raises:
        InputError: `how` is neither "median" nor "mean".
    """
    if how not in ("median", "mean"):
        raise InputError(f"aggregate {how!r}: unknown; choose median or mean")
    keys = [profiles.metadata[PLATE], profiles.metadata[WELL]]
    grouped = profiles.metadata.drop(columns=[SITE_ID]).groupby(keys, sort=False)
    same = (grouped.nunique() <= 1).all()
    metadata = grouped.first()[
        [c for c in same.index[same] if c not in (PLATE, WELL)]
    ].reset_index()
    values = (
        pd.DataFrame(profiles.values).groupby([key.to_numpy() for key in keys], sort=False).agg(how)
    )
    metadata.insert(0, SITE_ID, metadata[PLATE].str.cat(metadata[WELL], sep="_"))
    return replace(profiles, metadata=metadata, values=values.to_numpy(np.float32), measured=None)
