"""A dataset as a table of profiles: a backbone's features of every site, and the statistics of its index."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd

from perturbjax.dataset import STATISTICS, Dataset, open_dataset
from perturbjax.profiles.feature_cache import kept_features
from perturbjax.profiles.profile_options import SourceConfig
from perturbjax.profiles.profile_table import METADATA, STATISTIC, Profiles, read_profiles

#: Statistics that grow as light and cells do, and so are compared as logarithms.
_COUNTED = ("n_cells", "mask_area")
_MEASURED = re.compile(f"^({'|'.join(STATISTICS)})_")


def read_source(source: SourceConfig) -> Profiles:
    """Features of every site of a dataset, extracted or as they were kept, and the index's statistics if asked for.

    Raises:
        InputError: the dataset or the weights cannot be used.
    """
    dataset = open_dataset(source.data)
    profiles = read_profiles([kept_features(source, dataset)])
    measured = statistics_of(dataset)
    values, names = profiles.values, profiles.names
    if source.statistics:
        values = np.concatenate(
            [values, np.log1p(measured.clip(lower=0)).to_numpy(np.float32)], axis=1
        )
        names = (*names, *(f"{STATISTIC}log_{name}" for name in measured))
    return dataclasses.replace(
        profiles, values=values, names=names, label_column=dataset.label_column, measured=measured
    )


def statistics_of(dataset: Dataset) -> pd.DataFrame:
    """What the index measured of every site, in stored units: number and area of the cells, pixels of each channel."""
    index = dataset.index
    columns = [name for name in index.columns if not name.startswith(METADATA)]
    return index[
        [name for name in columns if name in _COUNTED or _MEASURED.match(name)]
    ].reset_index(drop=True)
