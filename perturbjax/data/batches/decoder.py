"""Decode records of a dataset to the stored integers of a batch, on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt, UInt16

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data import mask_encodings as masks
from perturbjax.data.augmentation import RawBatch, mip_levels
from perturbjax.data.bags import CellBags
from perturbjax.data.batches.order import BatchOrder, BatchRecords
from perturbjax.data.batches.sites import Sites
from perturbjax.dataset import EqualSites, SiteSource

#: Instance labels of a site to instance labels of the same shape.
MaskTransform = Callable[[UInt16[np.ndarray, "h w"]], UInt16[np.ndarray, "h w"]]


class MaskChange(NamedTuple):
    """Change of a batch of encoded masks, and of the cells of each site before encoding."""

    change: Callable[[np.ndarray], np.ndarray] = lambda masks: masks
    mask_transform: MaskTransform | None = None

    def change_batch(self, batch: RawBatch, first: int) -> RawBatch:
        """Change the masks of a batch on the host."""
        changed: Any = self.change(np.asarray(batch.mask))
        return batch._replace(mask=changed)


def stored_halvings(image_size: Sequence[int], augment: AugmentConfig) -> int:
    """Return how often sites are downsampled by 2 before they are stored on the device.

    All crops use this averaging level or a coarser one, so finer pixels are never needed.

    Args:
        image_size: (height, width) of the sites in pixels.
        augment: crops of training.
    """
    height, width = image_size
    return mip_levels(height, width, augment, random=True)[0]


class Decoder:
    """Read and encode records by position. Each grain worker gets a pickled copy."""

    def __init__(
        self,
        dataset: SiteSource,
        sites: Sites,
        input: InputConfig,
        augment: AugmentConfig | None = None,
        mask_transform: MaskTransform | None = None,
    ):
        """
        Args:
            dataset: n sites, of one size unless the input consists of cells.
            sites: labels, shift and scale of its records.
            input: mask encoding.
            augment: crops of training; sites are downsampled to the finest resolution that these
                crops use. None keeps the full resolution.
            mask_transform: changes the instance labels of a site before they are encoded.
        """
        self.dataset: EqualSites = CellBags(dataset, input) if input.cells else dataset  # type: ignore[assignment]
        self.sites, self.input, self.mask_transform = sites, input, mask_transform
        # Windows of cells are squares.
        height, width = self.dataset.image_size
        window = (width, width) if input.cells else (height, width)
        self.halvings = stored_halvings(window, augment) if augment else 0

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the decoded sites: the size on disk, halved `halvings`
        times.
        """
        height, width = (-(-length // 2**self.halvings) for length in self.dataset.image_size)
        return height, width

    def empty(self, n: int) -> tuple[UInt[np.ndarray, "n h w c"], UInt[np.ndarray, "n h w"]]:
        """Allocate images (n, H, W, C) and masks (n, H, W) for n sites."""
        shape = (n, *self.stored_size)
        image = np.empty((*shape, len(self.dataset.channel_names)), self.dataset.image_dtype)
        return image, np.empty(shape, masks.storage_dtype(self.input.mask_encoding))

    def read_into(
        self, position: int, image: UInt[np.ndarray, "h w c"], mask: UInt[np.ndarray, "h w"]
    ) -> None:
        """Decode one record into `image` and `mask`."""
        pixels, instances = self.dataset.pixels(position)
        # With shuffled masks, the instances belong to another site than the pixels.
        if (other := self.sites.mask_of[position]) != position:
            _, instances = self.dataset.pixels(other)
        for _ in range(self.halvings):
            pixels, instances = _halve(pixels, instances)
        if self.mask_transform is not None:
            instances = self.mask_transform(instances)
        image[:] = pixels
        # Windows of a bag are encoded separately, because outlines depend on adjacent pixels.
        for window, part in zip(self._windows(instances), self._windows(mask), strict=True):
            part[:] = masks.encode(window, self.input.mask_encoding)

    def _windows(self, mask: UInt[np.ndarray, "h w"]) -> UInt[np.ndarray, "n h2 w"]:
        """View the mask of a site as windows: one, or those of its cells."""
        return mask.reshape(self.input.cells or 1, -1, mask.shape[1])

    def __call__(self, step: BatchRecords) -> RawBatch:
        """Decode the batch of one step. Records that occur several times (padding) are decoded
        once.
        """
        positions, weight = step
        image, mask = self.empty(len(positions))
        first_row: dict[int, int] = {}
        for row, position in enumerate(positions):
            # Padding repeats records of the batch.
            first = first_row.setdefault(int(position), row)
            if first == row:
                self.read_into(position, image[row], mask[row])
            else:
                image[row], mask[row] = image[first], mask[first]
        sites = self.sites
        label, shift, scale = (x[positions] for x in (sites.labels, sites.shift, sites.scale))
        host: tuple[Any, ...] = (image, mask, label, positions, weight, shift, scale)
        return RawBatch(*host)

    def batches(
        self, order: BatchOrder, change: Callable[[RawBatch, int], RawBatch] | None = None
    ) -> Iterator[RawBatch]:
        """Decode the batches of an order one by one, on the host.

        Args:
            order: records of each batch.
            change: function of a batch and the number of its first row; padded rows count.
        """
        first = 0
        for step in range(len(order)):
            batch = self(order[step])
            yield change(batch, first) if change else batch
            first += len(batch.weight)


def merge_batches(
    pipelines: Sequence[Callable[[BatchOrder], Iterable[RawBatch]]],
    positions: Int[np.ndarray, " n"],
    read_size: int,
    place: Callable[[RawBatch], RawBatch],
    size: int = 0,
) -> Callable[[BatchOrder], Iterator[RawBatch]]:
    """Return a batch pipeline that joins the rows of several pipelines, without their padding.

    Args:
        pipelines: batch pipelines.
        positions: records of each pipeline.
        read_size: rows of the batches of the pipelines.
        place: function that copies a batch to the devices.
        size: rows of each new batch, 0 for `read_size`; the last one is padded with its first row.
    """

    def rows() -> Iterator[tuple[Any, ...]]:
        order = BatchOrder.single_pass(positions, read_size)
        for batch in itertools.chain.from_iterable(batches(order) for batches in pipelines):
            host = [np.asarray(values) for values in batch]
            for row in np.flatnonzero(batch.weight):
                yield tuple(values[row] for values in host)

    def merged(order: BatchOrder) -> Iterator[RawBatch]:
        sites, count = rows(), size or read_size
        while group := list(itertools.islice(sites, count)):
            group += group[:1] * (count - len(group))
            arrays: Iterable[Any] = map(np.stack, zip(*group, strict=True))
            yield place(RawBatch(*arrays))

    return merged


def _halve(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"]
) -> tuple[UInt[np.ndarray, "h2 w2 c"], UInt16[np.ndarray, "h2 w2"]]:
    """Downsample by 2: rounded mean of 2 × 2 pixels, and one label of each block of the mask.

    An odd last row or column is repeated first.
    """
    if any(length % 2 for length in mask.shape):
        pad = [(0, length % 2) for length in mask.shape]
        image, mask = np.pad(image, [*pad, (0, 0)], mode="edge"), np.pad(mask, pad, mode="edge")
    # The sum of four pixels needs two more bits than a pixel.
    sum_dtype = np.uint16 if image.dtype == np.uint8 else np.uint32
    rows = np.add(image[0::2], image[1::2], dtype=sum_dtype)
    # Adding 2 before the division by 4 rounds to the nearest integer. Labels cannot be averaged:
    # the lower right pixel represents its block.
    mean = (rows[:, 0::2] + rows[:, 1::2] + 2) >> 2
    return mean.astype(image.dtype), mask[1::2, 1::2]
