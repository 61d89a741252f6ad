"""From a record on disk to the integers that both feeds store."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32, UInt, UInt16

from perturbjax import masks
from perturbjax.augment import RawBatch, mip_levels
from perturbjax.config import AugmentConfig, InputConfig
from perturbjax.dataset import SiteDataset
from perturbjax.feed.sites import Sites


class Decoder:
    """From positions in the dataset to what a feed stores; grain's workers are each given a copy."""

    def __init__(self, dataset: SiteDataset, sites: Sites, input: InputConfig, augment: AugmentConfig | None):
        self.dataset, self.sites, self.input = dataset, sites, input
        self.halvings = halvings(dataset, augment)

    def empty(self, n: int) -> tuple[UInt[np.ndarray, "n h w c"], UInt[np.ndarray, "n h w"]]:
        """Images and masks of n sites, to be read into."""
        shape = (n, *stored_size(self.dataset, self.halvings))
        image = np.empty((*shape, len(self.dataset.channel_names)), self.dataset.image_dtype)
        return image, np.empty(shape, masks.storage_dtype(self.input.mask_encoding))

    def read_into(self, position: int, image: UInt[np.ndarray, "h w c"], mask: UInt[np.ndarray, "h w"]) -> None:
        """Decode one record."""
        pixels, instances = self.dataset.pixels(position)
        if (other := self.sites.mask_of[position]) != position:
            _, instances = self.dataset.pixels(other)
        for _ in range(self.halvings):
            pixels, instances = _halve(pixels, instances)
        image[:], mask[:] = pixels, masks.encode(instances, self.input.mask_encoding)

    def __call__(self, step: tuple[Int32[np.ndarray, " b"], Float32[np.ndarray, " b"]]) -> RawBatch:
        """The batch of one step's positions and weights."""
        positions, weight = step
        image, mask = self.empty(len(positions))
        for row, position in enumerate(positions):
            self.read_into(position, image[row], mask[row])
        label, shift, scale = (of[positions] for of in (self.sites.labels, self.sites.shift, self.sites.scale))
        return RawBatch(image, mask, label, positions, weight, shift, scale)


def halvings(dataset: SiteDataset, augment: AugmentConfig | None) -> int:
    """How often sites may be halved before storing: to the finest level that `augment` samples from."""
    return mip_levels(*dataset.image_size, augment, random=True)[0] if augment else 0


def stored_size(dataset: SiteDataset, halvings: int) -> tuple[int, int]:
    height, width = (-(-side // 2**halvings) for side in dataset.image_size)
    return height, width


def _halve(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"]
) -> tuple[UInt[np.ndarray, "h/2 w/2 c"], UInt16[np.ndarray, "h/2 w/2"]]:
    """Image averaged over 2 × 2 pixels, mask picked from them; an odd last row or column is repeated."""
    if any(side % 2 for side in mask.shape):
        pad = [(0, side % 2) for side in mask.shape]
        image, mask = np.pad(image, [*pad, (0, 0)], mode="edge"), np.pad(mask, pad, mode="edge")
    rows = np.add(image[0::2], image[1::2], dtype=np.uint16 if image.dtype == np.uint8 else np.uint32)
    mean = (rows[:, 0::2] + rows[:, 1::2] + 2) >> 2
    return mean.astype(image.dtype), mask[1::2, 1::2]
