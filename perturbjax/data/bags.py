"""Bags: the cells of a site as the input of a network.

`CellBags` cuts the cells out of each site when it is read. The windows of a site are stacked into
one tall image, so that all batch pipelines store and gather bags like sites. `prepare_input`
separates the windows on the device, chooses the cells of a training step, and augments every cell
by itself.

A window of padding has only zeros in all channels. Windows of cells never do in practice.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float32, Int, Key, UInt, UInt16

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data.augmentation import RawBatch, prepare, record_keys
from perturbjax.data.cells import CellTable, CropConfig, crop_windows, select_cells
from perturbjax.dataset import SiteSource
from perturbjax.models.bags import Bags

#: Folded into the key of a record: choice of cells in a training step, and augmentation of cells.
#: 1 is the stream of dropout.
CHOICE_STREAM, CELL_STREAM = 2, 3


class CellBags:
    """The cells of each site as one tall image, with the interface of a dataset (`SiteSource`).

    Attributes:
        size: height and width of the window of a cell in stored pixels.
    """

    def __init__(self, dataset: SiteSource, input: InputConfig):
        """
        Args:
            dataset: sites; they may differ in size.
            input: `cells`, the number of windows of a site, and `cell_size`, their size in pixels.
        """
        self._dataset, self._cells, self.size = dataset, input.cells, int(input.cell_size)
        # The seed is fixed, so that every run gets the same cells of a site.
        self._config = CropConfig(crop_size=self.size, max_cells=input.cells)
        self._site_ids = dataset.column("site_id").to_numpy()
        self.path: Path = dataset.path

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def channel_names(self) -> list[str]:
        """Names of the image channels."""
        return self._dataset.channel_names

    @property
    def image_dtype(self) -> np.dtype:
        """Type of the stored pixels."""
        return self._dataset.image_dtype

    @property
    def label_column(self) -> str:
        """Label column of the dataset."""
        return self._dataset.label_column

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the windows of a site, one below the other."""
        return self._cells * self.size, self.size

    def column(self, name: str) -> pd.Series:
        """A column of the index."""
        return self._dataset.column(name)

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Read the windows of a site. The mask shows the cell of each window only."""
        site_image, site_mask = self._dataset.pixels(position)
        cells = self._select(position, site_mask)
        corners = np.rint(cells.centroids).astype(int) - self.size // 2
        images, labels = crop_windows(site_image, site_mask, corners, self.size)
        shape = (self._cells, self.size, self.size)
        image = np.zeros((*shape, len(self.channel_names)), self.image_dtype)
        mask = np.zeros(shape, np.uint16)
        image[: len(cells)] = images
        # Without the neighbors of each cell.
        mask[: len(cells)] = labels * (labels == cells.objects[:, None, None])
        return image.reshape(-1, *image.shape[2:]), mask.reshape(-1, self.size)

    def cells(self, position: int) -> CellTable:
        """List the cells of a site in the order of their windows; decodes the site."""
        return self._select(position, self._dataset.pixels(position)[1])

    def _select(self, position: int, mask: UInt16[np.ndarray, "h w"]) -> CellTable:
        return select_cells(mask, self._config, str(self._site_ids[position]))[0]


def prepare_input(
    raw: RawBatch,
    *,
    seed: int | Int[Array, ""],
    epoch: int | Int[Array, ""],
    augment: AugmentConfig,
    input: InputConfig,
    train: bool,
) -> Float32[Array, "b crop crop channels"] | Bags:
    """Convert a batch of stored sites to network input, whole sites or bags of cells.

    Arguments as of `augmentation.prepare`. A training step uses `input.cells_per_step` cells of
    each site, chosen at random in each epoch; evaluation uses all. The result for a cell depends on
    (seed, epoch, record, cell) only.
    """
    prepare_windows = partial(
        prepare, seed=seed, epoch=epoch, augment=augment, input=input, train=train
    )
    if not input.cells:
        return prepare_windows(raw)
    b, height, width, channels = raw.image.shape
    shape = (b, input.cells, height // input.cells, width)
    image, mask = raw.image.reshape(*shape, channels), raw.mask.reshape(shape)
    present = jnp.any(image > 0, axis=(2, 3, 4))
    keys = record_keys(seed, epoch, raw.record)
    chosen = _choose_cells(present, keys, input.cells_per_step if train else 0)
    image, mask, present = (_take(array, chosen) for array in (image, mask, present))
    # One row for each cell; intensities are normalized like those of the site.
    n = chosen.shape[1]
    windows = RawBatch(
        image.reshape(b * n, *image.shape[2:]),
        mask.reshape(b * n, *mask.shape[2:]),
        *(jnp.repeat(values, n, axis=0) for values in raw[2:]),
    )
    x = prepare_windows(windows, keys=_cell_keys(keys, chosen))
    return Bags(x.reshape(b, n, *x.shape[1:]), present)


def _choose_cells(
    present: Bool[Array, "b n"], keys: Key[Array, " b"], count: int
) -> Int[Array, "b m"]:
    """Return the numbers of the cells that are used; padding comes last. 0 uses all in order."""
    b, n = present.shape
    if not count or count >= n:
        return jnp.broadcast_to(jnp.arange(n), (b, n))
    streams = jax.vmap(jax.random.fold_in, (0, None))(keys, CHOICE_STREAM)
    order = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(streams)
    return jnp.argsort(jnp.where(present, order, 2.0), axis=1)[:, :count]


def _take(array: Array, chosen: Int[Array, "b m"]) -> Array:
    return jax.vmap(lambda row, numbers: row[numbers])(array, chosen)


def _cell_keys(keys: Key[Array, " b"], chosen: Int[Array, "b m"]) -> Key[Array, " bm"]:
    """Return the random key of each cell."""
    streams = jax.vmap(jax.random.fold_in, (0, None))(keys, CELL_STREAM)
    cells = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(streams, chosen)
    return cells.reshape(-1)
