"""Small pictures of cells: one color per channel, stated contrast, outlines of the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, UInt, UInt8, UInt16

from perturbjax.core.colours import COLORS, address, composite, downsample_pixels
from perturbjax.core.messages import html_text
from perturbjax.data.mask_encodings import encode
from perturbjax.dataset import Dataset
from perturbjax.dataset.summary_card import HIGH, LOW, contrast
from perturbjax.report.pages.page import data
from perturbjax.report.pages.scale_bar import bar_length, draw_scale_bar

__all__ = [
    "Renderer",
    "ShotImages",
    "address",
    "atlas",
    "composite",
    "downsample_pixels",
    "draw_outlines",
    "find_window",
    "make_renderer",
    "shot",
]

#: Names of the colors in `COLORS`.
_COLOR_NAMES = ("blue", "amber", "magenta", "green", "white")
#: Colors of the outlines of masks and of the nuclei in them.
OUTLINE = np.array([255, 255, 255], np.float32)
NUCLEUS_OUTLINE = np.array([255, 255, 0], np.float32)
#: Maximum height and width in pixels of a picture, and of the part of a site that it shows.
SIDE, WINDOW = 128, 320
#: The same for an enlarged picture.
LARGE = 192
#: Pixel values decoded for the pictures of one page, and the minimum number of pictures.
_MAX_VALUES, _MIN_PICTURES = 1.2e9, 60


class ShotImages(NamedTuple):
    """A small picture and the content of the enlarged one.

    Attributes:
        picture: data URL of the small picture.
        layers: data URL of the gray tiles of the enlarged picture, see `Renderer.shot_images`.
        bar: length of the scale bar as a fraction of the width; 0 without one.
        bar_text: length of the scale bar with its unit.
    """

    picture: str
    layers: str = ""
    bar: float = 0.0
    bar_text: str = ""

    @property
    def attributes(self) -> str:
        """HTML attributes for the enlarged picture."""
        bar = f' data-bar="{self.bar:.4f}" data-bar-text="{self.bar_text}"' if self.bar else ""
        return f' data-layers="{self.layers}"{bar}'


@dataclass(frozen=True)
class Renderer:
    """Draws the sites of one dataset, all with the same contrast and the same scale bar.

    Attributes:
        dataset: the sites.
        low, high: intensities of each channel that are drawn black and in full color.
        bar: length of the scale bar in micrometers; 0 if no pixel size is known.
    """

    dataset: Dataset
    low: Float[np.ndarray, " c"]
    high: Float[np.ndarray, " c"]
    bar: float = 0.0

    def picture(
        self, position: int, side: int = SIDE, *, whole: bool = False
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Draw a site, or the part with most cells, with outlines of masks and nuclei.

        Args:
            position: row of the site in the dataset.
            side: maximum height and width of the picture in pixels; smaller ones than `SIDE` have
                no scale bar.
            whole: draw the whole site.
        """
        pixel_size = self.dataset.pixel_size(position) if side >= SIDE else 0.0
        return self._draw(*self._read(position, whole), side, pixel_size)

    def _read(
        self, position: int, whole: bool = False
    ) -> tuple[
        UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"], UInt16[np.ndarray, "h w"] | None
    ]:
        """Read pixels, mask and nuclei (if there are any) of the part of a site that is drawn."""
        image, mask = self.dataset.pixels(position)
        part = np.s_[:, :] if whole else find_window(mask)
        nuclei = self.dataset.nuclei(position)[part] if self.dataset.has_nuclei else None
        return image[part], mask[part], nuclei

    def _draw(
        self,
        image: UInt[np.ndarray, "h w c"],
        mask: UInt16[np.ndarray, "h w"],
        nuclei: UInt16[np.ndarray, "h w"] | None,
        side: int,
        pixel_size: float,
    ) -> UInt8[np.ndarray, "h2 w2 3"]:
        # Smallest whole factor for which the picture fits into `side` pixels.
        step = max(1, -(-max(mask.shape) // side))
        # Outlines are drawn after downsampling, which would blur them.
        small = composite(downsample_pixels(image, step), self.low, self.high)
        drawn = draw_outlines(small, mask[::step, ::step])
        if nuclei is not None:
            drawn = draw_outlines(drawn, nuclei[::step, ::step], color=NUCLEUS_OUTLINE)
        return self.draw_bar(drawn, self.bar, step * pixel_size)

    def draw_bar(
        self, picture: UInt8[np.ndarray, "h w 3"], length: float, pixel_size: float
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Draw a scale bar of a length on a picture, both in micrometers; none if 0."""
        return draw_scale_bar(picture, length / pixel_size) if length and pixel_size else picture

    def bar_length(self, width: int) -> float:
        """Return the length of the scale bar in micrometers for a width in stored pixels."""
        sizes = [size for size in self.dataset.pixel_sizes.values() if size]
        return bar_length(width * float(np.median(sizes))) if sizes else 0.0

    def shot_images(self, position: int) -> ShotImages:
        """Return a site's small picture, and its layers for the enlarged one.

        The layers are gray tiles side by side: each channel, and the outlines. A channel has the
        value 255 at twice its contrast range, so that readers can make it darker or brighter.
        """
        image, mask, nuclei = self._read(position)
        step = max(1, -(-max(mask.shape) // LARGE))
        pixels, cells = downsample_pixels(image, step), mask[::step, ::step]
        tiles = np.clip((pixels - self.low) / (2 * (self.high - self.low)), 0, 1)
        edges = encode(np.ascontiguousarray(cells), "boundary").astype(bool)
        if nuclei is not None:
            small = np.ascontiguousarray(nuclei[::step, ::step])
            edges |= encode(small, "boundary").astype(bool)
        strip = np.concatenate([*np.moveaxis(tiles, -1, 0), edges], axis=1)
        layers = np.repeat(np.rint(255 * strip).astype(np.uint8)[..., None], 3, axis=-1)
        pixel_size = self.dataset.pixel_size(position)
        drawn = self._draw(image, mask, nuclei, SIDE, pixel_size)
        # Width of a tile in micrometers; its last pixels can extend beyond the site.
        width = tiles.shape[1] * step * pixel_size
        bar = self.bar / width if width else 0.0
        return ShotImages(
            address(drawn), address(np.ascontiguousarray(layers)), bar, f"{self.bar:g} µm"
        )

    def affordable(self, wanted: int) -> int:
        """Number of pictures, at most `wanted`, that can be decoded within seconds.

        Sites are decoded whole, so the number depends on their size.
        """
        # The largest site limits the number of pictures.
        pixels = float(self.dataset.index[["height", "width"]].prod(axis=1).max())
        values = pixels * len(self.dataset.channel_names)
        return min(wanted, max(_MIN_PICTURES, int(_MAX_VALUES / values)))

    def legend(self, *, enlarges: bool = True) -> str:
        """Colors of the channels and the contrast, as HTML.

        Args:
            enlarges: whether a click enlarges the pictures of the page.
        """
        names = self.dataset.channel_names
        if len(names) == 1:
            colors = f"{html_text(names[0])} in gray"
        else:
            colors = "".join(_color_entry(number, name) for number, name in enumerate(names))
        height, width = (int(size) for size in self.dataset.index[["height", "width"]].max())
        crop = ""
        if max(height, width) > WINDOW:
            crop = (
                f" Of {height} × {width} pixels, the {min(height, WINDOW)} × {min(width, WINDOW)} "
                "pixels with the largest cell area are shown."
            )
        lines = "White lines are mask outlines."
        if self.dataset.has_nuclei:
            lines = "White lines are outlines of cells, yellow lines those of nuclei."
        scale = ""
        if self.bar:
            complete = all(self.dataset.pixel_sizes.values())
            rest = "." if complete else "; the pixel size of pictures without one is unknown."
            scale = f" White bars are {self.bar:g} µm long{rest}"
        return (
            f'<p class="note">{colors}. All pictures have the same contrast: black is the {LOW}th '
            f"percentile over sites of their 1st percentile, full color the {HIGH}th of their "
            f"99th. {lines}{scale}"
            f"{' Click a picture to enlarge it.' if enlarges else ''}{crop}</p>"
            f"{self._data() if enlarges else ''}"
        )

    def _data(self) -> str:
        """Names, colors and contrast of the channels, for the enlarged pictures."""
        names = self.dataset.channel_names
        colors = [COLORS[number % len(COLORS)] for number in range(len(names))]
        values = {"name": list(names), "color": colors, "low": self.low, "high": self.high}
        return data("channels", pd.DataFrame(values), levels=False)


def _color_entry(number: int, name: str) -> str:
    color = number % len(COLORS)
    return (
        f'<span><span class="swatch" style="background:{COLORS[color]}"></span>{html_text(name)} '
        f"({_COLOR_NAMES[color]})</span>"
    )


def make_renderer(dataset: Dataset) -> Renderer:
    """Return a renderer with contrast and scale bar of the whole dataset, from its index."""
    renderer = Renderer(dataset, *contrast(dataset))
    width = int(dataset.index["width"].max())
    return replace(renderer, bar=renderer.bar_length(min(width, WINDOW)))


def find_window(mask: UInt16[np.ndarray, "h w"], side: int = WINDOW) -> tuple[slice, slice]:
    """Find the part with the largest cell area.

    Cell areas of all parts come from a summed-area table (Crow 1984).

    Args:
        mask: instance labels.
        side: maximum height and width of the part in pixels.

    Returns:
        Rows and columns of the part; the first of equal parts.
    """
    height, width = (min(side, length) for length in mask.shape)
    if (height, width) == mask.shape:
        return slice(None), slice(None)
    # Summed-area table: the number of cell pixels in a rectangle follows from four corners.
    area = np.pad((mask > 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = area[height:, width:] - area[:-height, width:]
    inside = inside - area[height:, :-width] + area[:-height, :-width]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    return slice(int(top), int(top) + height), slice(int(left), int(left) + width)


def draw_outlines(
    picture: UInt8[np.ndarray, "h w 3"],
    mask: UInt16[np.ndarray, "h w"],
    strength: float = 0.5,
    color: Float[np.ndarray, " 3"] = OUTLINE,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw outlines of a mask on a picture.

    Args:
        picture: RGB picture.
        mask: instance labels of the same size.
        strength: opacity of the outlines, from 0 to 1.
        color: red, green and blue of the outlines, from 0 to 255.
    """
    edge: Bool[np.ndarray, "h w"] = encode(np.ascontiguousarray(mask), "boundary").astype(bool)
    blended = picture.astype(np.float32)
    blended[edge] += strength * (color - blended[edge])
    return blended.astype(np.uint8)


def atlas(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], side: int, across: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Arrange pictures on a grid in one picture.

    Args:
        pictures: RGB pictures, cut off at `side` pixels.
        side: height and width of a grid cell in pixels.
        across: pictures per row.
    """
    # Ceiling division: the last row of the grid can be incomplete.
    sheet = np.zeros((-(-len(pictures) // across) * side, across * side, 3), np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, across)
        part = picture[:side, :side]
        top, left = row * side, column * side
        sheet[top : top + part.shape[0], left : left + part.shape[1]] = part
    return sheet


def shot(
    images: ShotImages | str,
    caption: str,
    alt: str,
    *,
    css: str = "",
    name: str = "",
    tip: str = "",
) -> str:
    """Return a picture with a caption as HTML.

    Args:
        images: data URL of the picture; if it has layers, a click enlarges the picture.
        caption: text below the picture.
        alt: description for screen readers.
        css: right, wrong or outlier; selects the frame.
        name: anchor in the page.
        tip: text on hover.
    """
    anchor = f' id="{html_text(name)}"' if name else ""
    hover = f' data-tip="{html_text(tip)}"' if tip else ""
    images = ShotImages(images) if isinstance(images, str) else images
    picture = f'<img src="{images.picture}" alt="{html_text(alt)}">'
    if images.layers:
        hover += images.attributes
        picture = f'<button type="button" aria-label="enlarge: {html_text(alt)}">{picture}</button>'
    return (
        f'<figure class="shot {css}"{anchor}{hover}>{picture}'
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
    )
