"""Batches of a dataset that is stored on the device as a whole.

All records are decoded once, at the resolution that training crops use. A batch is then a gather by
index, which can be part of a larger jitted function: the training loop runs a whole epoch as one
device call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import Array, Float32, Int32

from perturbjax.core.progress import track
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.order import BatchOrder
from perturbjax.data.batches.protocol import Devices, ResidentArrays


def gather(
    arrays: ResidentArrays, indices: Int32[Array, " b"], weight: Float32[Array, " b"]
) -> RawBatch:
    """Gather a batch of resident records. Pure function, for use inside jit.

    Args:
        arrays: all records.
        indices: (b,) positions in the dataset.
        weight: (b,) 1 for a site, 0 for padding.
    """
    # `indices` also becomes the record numbers, which seed the augmentation.
    image, mask, label, shift, scale = (array[indices] for array in arrays)
    return RawBatch(image, mask, label, indices, weight, shift, scale)


class ResidentBatches:
    """A `BatchPipeline` with all records on every device."""

    def __init__(self, arrays: ResidentArrays, placement: Devices):
        """Copy `arrays` to the devices."""
        # Every device has a full copy, so that a shuffled batch needs no transfer between devices.
        self.arrays: ResidentArrays = placement.replicate(arrays)
        self._place = placement.place_rows
        self._gather = jax.jit(gather, out_shardings=placement.by_row)

    @classmethod
    def load(cls, decoder: Decoder, placement: Devices) -> ResidentBatches:
        """Decode all records in threads and copy them to the devices."""
        sites, n = decoder.sites, len(decoder.dataset)
        # Iteration over these arrays yields views: each thread writes one record in place, without
        # locks.
        image, mask = decoder.empty(n)
        with (
            ThreadPoolExecutor(os.cpu_count()) as threads,
            # Closing cancels the records that are not started, so that Ctrl-C takes effect at once.
            contextlib.closing(threads.map(decoder.read_into, range(n), image, mask)) as reads,  # type: ignore[type-var]
        ):
            # Reading the results also raises the errors of the threads.
            for _ in track(reads, total=n, label="Reading sites", unit="sites"):
                pass
        host: tuple[Any, ...] = (image, mask, sites.labels, sites.shift, sites.scale)
        return cls(ResidentArrays(*host), placement)

    def batches(self, order: BatchOrder) -> Iterator[RawBatch]:
        """Yield the batches of an order, with one device call for each."""
        for step in range(len(order)):
            yield self._gather(self.arrays, *self._place(order[step]))

    def close(self) -> None:
        """Free the memory of the devices."""
        jax.tree.map(lambda array: array.delete(), self.arrays)

    def __enter__(self) -> ResidentBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
