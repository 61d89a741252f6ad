"""Tiles as units: a grid of overlapping windows of native resolution, for fields without masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt, UInt16

from perturbjax.data.cells import CROP_MULTIPLE, crop_windows
from perturbjax.dataset import Dataset

#: Default height and width of a tile in pixels: the usual input size of ImageNet networks.
TILE_SIZE = 224
#: Minimum fraction of a tile that it shares with its neighbor.
OVERLAP = 0.25


@dataclass(frozen=True)
class SiteTiles:
    """The tiles of a decoded site. Pixels are copied by `crop` only.

    Attributes:
        corners: row and column of the upper left pixel of each tile.
        image: (H, W, C) stored integers of the site.
        mask: (H, W) instance labels of the site.
        size: height and width of the tiles in pixels.
    """

    corners: Int[np.ndarray, "n 2"]
    image: UInt[np.ndarray, "h w c"]
    mask: UInt16[np.ndarray, "h w"]
    size: int

    def __len__(self) -> int:
        return len(self.corners)

    def crop(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[UInt[np.ndarray, "n s s c"], UInt16[np.ndarray, "n s s"]]:
        """Crop images (n, size, size, C) and instance labels from tile `start` to `stop`."""
        return crop_windows(self.image, self.mask, self.corners[start:stop], self.size)


class TileReader:
    """Read the tiles of a dataset, site by site.

    Attributes:
        size: height and width of all tiles in pixels.
    """

    def __init__(self, dataset: Dataset, size: int = 0):
        """
        Args:
            dataset: sites, which may differ in size.
            size: of the tiles in pixels; 0: 224, or less if all sites are smaller.
        """
        self.dataset = dataset
        longest = int(dataset.index[["height", "width"]].to_numpy().max())
        self.size = size or min(TILE_SIZE, -(-longest // CROP_MULTIPLE) * CROP_MULTIPLE)

    def count(self, position: int) -> int:
        """Return the number of tiles of a site."""
        height, width = self.dataset.index[["height", "width"]].iloc[position]
        return len(place_tiles(int(height), int(width), self.size))

    def read(self, position: int) -> SiteTiles:
        """Decode a site and place its tiles."""
        image, mask = self.dataset.pixels(position)
        height, width = mask.shape
        return SiteTiles(place_tiles(height, width, self.size), image, mask, self.size)


def place_tiles(
    height: int, width: int, size: int, overlap: float = OVERLAP
) -> Int[np.ndarray, "n 2"]:
    """Place a grid of overlapping tiles that covers a site.

    The first tile of an axis begins at the first pixel and the last one ends at the last pixel;
    the tiles between them have equal distances. An axis shorter than a tile has one centered tile.

    Args:
        height: of the site in pixels.
        width: of the site in pixels.
        size: height and width of a tile in pixels.
        overlap: minimum fraction of a tile that it shares with its neighbor, in [0, 1).

    Returns:
        Row and column of the upper left pixel of each tile, for `crop_windows`.
    """

    def starts(length: int) -> Int[np.ndarray, " k"]:
        if length <= size:
            return np.array([(length - size) // 2])
        count = 1 + int(np.ceil((length - size) / (size * (1 - overlap))))
        return np.rint(np.linspace(0, length - size, count)).astype(int)

    rows, columns = np.meshgrid(starts(height), starts(width), indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], axis=1)
