"""What training needs to know of a dataset's records beside their pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int32

from perturbjax.core.config import InputConfig
from perturbjax.data import normalization
from perturbjax.dataset import SiteSource


@dataclasses.dataclass(frozen=True)
class Sites:
    """All that training needs of a dataset's n records beside their pixels, in record order."""

    class_names: tuple[str, ...]
    """Names in logit order."""
    labels: Int32[np.ndarray, " n"]
    """Index into `class_names`, -1 where the record's class is not among them."""
    shift: Float32[np.ndarray, "n seen"]
    """What the model input is made with, see `normalization.normalize`: all channels in each of k ways; in stored units."""
    scale: Float32[np.ndarray, "n seen"]
    mask_of: Int32[np.ndarray, " n"]
    """The record whose mask goes with each image: its own, unless masks are shuffled."""


def describe_sites(
    dataset: SiteSource,
    input: InputConfig,
    class_names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    statistics: normalization.Statistics | None = None,
) -> Sites:
    """Labels and normalisation of every record, from the index alone: no image is decoded.

    `class_names` gives the logit order; None takes the sorted values of the label column; where they are none, nobody
    asks for labels, and the dataset need have none. `seed` decides which mask each image gets under
    `mask_use="shuffle"`: one fixed cycle through all records, so that none keeps its own.
    `statistics` are those that the run was trained with; None fits them to this dataset.

    Raises:
        InputError: the label column, or a channel's statistics, are not in the index.
    """
    names: tuple[str, ...] = ()
    labels = np.full(len(dataset), -1, np.int32)
    if class_names is None or len(class_names):
        values = dataset.column(input.label_column or dataset.label_column).astype(str)
        names = tuple(sorted(values.unique())) if class_names is None else tuple(class_names)
        labels = pd.Index(names).get_indexer(values).astype(np.int32)
    shift, scale = normalization.site_intensities(dataset, input, statistics)
    mask_of = np.arange(len(dataset), dtype=np.int32)
    if input.mask_use == "shuffle":
        cycle = np.random.Generator(np.random.Philox(seed)).permutation(mask_of)
        mask_of[cycle] = np.roll(cycle, 1)
    return Sites(names, labels, shift, scale, mask_of)
