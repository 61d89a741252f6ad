"""Cells as units: windows of native resolution, cropped when a site is read.

A dataset stores whole sites. A site is decoded once; its cells are then cut out of the decoded
image, so that no pixel is stored twice. Every function depends on the site, its mask and the seed
only: the cells of a site are the same in every order of reading and in joined datasets.

    reader = CellReader(dataset, CropConfig(max_cells=64))
    cells = reader.read(position)
    images, masks = cells.crop()         # (n, size, size, channels), (n, size, size)
    images, masks = cells.crop(0, 32)    # the first 32, if memory is limited

Windows that extend beyond the image are filled by reflection at its border. The mask is 0 there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.lengths import Length, parse_micrometers
from perturbjax.core.messages import console
from perturbjax.core.options import require, require_seed, require_sound
from perturbjax.dataset import Dataset

#: Default crop size in diameters of the median cell, and its divisor in pixels: networks downsample
#: by powers of 2, and few distinct sizes give few compiled programs.
CROP_DIAMETERS, CROP_MULTIPLE = 2.5, 16
#: Number of sites whose masks give the median diameter, at equal distances in the dataset.
DIAMETER_SITES = 16

#: Ratio up to which the pixel sizes of two plates count as equal.
SAME_PIXEL_SIZE = 1.01
#: Maximum crop size in pixels.
LARGEST_CROP = 4096

Background = Literal["keep", "mask"]


def crop_pixels(size: Length, dataset: Dataset, flag: str = "crop-size") -> int:
    """Return a crop size in stored pixels; a number of pixels is returned as it is.

    Args:
        size: number of pixels or length.
        dataset: dataset with the pixel sizes of its plates.
        flag: name of the option, for messages.

    Raises:
        InputError: the size is in micrometers, and the pixel size of the dataset is not known, or
            gives a crop outside of the valid range.
    """
    length = parse_micrometers(size)
    if length is None:
        return int(size)
    sizes = dataset.pixel_sizes.values()
    low, high = min(sizes, default=0.0), max(sizes, default=0.0)
    if not low:
        raise InputError(
            f"--{flag} {size}: the pixel size of {dataset.path} is unknown. Pass a number of "
            "pixels, or add a column Metadata_PixelSizeUm to load_data.csv and build again."
        )
    if high > SAME_PIXEL_SIZE * low:
        raise InputError(
            f"--{flag} {size}: plates of {dataset.path} have pixels of {low:.3g} to {high:.3g} "
            "µm, and crops need one pixel size. Pass a number of pixels."
        )
    pixels = round(length / low)
    expected = f"8 to 4096 pixels of {low:.3g} µm, not {pixels}"
    require(flag, size, 8 <= pixels <= LARGEST_CROP, expected)
    console.print(f"info: --{flag} {size}: {pixels} pixels of {low:.3g} µm")
    return pixels


@dataclass(frozen=True)
class CropConfig:
    """Crops of single cells"""

    crop_size: Length = 0
    """Height and width of a cell's crop in pixels, or a length such as 20um; 0: 2.5 times the
    median cell diameter, rounded up to a multiple of 16."""
    background: Background = "keep"
    """Pixels around the cell. keep: with neighboring cells. mask: 0 outside the cell."""
    max_cells: int = 0
    """Maximum number of cells of a site, chosen at random; 0 for all."""
    seed: int = 0
    """Random seed of the choice of cells."""

    def __post_init__(self) -> None:
        require_sound(self)
        size = str(self.crop_size)
        pixels = size.isdecimal() and (int(size) == 0 or 8 <= int(size) <= LARGEST_CROP)
        expected = "0, 8 to 4096 pixels, or a length such as 20um"
        require("crop-size", size, pixels or parse_micrometers(size) is not None, expected)
        require("max-cells", self.max_cells, self.max_cells >= 0, "0 (all) or more")
        require_seed(self.seed)


@dataclass(frozen=True)
class CellTable:
    """The cells of a site, in order of their labels.

    Attributes:
        objects: label of each cell in the mask.
        centroids: row and column of the centroid, in pixels from the upper left pixel.
        areas: number of pixels.
        extents: maximum of height and width of the bounding box, in pixels.
        at_border: whether the cell touches the border of the image.
    """

    objects: Int32[np.ndarray, " n"]
    centroids: Float32[np.ndarray, "n 2"]
    areas: Int32[np.ndarray, " n"]
    extents: Int32[np.ndarray, " n"]
    at_border: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def diameters(self) -> Float32[np.ndarray, " n"]:
        """Diameter in pixels of the disk with the area of each cell."""
        return (2 * np.sqrt(self.areas / np.pi)).astype(np.float32)

    def take(self, rows: Bool[np.ndarray, " n"] | Int[np.ndarray, " m"]) -> CellTable:
        """Select cells by a boolean mask or by positions."""
        return CellTable(*(values[rows] for values in vars(self).values()))


@dataclass(frozen=True)
class CellCounts:
    """Number of cells of one or several sites.

    Attributes:
        total: cells in the masks.
        border: dropped, because they touch the border of the image.
        not_sampled: dropped by the maximum number of cells of a site.
        larger: cropped cells whose bounding box is larger than the crop.
    """

    total: int = 0
    border: int = 0
    not_sampled: int = 0
    larger: int = 0

    def __add__(self, other: CellCounts) -> CellCounts:
        return CellCounts(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class SiteCells:
    """The chosen cells of a decoded site. Pixels are copied by `crop` only.

    Attributes:
        ids: `plate_well_site_object`: the `site_id` and the label of each cell.
        table: the cells.
        counts: number of cells, with those that were dropped.
        image: (H, W, C) stored integers of the site.
        mask: (H, W) instance labels of the site.
        size: height and width of the crops in pixels.
        background: pixels around the cell, see `CropConfig`.
    """

    ids: list[str]
    table: CellTable
    counts: CellCounts
    image: UInt[np.ndarray, "h w c"]
    mask: UInt16[np.ndarray, "h w"]
    size: int
    background: Background = "keep"

    def __len__(self) -> int:
        return len(self.table)

    def crop(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[UInt[np.ndarray, "n s s c"], UInt16[np.ndarray, "n s s"]]:
        """Crop windows centered on the centroids of the cells from `start` to `stop`.

        Returns:
            Images (n, size, size, C) of stored integers, and instance labels (n, size, size). The
            label of cell i is `table.objects[start + i]`. Neighbors have other labels; with
            background "mask", they and their pixels are 0. Of cells larger than the crop, the
            central part.
        """
        cells = self.table.take(np.arange(len(self))[start:stop])
        corners = np.rint(cells.centroids).astype(int) - self.size // 2
        images, masks = crop_windows(self.image, self.mask, corners, self.size)
        if self.background == "mask":
            inside = masks == cells.objects[:, None, None]
            images *= inside[..., None]
            masks *= inside
        return images, masks


class CellReader:
    """Read the cells of a dataset, site by site.

    Attributes:
        size: height and width of all crops in pixels.
    """

    def __init__(self, dataset: Dataset, config: CropConfig = CropConfig()):
        """
        Args:
            dataset: sites with masks; they may differ in size.
            config: crop size, background and number of cells.

        Raises:
            InputError: the crop size is to be estimated, and no site of the sample has a cell.
        """
        self.dataset, self.config = dataset, config
        self.size = crop_pixels(config.crop_size, dataset) or estimate_crop_size(dataset)

    def read(self, position: int) -> SiteCells:
        """Decode a site and choose its cells, see `select_cells`. It can have no cells."""
        image, mask = self.dataset.pixels(position)
        site = str(self.dataset.index["site_id"].iat[position])
        cells, counts = select_cells(mask, self.config, site)
        counts = replace(counts, larger=int((cells.extents > self.size).sum()))
        ids = [f"{site}_{number}" for number in cells.objects]
        return SiteCells(ids, cells, counts, image, mask, self.size, self.config.background)


def select_cells(
    mask: UInt16[np.ndarray, "h w"], config: CropConfig, site: str
) -> tuple[CellTable, CellCounts]:
    """List the cells of a site, drop those at the border, and choose at most `config.max_cells`.

    Args:
        mask: instance labels.
        config: number of cells and seed.
        site: `site_id`, see `sample_cells`.
    """
    cells = list_cells(mask)
    inner = cells.take(~cells.at_border)
    sample = sample_cells(inner, config.max_cells, config.seed, site)
    counts = CellCounts(
        total=len(cells), border=len(cells) - len(inner), not_sampled=len(inner) - len(sample)
    )
    return sample, counts


def list_cells(mask: UInt16[np.ndarray, "h w"]) -> CellTable:
    """List all objects of a mask.

    Args:
        mask: instance labels, 0 is background. Labels need not be consecutive.
    """
    # Most commands import this module without listing cells; importing scipy takes 0.2 s.
    from scipy import ndimage

    # (slice of rows, slice of columns) of each label from 1, or None for unused labels.
    boxes = ndimage.find_objects(mask)
    objects = np.array([number for number, box in enumerate(boxes, 1) if box], np.int32)
    if not len(objects):
        return CellTable(objects, np.zeros((0, 2), np.float32), objects, objects, np.zeros(0, bool))
    bounds = np.array(
        [
            (rows.start, rows.stop, columns.start, columns.stop)
            for rows, columns in filter(None, boxes)
        ]
    )
    height, width = mask.shape
    labels = mask.ravel()
    areas = np.bincount(labels, minlength=len(boxes) + 1)[objects]
    # Sums of row and column numbers of each label.
    rows, columns = np.divmod(np.flatnonzero(labels), width)
    inside = labels[labels > 0]
    sums = [np.bincount(inside, weights=axis, minlength=len(boxes) + 1) for axis in (rows, columns)]
    centroids = np.stack([total[objects] / areas for total in sums], axis=1)
    edges = np.array([0, height, 0, width])
    return CellTable(
        objects,
        centroids.astype(np.float32),
        areas.astype(np.int32),
        np.maximum(bounds[:, 1] - bounds[:, 0], bounds[:, 3] - bounds[:, 2]).astype(np.int32),
        (bounds == edges).any(axis=1),
    )


def sample_cells(cells: CellTable, count: int, seed: int, site: str) -> CellTable:
    """Choose at most `count` cells at random, in the order of the table.

    Args:
        cells: cells of a site.
        count: maximum number; 0 for all.
        seed: random seed.
        site: `site_id`; every site has another stream of random numbers.
    """
    if not count or len(cells) <= count:
        return cells
    digest = hashlib.sha256(site.encode()).digest()
    random = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    return cells.take(np.sort(random.choice(len(cells), count, replace=False)))


def crop_windows(
    image: UInt[np.ndarray, "h w c"],
    mask: UInt16[np.ndarray, "h w"],
    corners: Int[np.ndarray, "n 2"],
    size: int,
) -> tuple[UInt[np.ndarray, "n s s c"], UInt16[np.ndarray, "n s s"]]:
    """Crop square windows; parts beyond the image are reflections, with mask 0.

    Args:
        image: (H, W, C) stored integers.
        mask: (H, W) instance labels.
        corners: row and column of the upper left pixel of each window; may be negative.
        size: height and width of the windows in pixels.
    """
    height, width = mask.shape
    images = np.empty((len(corners), size, size, image.shape[-1]), image.dtype)
    masks = np.empty((len(corners), size, size), mask.dtype)
    for number, (top, left) in enumerate(corners):
        rows, columns = np.arange(top, top + size), np.arange(left, left + size)
        if top >= 0 and left >= 0 and top + size <= height and left + size <= width:
            window = np.s_[top : top + size, left : left + size]
            images[number], masks[number] = image[window], mask[window]
            continue
        within = _is_within(rows, height)[:, None] & _is_within(columns, width)
        grid = np.ix_(_reflect(rows, height), _reflect(columns, width))
        images[number], masks[number] = image[grid], mask[grid] * within
    return images, masks


def _is_within(indices: Int[np.ndarray, " s"], length: int) -> Bool[np.ndarray, " s"]:
    return (indices >= 0) & (indices < length)


def _reflect(indices: Int[np.ndarray, " s"], length: int) -> Int[np.ndarray, " s"]:
    """Map indices beyond an axis to their mirror image within it; the border is not repeated."""
    period = max(2 * (length - 1), 1)
    indices = np.abs(indices) % period
    return np.minimum(indices, period - indices) if length > 1 else indices


def estimate_crop_size(dataset: Dataset) -> int:
    """Return 2.5 times the median cell diameter, rounded up to a multiple of 16 pixels.

    The median is over the complete cells of at most `DIAMETER_SITES` sites, or over all their cells
    if each touches the border.

    Raises:
        InputError: these sites have no cell.
    """
    count = min(DIAMETER_SITES, len(dataset))
    sample = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    tables = [list_cells(dataset.pixels(int(position))[1]) for position in sample]
    for complete in (True, False):
        diameters = _diameters(tables, complete)
        if len(diameters):
            size = CROP_DIAMETERS * float(np.median(diameters))
            return int(np.ceil(size / CROP_MULTIPLE)) * CROP_MULTIPLE
    raise InputError(
        f"{dataset.path}: none of {count} sites has a cell in its mask, so that the crop size is "
        "unknown. Pass --crop-size, or build the dataset with another segmenter."
    )


def _diameters(tables: Sequence[CellTable], complete: bool) -> Float32[np.ndarray, " n"]:
    tables = [table.take(~table.at_border) for table in tables] if complete else tables
    return np.concatenate([table.diameters for table in tables])
