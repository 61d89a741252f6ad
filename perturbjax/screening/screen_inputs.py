"""Read the wells of a screen from tables of profiles, a dataset or a run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE, WELL
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_table import Profiles
from perturbjax.screening.screen_options import ScreenConfig
from perturbjax.screening.wells import (
    CONTROL_TYPE,
    COUNT_COLUMNS,
    POSITIVE,
    Wells,
    find_controls,
    parse_doses,
)


def load_wells(config: ScreenConfig, *, dose_column: str = "") -> Wells:
    """Read profiles, aggregate them to wells (median), and find controls and cell counts.

    Args:
        config: input and controls.
        dose_column: if given, treatments are named "NAME, DOSE uM".

    Raises:
        InputError: the input cannot be read, a column is missing, or no well is a control.
    """
    if config.run is not None and not (config.run / "evaluation" / "features.parquet").is_file():
        raise InputError(
            f"--run {config.run}: has no evaluation/features.parquet; run `perturbjax "
            "evaluate` first"
        )
    profiles, _, label = load_profiles(config.profile_config())
    metadata = profiles.metadata.reset_index(drop=True)
    control = find_controls(metadata, label, config.negcon)
    treatment = metadata[label].astype(str)
    if dose_column:
        doses = parse_doses(_column(metadata, dose_column))
        named = treatment + [f", {dose:.6g} uM" if np.isfinite(dose) else "" for dose in doses]
        # Controls have names without a dose, so that they remain one treatment.
        treatment = treatment.where(pd.Series(control), named)
    positive = np.zeros(len(metadata), dtype=bool)
    if CONTROL_TYPE in metadata.columns:
        positive = metadata[CONTROL_TYPE].str.startswith(POSITIVE).to_numpy(dtype=bool)
    console.print(
        f"info: {len(metadata)} wells of {metadata[PLATE].nunique()} plates, {int(control.sum())} "
        f"negative control wells, {treatment[~control].nunique()} treatments"
    )
    return Wells(
        metadata=metadata,
        values=profiles.values.astype(np.float64),
        features=profiles.names,
        treatment=treatment.reset_index(drop=True),
        control=control,
        positive=positive,
        cell_count=_cell_count(profiles, config),
    )


def _column(metadata: pd.DataFrame, name: str) -> pd.Series:
    if name not in metadata.columns:
        shown = ", ".join(column for column in metadata.columns if column.startswith("Metadata_"))
        raise InputError(f"--dose-column {name}: not found (available: {shown})")
    return metadata[name]


def _cell_count(profiles: Profiles, config: ScreenConfig) -> np.ndarray | None:
    """Number of cells of each well, from the features, the metadata or the dataset's index."""
    # For each name, a feature takes precedence over a metadata column.
    for name in COUNT_COLUMNS:
        if name in profiles.names:
            return profiles.values[:, profiles.names.index(name)].astype(float)
        column = name if name.startswith("Metadata_") else f"Metadata_{name}"
        if column in profiles.metadata.columns:
            counts = pd.to_numeric(profiles.metadata[column], errors="coerce")
            if counts.notna().all():
                return counts.to_numpy(dtype=float)
    if config.data:
        from perturbjax.dataset import open_dataset

        index = open_dataset(config.data).index
        counts = index.groupby([index[PLATE].astype(str), index[WELL].astype(str)])["n_cells"].sum()
        keys = pd.MultiIndex.from_frame(profiles.metadata[[PLATE, WELL]].astype(str))
        return counts.reindex(keys).to_numpy(dtype=float)
    return None
