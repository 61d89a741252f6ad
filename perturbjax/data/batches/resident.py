"""The whole dataset on the device, so that an epoch can be one dispatch."""

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
from perturbjax.data.batches.order import Order
from perturbjax.data.batches.protocol import Devices, ResidentArrays


def gather(
    arrays: ResidentArrays, indices: Int32[Array, " b"], weight: Float32[Array, " b"]
) -> RawBatch:
    """A batch of resident sites; pure, for use inside jit. `indices` are positions in the dataset."""
    image, mask, label, shift, scale = (array[indices] for array in arrays)
    return RawBatch(image, mask, label, indices, weight, shift, scale)


class ResidentFeed:
    """The whole dataset on every device, decoded once."""

    def __init__(self, arrays: ResidentArrays, placement: Devices):
        """Put arrays on the devices."""
        self.arrays: ResidentArrays = placement.replicate(arrays)
        self._place = placement.place_rows
        self._take = jax.jit(gather, out_shardings=placement.by_row)

    @classmethod
    def load(cls, decoder: Decoder, placement: Devices) -> ResidentFeed:
        """Decode everything, at the resolution that the decoder stores it in."""
        sites, n = decoder.sites, len(decoder.dataset)
        image, mask = decoder.empty(n)
        with (
            ThreadPoolExecutor(os.cpu_count()) as threads,
            # Closed first, it takes back what is not begun yet: who interrupts must not wait for the whole dataset.
            contextlib.closing(threads.map(decoder.read_into, range(n), image, mask)) as reads,  # type: ignore[type-var]
        ):
            for _ in track(reads, total=n, label="load", unit="sites"):
                pass
        host: tuple[Any, ...] = (image, mask, sites.labels, sites.shift, sites.scale)
        return cls(ResidentArrays(*host), placement)

    def batches(self, order: Order) -> Iterator[RawBatch]:
        """The batches of an order, one dispatch each; a whole epoch in one is the training loop's own affair."""
        for at in range(len(order)):
            yield self._take(self.arrays, *self._place(order[at]))

    def close(self) -> None:
        """Free the devices' memory."""
        jax.tree.map(lambda array: array.delete(), self.arrays)

    def __enter__(self) -> ResidentFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
