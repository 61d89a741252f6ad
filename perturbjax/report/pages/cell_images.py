"""Small pictures of cells: channels in colours told apart by all, contrast by stated percentiles, outlines of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt, UInt8, UInt16

from perturbjax.core.colours import COLORS, address, composite, downsample_pixels
from perturbjax.core.messages import html_text
from perturbjax.data.mask_encodings import encode
from perturbjax.dataset import Dataset
from perturbjax.dataset.summary_card import HIGH, LOW, contrast

__all__ = [
    "Renderer",
    "address",
    "atlas",
    "composite",
    "downsample_pixels",
    "draw_outlines",
    "renderer",
    "shot",
    "window",
]

#: In words, the colours of `colours.COLORS`.
_WORDS = ("blue", "amber", "magenta", "green", "white")
OUTLINE = np.array([255, 255, 255], np.float32)
#: Side in pixels of a picture, and of the window of a site that it shows, at most.
SIDE, WINDOW = 128, 320
#: Values that are decoded for one page's pictures, and pictures that there are however large sites are.
_READ, _FEWEST = 1.2e9, 60


@dataclass(frozen=True)
class Renderer:
    """Paints the sites of one dataset, all with the same contrast, so that brightness can be compared.

    Attributes:
        dataset: the sites.
        low, high: stored intensities of each channel that are black and full colour.
    """

    dataset: Dataset
    low: Float[np.ndarray, " c"]
    high: Float[np.ndarray, " c"]

    def picture(
        self, position: int, side: int = SIDE, *, whole: bool = False
    ) -> UInt8[np.ndarray, "h w 3"]:
        """A site, or a window of it, with the outlines of its cells."""
        image, mask = self.dataset.pixels(position)
        if not whole:
            image, mask = window(image, mask)
        step = max(1, -(-max(mask.shape) // side))
        return draw_outlines(
            composite(downsample_pixels(image, step), self.low, self.high), mask[::step, ::step]
        )

    def affordable(self, wanted: int) -> int:
        """How many of so many pictures can be read in some seconds: sites are decoded whole for them."""
        values = float(self.dataset.index[["height", "width"]].prod(axis=1).max()) * len(
            self.dataset.channel_names
        )
        return min(wanted, max(_FEWEST, int(_READ / values)))

    def legend(self) -> str:
        """Which channel has which colour, and the contrast, as HTML."""
        names = self.dataset.channel_names
        if len(names) == 1:
            colours = f"{html_text(names[0])} in grey"
        else:
            colours = "".join(
                f'<span><span class="swatch" style="background:{COLORS[at % len(COLORS)]}"></span>{html_text(name)} '
                f"({_WORDS[at % len(COLORS)]})</span>"
                for at, name in enumerate(names)
            )
        height, width = (int(side) for side in self.dataset.index[["height", "width"]].max())
        cut = (
            f" Of {height} × {width} pixels a window of {min(height, WINDOW)} × {min(width, WINDOW)} is shown, where "
            "most of the cells' area is."
            if max(height, width) > WINDOW
            else ""
        )
        return (
            f'<p class="note">{colours}. One contrast for all: black is the {LOW}th percentile over sites of '
            f"their 1st percentile, full colour the {HIGH}th of their 99th. White lines outline the masks.{cut}</p>"
        )


def renderer(dataset: Dataset) -> Renderer:
    """A painter whose contrast is taken from the index of the whole dataset."""
    return Renderer(dataset, *contrast(dataset))


def window(
    image: UInt[np.ndarray, "h w c"], mask: UInt16[np.ndarray, "h w"], side: int = WINDOW
) -> tuple[UInt[np.ndarray, "h2 w2 c"], UInt16[np.ndarray, "h2 w2"]]:
    """The part of at most side × side pixels that has most of the cells' area; the first of equals."""
    high, wide = (min(side, length) for length in mask.shape)
    if (high, wide) == mask.shape:
        return image, mask
    area = np.pad((mask > 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = area[high:, wide:] - area[:-high, wide:] - area[high:, :-wide] + area[:-high, :-wide]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    there = np.s_[top : top + high, left : left + wide]
    return image[there], mask[there]


def draw_outlines(
    picture: UInt8[np.ndarray, "h w 3"], mask: UInt16[np.ndarray, "h w"], strength: float = 0.5
) -> UInt8[np.ndarray, "h w 3"]:
    """White outlines laid over a picture, half transparent."""
    edge: Bool[np.ndarray, "h w"] = encode(np.ascontiguousarray(mask), "boundary").astype(bool)
    found = picture.astype(np.float32)
    found[edge] += strength * (OUTLINE - found[edge])
    return found.astype(np.uint8)


def atlas(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], side: int, across: int
) -> UInt8[np.ndarray, "high wide 3"]:
    """Pictures of at most side × side pixels in rows of `across`, in one."""
    sheet = np.zeros((-(-len(pictures) // across) * side, across * side, 3), np.uint8)
    for at, picture in enumerate(pictures):
        row, column = divmod(at, across)
        high, wide = min(side, picture.shape[0]), min(side, picture.shape[1])
        sheet[row * side : row * side + high, column * side : column * side + wide] = picture[
            :high, :wide
        ]
    return sheet


def shot(
    address: str, caption: str, alt: str, *, css: str = "", name: str = "", tip: str = ""
) -> str:
    """A picture with its caption (text).

    Args:
        css: right, wrong or outlier: how it is framed.
        name: its address in the page.
        tip: what it says on hover.
    """
    named = f' id="{html_text(name)}"' if name else ""
    more = f' data-tip="{html_text(tip)}"' if tip else ""
    return (
        f'<figure class="shot {css}"{named}{more}><img src="{address}" alt="{html_text(alt)}">'
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
    )
