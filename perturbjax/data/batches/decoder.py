"""From a record on disk to the integers that every feed gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data import mask_encodings as masks
from perturbjax.data.augmentation import RawBatch, mip_levels
from perturbjax.data.batches.order import Order, Rows
from perturbjax.data.batches.sites import Sites
from perturbjax.dataset import SiteSource

#: Instance numbers of a site, to others of the same size.
Redraw = Callable[[UInt16[np.ndarray, "h w"]], UInt16[np.ndarray, "h w"]]


class Decoder:
    """From positions in the dataset to what a feed gives; grain's workers are each given a copy."""

    def __init__(
        self,
        dataset: SiteSource,
        sites: Sites,
        input: InputConfig,
        augment: AugmentConfig | None = None,
        redraw: Redraw | None = None,
    ):
        """`augment` lets sites be stored at the finest resolution that its crops can use; None stores them whole.
        `redraw` makes other cells of a site's instance numbers before they are encoded."""
        self.dataset, self.sites, self.input, self.redraw = dataset, sites, input, redraw
        self.halvings = mip_levels(*dataset.image_size, augment, random=True)[0] if augment else 0

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) in pixels of every site as it is fed: halved as often as may be."""
        height, width = (-(-side // 2**self.halvings) for side in self.dataset.image_size)
        return height, width

    def empty(self, n: int) -> tuple[UInt[np.ndarray, "n h w c"], UInt[np.ndarray, "n h w"]]:
        """Images and masks of n sites, to be read into."""
        shape = (n, *self.stored_size)
        image = np.empty((*shape, len(self.dataset.channel_names)), self.dataset.image_dtype)
        return image, np.empty(shape, masks.storage_dtype(self.input.mask_encoding))

    def read_into(
        self, position: int, image: UInt[np.ndarray, "h w c"], mask: UInt[np.ndarray, "h w"]
    ) -> None:
        """Decode one record."""
        pixels, instances = self.dataset.pixels(position)
        if (other := self.sites.mask_of[position]) != position:
            _, instances = self.dataset.pixels(other)
        for _ in range(self.halvings):
            pixels, instances = _halve(pixels, instances)
        instances = instances if self.redraw is None else self.redraw(instances)
        image[:], mask[:] = pixels, masks.encode(instances, self.input.mask_encoding)

    def __call__(self, step: Rows) -> RawBatch:
        """The batch of one step, on the host; a record that stands in it more than once is decoded once."""
        positions, weight = step
        image, mask = self.empty(len(positions))
        rows: dict[int, int] = {}
        for row, position in enumerate(positions):
            first = rows.setdefault(int(position), row)
            if first == row:
                self.read_into(position, image[row], mask[row])
            else:
                image[row], mask[row] = image[first], mask[first]
        label, shift, scale = (
            of[positions] for of in (self.sites.labels, self.sites.shift, self.sites.scale)
        )
        host: tuple[Any, ...] = (image, mask, label, positions, weight, shift, scale)
        return RawBatch(*host)

    def batches(self, order: Order) -> Iterator[RawBatch]:
        """The batches of an order, on the host, each decoded when it is asked for."""
        return (self(order[at]) for at in range(len(order)))


def _halve(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"]
) -> tuple[UInt[np.ndarray, "h2 w2 c"], UInt16[np.ndarray, "h2 w2"]]:
    """Image averaged over 2 × 2 pixels, mask picked from them; an odd last row or column is repeated."""
    if any(side % 2 for side in mask.shape):
        pad = [(0, side % 2) for side in mask.shape]
        image, mask = np.pad(image, [*pad, (0, 0)], mode="edge"), np.pad(mask, pad, mode="edge")
    rows = np.add(
        image[0::2], image[1::2], dtype=np.uint16 if image.dtype == np.uint8 else np.uint32
    )
    mean = (rows[:, 0::2] + rows[:, 1::2] + 2) >> 2
    return mean.astype(image.dtype), mask[1::2, 1::2]
