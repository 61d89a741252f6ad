"""Read the wells of a screen from tables of profiles, a dataset or a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.core.messages import console, counted
from perturbjax.core.plates import PLATE, WELL
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_table import Profiles
from perturbjax.screening.measurements import measure_wells
from perturbjax.screening.screen_options import ScreenConfig, SimilarConfig
from perturbjax.screening.wells import (
    COUNT_COLUMNS,
    Wells,
    find_controls,
    find_positive_controls,
    metadata_column,
    parse_doses,
)
from perturbjax.training.run_directory import CONFIG, dataset_paths


def load_wells(
    config: ScreenConfig,
    *,
    dose_column: str = "",
    poscon: str = "",
    table: pd.DataFrame | None = None,
    needs_controls: bool = True,
) -> Wells:
    """Read profiles, aggregate them to wells (median), and find controls and cell counts.

    Args:
        config: input and controls.
        dose_column: if given, treatments are named "NAME, DOSE uM".
        poscon: positive controls as COLUMN=VALUE; by default Metadata_control_type=poscon.
        table: profiles in memory, in place of `config.features`.
        needs_controls: whether a screen without negative controls is an error.

    Raises:
        InputError: the input cannot be read, a column is missing, or no well is a control.
    """
    if config.run is not None and not (config.run / "evaluation" / "features.parquet").is_file():
        raise InputError(
            f"--run {config.run}: has no evaluation/features.parquet; run `perturbjax "
            "evaluate` first"
        )
    profiles, _, label = load_profiles(config.profile_config(), table)
    counts = _cell_count(profiles, config)
    return make_wells(
        profiles,
        label,
        config.negcon,
        counts,
        dose_column=dose_column,
        poscon=poscon,
        needs_controls=needs_controls,
    )


def load_measured_wells(config: ScreenConfig) -> Wells:
    """Read wells with features that can be named: those of a table, or measurements of cells.

    Args:
        config: input and controls. Without tables, the cells of the dataset are measured.

    Raises:
        InputError: the input cannot be read, or no well is a control.
    """
    dataset = None if config.features else open_images(config)
    if dataset is None:
        return load_wells(config)
    profiles = measure_wells(dataset)
    label = config.label_column or profiles.label_column
    profiles.column(label)
    counts = profiles.values[:, profiles.names.index("n_cells")].astype(float)
    return make_wells(profiles, label, config.negcon, counts)


def open_images(config: ScreenConfig) -> Dataset | None:
    """Open the dataset with the images of a screen; None if there is none.

    Args:
        config: input of the command; the images are in `data`, or in the dataset of `run`.

    Raises:
        InputError: the dataset of `data` cannot be read.
    """
    if config.data:
        return open_dataset(config.data)
    if config.run is None:
        return None
    data = dataset_paths(read_json(config.run / CONFIG))
    # A run stays valid without its dataset.
    return open_dataset(data) if data and all(path.is_dir() for path in data) else None


def make_wells(
    profiles: Profiles,
    label: str,
    negcon: str,
    cell_count: Float[np.ndarray, " n"] | None,
    *,
    dose_column: str = "",
    poscon: str = "",
    needs_controls: bool = True,
) -> Wells:
    """Name the treatments and find the controls.

    Args:
        profiles: one row per well.
        label: column with the treatment.
        negcon: see `wells.find_controls`.
        cell_count: number of cells of each well, or None.
        dose_column, poscon, needs_controls: see `load_wells`.
    """
    metadata = profiles.metadata.reset_index(drop=True)
    try:
        control = find_controls(metadata, label, negcon)
    except InputError:
        if needs_controls or negcon:
            raise
        control = np.zeros(len(metadata), dtype=bool)
        console.print("info: no negative control wells; the lowest dose is the reference")
    compound = metadata[label].astype(str).reset_index(drop=True)
    treatment = compound
    if dose_column:
        doses = parse_doses(metadata_column(metadata, dose_column, "dose-column"))
        named = compound + [f", {dose:.6g} uM" if np.isfinite(dose) else "" for dose in doses]
        # Controls have names without a dose, so that they remain one treatment.
        treatment = compound.where(pd.Series(control), named)
    plates = metadata[PLATE].nunique()
    console.print(
        f"info: {counted(len(metadata), 'well')} of {counted(plates, 'plate')}, "
        f"{counted(int(control.sum()), 'negative control well')}, "
        f"{counted(treatment[~control].nunique(), 'treatment')}"
    )
    return Wells(
        metadata=metadata,
        values=profiles.values.astype(np.float64),
        features=profiles.names,
        treatment=treatment,
        control=control,
        positive=find_positive_controls(metadata, poscon) & ~control,
        cell_count=cell_count,
        compound=compound,
    )


def add_reference(
    wells: Wells, paths: tuple[Path, ...], config: SimilarConfig
) -> tuple[Wells, Bool[np.ndarray, " n"]]:
    """Append the wells of reference tables, with the features that both have.

    Args:
        wells: wells of the screen.
        paths: reference tables. They need negative controls of their own.
        config: label column, controls and dose column.

    Returns:
        All wells, and which of them are from the reference.

    Raises:
        InputError: the reference cannot be read, or has no feature of the screen.
    """
    screen = dataclasses.replace(config.screen, features=paths, data=(), run=None)
    other = load_wells(screen, dose_column=config.dose_column)
    shared = [name for name in wells.features if name in set(other.features)]
    if not shared:
        raise InputError(
            f"--reference {paths[0]}: has no feature of the screen (such as {wells.features[0]})"
        )
    console.print(f"info: {len(shared)} features are in the screen and the reference")
    values = [
        one.values[:, [one.features.index(name) for name in shared]] for one in (wells, other)
    ]
    # A plate of the reference is another plate, even if both have the same name.
    renamed = other.metadata.assign(**{PLATE: "reference " + other.metadata[PLATE]})
    both = Wells(
        metadata=pd.concat([wells.metadata, renamed], ignore_index=True).fillna(""),
        values=np.concatenate(values),
        features=tuple(shared),
        treatment=pd.concat([wells.treatment, other.treatment], ignore_index=True),
        control=np.concatenate([wells.control, other.control]),
        positive=np.concatenate([wells.positive, other.positive]),
        cell_count=None,
        compound=pd.concat([wells.compounds, other.compounds], ignore_index=True),
    )
    return both, np.arange(len(both.control)) >= len(wells.control)


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
        index = open_dataset(config.data).index
        counts = index.groupby([index[PLATE].astype(str), index[WELL].astype(str)])["n_cells"].sum()
        keys = pd.MultiIndex.from_frame(profiles.metadata[[PLATE, WELL]].astype(str))
        return counts.reindex(keys).to_numpy(dtype=float)
    return None
