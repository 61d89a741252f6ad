"""From a record on disk to the integers that both feeds store."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax import masks
from perturbjax.augment import RawBatch, mip_levels
from perturbjax.config import AugmentConfig, InputConfig
from perturbjax.dataset import SiteDataset
from perturbjax.feed.sites import Sites


class Decoder:
    """From a position in the dataset to what a feed stores; grain's workers are each given a copy."""

    def __init__(self, dataset: SiteDataset, sites: Sites, input: InputConfig, augment: AugmentConfig | None):
        self.dataset, self.sites, self.input = dataset, sites, input
        self.halvings = halvings(dataset, augment)

    @property
    def stored_size(self) -> tuple[int, int]:
        return stored_size(self.dataset, self.halvings)

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt[np.ndarray, "h w"]]:
        image, mask = self.dataset.pixels(position)
        if (other := self.sites.mask_of[position]) != position:
            _, mask = self.dataset.pixels(other)
        for _ in range(self.halvings):
            image, mask = _halve(image, mask)
        return image, masks.encode(mask, self.input.mask_encoding)

    def __call__(self, place: tuple[np.int32, np.float32]) -> RawBatch:
        position, weight = place
        image, mask = self.pixels(position)
        label, shift, scale = (of[position] for of in (self.sites.labels, self.sites.shift, self.sites.scale))
        return RawBatch(image, mask, label, np.int32(position), weight, shift, scale)


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
    rows = np.add(image[0::2], image[1::2], dtype=np.uint32)
    mean = (rows[:, 0::2] + rows[:, 1::2] + 2) >> 2
    return mean.astype(image.dtype), mask[1::2, 1::2]
