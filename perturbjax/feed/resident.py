"""The whole dataset on the device, so that an epoch can be one dispatch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt

from perturbjax.augment import RawBatch
from perturbjax.config import AugmentConfig, InputConfig
from perturbjax.console import track
from perturbjax.dataset import SiteDataset
from perturbjax.feed.decode import Decoder
from perturbjax.feed.sites import Sites


class ResidentArrays(NamedTuple):
    """Every record of a dataset, on the device. A pytree, to be passed to the jitted epoch."""

    image: UInt[Array, "n h w c"]
    mask: UInt[Array, "n h w"]
    label: Int32[Array, " n"]
    shift: Float32[Array, "n c"]
    scale: Float32[Array, "n c"]


def gather(arrays: ResidentArrays, indices: Int32[Array, " b"], weight: Float32[Array, " b"]) -> RawBatch:
    """A batch of resident sites; pure, for use inside jit. `indices` are positions in the dataset."""
    image, mask, label, shift, scale = (array[indices] for array in arrays)
    return RawBatch(image, mask, label, indices, weight, shift, scale)


class ResidentFeed:
    """The whole dataset on the device, decoded once.

    Attributes:
        arrays: what `gather` takes batches from.
    """

    def __init__(
        self,
        dataset: SiteDataset,
        sites: Sites,
        input: InputConfig,
        *,
        augment: AugmentConfig | None = None,
        place: Callable[[ResidentArrays], ResidentArrays] = jax.device_put,
    ):
        """Decode everything and hand it to `place`, which puts it on the device (or replicates it over several).

        `augment` lets sites be stored at the finest resolution that its crops can use; None stores them whole.
        """
        decoder = Decoder(dataset, sites, input, augment)
        n = len(dataset)
        image, mask = decoder.empty(n)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            reads = threads.map(decoder.read_into, range(n), image, mask)
            for _ in track(reads, total=n, label="load", unit="sites"):
                pass
        self.arrays: ResidentArrays = place(ResidentArrays(image, mask, sites.labels, sites.shift, sites.scale))

    def close(self) -> None:
        """Free the device's memory."""
        jax.tree.map(lambda array: array.delete(), self.arrays)

    def batches(
        self, indices: Int32[np.ndarray, "steps batch"], weight: Float32[np.ndarray, "steps batch"]
    ) -> Iterator[RawBatch]:
        """The batches of an order, one dispatch each; a whole epoch in one is the training loop's own affair."""
        take = jax.jit(gather)
        for row, row_weight in zip(indices, weight, strict=True):
            yield take(self.arrays, row, row_weight)
