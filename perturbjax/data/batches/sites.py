"""Labels and normalization of the records of a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int32

from perturbjax.core.config import InputConfig
from perturbjax.data.normalization import Statistics, site_intensities
from perturbjax.dataset import SiteSource


@dataclasses.dataclass(frozen=True)
class Sites:
    """All inputs of training except pixels, for n records in record order."""

    class_names: tuple[str, ...]
    """Names in logit order."""
    labels: Int32[np.ndarray, " n"]
    """Index into `class_names`; -1 if the class of the record is not among them."""
    shift: Float32[np.ndarray, "n kc"]
    """Shift and scale of each channel in stored units, see `normalization.normalize`."""
    scale: Float32[np.ndarray, "n kc"]
    mask_of: Int32[np.ndarray, " n"]
    """Record whose mask is combined with each image: the same record, unless masks are shuffled."""


def describe_sites(
    dataset: SiteSource,
    input: InputConfig,
    class_names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    statistics: Statistics | None = None,
) -> Sites:
    """Collect labels and normalization of all records from the index; no image is decoded.

    Args:
        dataset: n sites.
        input: label column, normalization and use of masks.
        class_names: names in logit order. None: the sorted values of the label column. Empty:
            labels are not read, and the dataset can be without labels.
        seed: for `mask_use="shuffle"`: a random cycle through all records, so that no image keeps
            its mask.
        statistics: statistics of the training data; None fits them to this dataset.

    Raises:
        InputError: the index has no label column, or no statistics of a channel.
    """
    names: tuple[str, ...] = ()
    labels = np.full(len(dataset), -1, np.int32)
    # An empty list means prediction, which needs no labels.
    if class_names is None or len(class_names):
        values = dataset.column(input.label_column or dataset.label_column).astype(str)
        names = tuple(sorted(values.unique())) if class_names is None else tuple(class_names)
        # `get_indexer` gives -1 for values without a class.
        labels = pd.Index(names).get_indexer(values).astype(np.int32)
    shift, scale = site_intensities(dataset, input, statistics)
    mask_of = np.arange(len(dataset), dtype=np.int32)
    if input.mask_use == "shuffle":
        cycle = np.random.Generator(np.random.Philox(seed)).permutation(mask_of)
        # Each record gets the mask of its predecessor in the cycle.
        mask_of[cycle] = np.roll(cycle, 1)
    return Sites(names, labels, shift, scale, mask_of)
