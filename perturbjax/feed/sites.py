"""What training needs to know of a dataset's records beside their pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64, Int32

from perturbjax.config import InputConfig
from perturbjax.dataset import PLATE, SiteDataset


@dataclasses.dataclass(frozen=True)
class Sites:
    """All that training needs of a dataset's n records beside their pixels, in record order."""

    class_names: tuple[str, ...]
    """Names in logit order."""
    labels: Int32[np.ndarray, " n"]
    """Index into `class_names`, -1 where the record's class is not among them."""
    shift: Float32[np.ndarray, "n seen"]
    """Model input is (image - shift) * scale, all channels in each of k ways; both in stored units."""
    scale: Float32[np.ndarray, "n seen"]
    mask_of: Int32[np.ndarray, " n"]
    """The record whose mask goes with each image: its own, unless masks are shuffled."""


def describe_sites(
    dataset: SiteDataset, input: InputConfig, class_names: Sequence[str] | None = None, *, seed: int = 0
) -> Sites:
    """Labels and normalisation of every record, from the index alone: no image is decoded.

    `class_names` gives the logit order; None takes the sorted values of the label column. `seed` decides which mask
    each image gets under `mask_use="shuffle"`: one fixed cycle through all records, so that none keeps its own.

    Raises:
        InputError: the label column, or a channel's statistics, are not in the index.
    """
    values = dataset.column(input.label_column or dataset.label_column).astype(str)
    names = tuple(sorted(values.unique())) if class_names is None else tuple(class_names)
    labels = pd.Index(names).get_indexer(values).astype(np.int32)
    shift, scale = _normalization(dataset, input)
    mask_of = np.arange(len(dataset), dtype=np.int32)
    if input.mask_use == "shuffle":
        cycle = np.random.Generator(np.random.Philox(seed)).permutation(mask_of)
        mask_of[cycle] = np.roll(cycle, 1)
    return Sites(names, labels, shift, scale, mask_of)


def channels_seen(dataset: SiteDataset, input: InputConfig) -> int:
    """How many image channels the model sees: those stored, in each way they are normalised."""
    return len(dataset.channel_names) * (2 if input.normalize == "log_plate" else 1)


def _normalization(
    dataset: SiteDataset, input: InputConfig
) -> tuple[Float32[np.ndarray, "n seen"], Float32[np.ndarray, "n seen"]]:
    shape = (len(dataset), len(dataset.channel_names))
    if input.normalize == "dtype":
        largest = np.iinfo(dataset.image_dtype).max
        return np.zeros(shape, np.float32), np.full(shape, 1 / largest, np.float32)
    mean, std = _statistic(dataset, "mean"), _statistic(dataset, "std")
    if input.normalize in ("log", "log_plate"):
        background = np.maximum(np.median(_statistic(dataset, "p01"), axis=0), 1)
        centers = [np.zeros(shape)]
        if input.normalize == "log_plate":
            # log(1 + (x - mean) / (mean + background)) = log((x + background) / (mean + background))
            centers.append(_pool(mean, std, dataset.column(PLATE))[0])
        shift = np.concatenate(centers, axis=1).astype(np.float32)
        return shift, (1 / (shift + np.tile(background, len(centers)))).astype(np.float32)
    if input.normalize == "plate":
        mean, std = _pool(mean, std, dataset.column(PLATE))
    # A channel without any contrast (all one value) is only shifted.
    return mean.astype(np.float32), (1 / np.where(std > 0, std, 1)).astype(np.float32)


def _statistic(dataset: SiteDataset, name: str) -> Float64[np.ndarray, "n c"]:
    columns = [dataset.column(f"{name}_{channel}") for channel in dataset.channel_names]
    return np.stack(columns, axis=1).astype(np.float64)


def _pool(mean: np.ndarray, std: np.ndarray, plate: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of all pixels of a record's plate, from those of its sites (which are equal in size).

    The variance of a plate is the mean of its sites' variances plus the variance of their means.
    """
    plates = plate.to_numpy()
    plate_mean = pd.DataFrame(mean).groupby(plates).transform("mean").to_numpy()
    spread = std**2 + (mean - plate_mean) ** 2
    return plate_mean, np.sqrt(pd.DataFrame(spread).groupby(plates).transform("mean").to_numpy())
