"""Load profiles with labels and controls from tables (`--features`) or a dataset (`--data`)."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
from jaxtyping import Bool

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import CONTROL_TYPE, EMPTY, in_empty_wells
from perturbjax.core.text_tables import case_variants
from perturbjax.dataset import PLATE, STATISTICS, WELL, Dataset, open_dataset
from perturbjax.evaluation.negative_controls import negative_controls
from perturbjax.profiles.feature_cache import cached_features
from perturbjax.profiles.feature_columns import find_annotations
from perturbjax.profiles.profile_options import ProfileConfig, SourceConfig
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import METADATA, STATISTIC, Profiles, aggregate_to_wells

#: Columns of an index that are measurements: counts, and image statistics of each channel.
_COUNTS = ("n_cells", "mask_area")
_IMAGE_STATISTIC = re.compile(f"^({'|'.join(STATISTICS)})_")


def load_profiles(
    config: ProfileConfig, table: pd.DataFrame | None = None
) -> tuple[Profiles, Bool[np.ndarray, " n"], str]:
    """Load profiles that have a label.

    Prints what was left out or changed.

    Args:
        config: input.
        table: read in place of `config.features`.

    Returns:
        The profiles, whether each is a negative control, and the name of the label column.

    Raises:
        InputError: A file cannot be used, see `read_profiles`; the label column is missing or
            empty.
    """
    if config.source.data:
        profiles = read_source(config.source)
    else:
        sources = list(config.features) if table is None else [table]
        profiles = read_profiles(sources, config.aggregate)
    label = config.label_column or profiles.label_column
    if not label:
        raise InputError(
            "--label-column: is required, because the datasets of --data have no common label "
            "column"
        )
    if config.aggregate != "none":
        profiles.column(label)
        wells = aggregate_to_wells(profiles, config.aggregate)
        if label not in wells.metadata.columns:
            raise InputError(_describe_two_labels(profiles, label))
        profiles = wells
    empty = (profiles.column(label) == "").to_numpy()
    if empty.all():
        raise InputError(f"{config.where}: column {label} is empty. Choose another --label-column.")
    notes = list(profiles.notes)
    if empty.any():
        notes.append(f"left out {empty.sum()} rows without {label}")
        profiles = profiles.take(~empty)
    if (unused := in_empty_wells(profiles.metadata)).any():
        notes.append(f"left out {unused.sum()} rows of empty wells ({CONTROL_TYPE}={EMPTY})")
        profiles = profiles.take(~unused)
    if config.features:
        # Tables can contain numbers that are annotations. Features extracted from a dataset
        # cannot.
        columns = {name: profiles.column(name) for name in (label, PLATE, WELL)}
        annotations, warnings = find_annotations(profiles.values, profiles.names, columns)
        notes += warnings
        if len(annotations) == len(profiles.names):
            raise InputError(
                f"{config.where}: no feature is a measurement: each has one value per class or "
                f"plate ({annotations[0]})"
            )
        profiles = profiles.drop_features(annotations) if annotations else profiles
    notes += [
        f"warning: labels differ only in upper and lower case: {', '.join(group)}. They are "
        "different classes."
        for group in case_variants(profiles.column(label))
    ]
    notes.insert(0, f"{len(profiles)} profiles with {len(profiles.names)} features")
    for note in notes:
        console.print(note if note.startswith("warning: ") else f"info: {note}")
    # Without controls, the steps that need them report it.
    return profiles, negative_controls(profiles.metadata, label, config.negcon), label


def _describe_two_labels(profiles: Profiles, label: str) -> str:
    keys = [profiles.metadata[PLATE], profiles.metadata[WELL]]
    plate, well = profiles.metadata.groupby(keys)[label].nunique().idxmax()
    return (
        f"{label}: plate {plate}, well {well} has several values. Give each well one value, or "
        "choose another --label-column."
    )


def read_source(source: SourceConfig) -> Profiles:
    """Return features of every site of a dataset, from the feature cache or extracted now.

    With `source.statistics`, logarithms of the image statistics of the index are added as features.

    Raises:
        InputError: The dataset or the weights cannot be used.
    """
    dataset = open_dataset(source.data)
    profiles = read_profiles([cached_features(source, dataset)])
    measured = image_statistics(dataset)
    values, names = profiles.values, profiles.names
    if source.statistics:
        logarithms = np.log1p(measured.clip(lower=0)).to_numpy(np.float32)
        values = np.concatenate([values, logarithms], axis=1)
        names = (*names, *(f"{STATISTIC}log_{name}" for name in measured))
    return dataclasses.replace(
        profiles, values=values, names=names, label_column=dataset.label_column, measured=measured
    )


def image_statistics(dataset: Dataset) -> pd.DataFrame:
    """Return the number and area of cells and the pixel statistics of channels of each site."""
    columns = [name for name in dataset.index.columns if not name.startswith(METADATA)]
    measured = [name for name in columns if name in _COUNTS or _IMAGE_STATISTIC.match(name)]
    return dataset.index[measured].reset_index(drop=True)
