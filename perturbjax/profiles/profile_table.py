"""Profiles: one row per site or well with `Metadata_*` columns and one number per feature.

Nothing is fitted here. Missing values, constant features and scales are handled in `preparation`,
from training rows only. `profile_reader` reads profiles from files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32

from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, WELL

METADATA = "Metadata_"
#: Prefix of features that are image statistics of a dataset's index instead of network features.
STATISTIC = "index_"
SITE_ID = "site_id"


@dataclass(frozen=True)
class Profiles:
    """A table of profiles.

    Attributes:
        metadata: one row per profile: `site_id` (unique) and the `Metadata_*` columns, all text (""
            if missing).
        values: one row per profile, one column per feature; NaN if missing or infinite.
        names: names of the features, in column order.
        notes: information and warnings about the files, one sentence each.
        label_column: column to predict if no other is chosen.
        measured: image statistics of a dataset, one row per profile; None for tables.
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
        """Return a metadata column as text.

        Raises:
            InputError: The column does not exist; the message lists the columns.
        """
        if name not in self.metadata.columns:
            raise InputError(
                f"features: no column {name!r} (available: {', '.join(self.metadata.columns)})"
            )
        return self.metadata[name]

    def take(self, rows: Bool[np.ndarray, " n"] | np.ndarray) -> Profiles:
        """Select rows by a boolean mask or by positions."""
        measured = None if self.measured is None else self.measured.loc[rows].reset_index(drop=True)
        metadata = self.metadata.loc[rows].reset_index(drop=True)
        return replace(self, metadata=metadata, values=self.values[rows], measured=measured)

    def drop_features(self, names: list[str]) -> Profiles:
        """Return the profiles without some features."""
        rest = [number for number, name in enumerate(self.names) if name not in set(names)]
        return replace(
            self, values=self.values[:, rest], names=tuple(self.names[number] for number in rest)
        )

    def frame(self) -> pd.DataFrame:
        """Return one table with `Metadata_*` columns first, as pycytominer and copairs read it."""
        first = self.metadata[[c for c in self.metadata.columns if c.startswith(METADATA)]]
        return pd.concat(
            [first, pd.DataFrame(self.values, columns=list(self.names), index=first.index)], axis=1
        )


def aggregate_to_wells(profiles: Profiles, how: str = "median") -> Profiles:
    """Aggregate the rows of each well (sites or cells) to one profile, ignoring missing values.

    Metadata that differ within a well, such as `Metadata_Site`, are dropped. `site_id` becomes
    PLATE_WELL.

    Args:
        profiles: one row per site or cell.
        how: "median" or "mean".

    Returns:
        One row per well, in order of first occurrence.

    Raises:
        InputError: `how` is unknown.
    """
    if how not in ("median", "mean"):
        raise InputError(f"--aggregate {how}: unknown. Choose median or mean.")
    keys = [profiles.metadata[PLATE], profiles.metadata[WELL]]
    grouped = profiles.metadata.drop(columns=[SITE_ID]).groupby(keys, sort=False)
    # Columns that have at most one value in each well.
    same = (grouped.nunique() <= 1).all()
    columns = [c for c in same.index[same] if c not in (PLATE, WELL)]
    metadata = grouped.first()[columns].reset_index()
    values = profiles.values
    if len(metadata) < len(profiles):
        groups = pd.DataFrame(values).groupby([key.to_numpy() for key in keys], sort=False)
        values = groups.agg(how).to_numpy(np.float32)
    metadata.insert(0, SITE_ID, metadata[PLATE].str.cat(metadata[WELL], sep="_"))
    return replace(profiles, metadata=metadata, values=values, measured=None)
