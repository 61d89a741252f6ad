"""Small pictures of cells: channels in colours told apart by all, contrast by stated percentiles, outlines of masks."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, UInt, UInt8, UInt16

from perturbjax.console import html_text
from perturbjax.dataset import Dataset
from perturbjax.masks import encode

#: Of channels in their order, told apart in the common colour blindnesses (after Okabe & Ito, and IBM's palette);
#: one channel alone is white. More than there are colours begin again.
COLOURS = ("#4da6ff", "#ffb000", "#dc267f", "#2bb38a", "#ffffff")
_WORDS = ("blue", "amber", "magenta", "green", "white")
OUTLINE = np.array([255, 255, 255], np.float32)
#: Side in pixels of a picture, and of the window of a site that it shows, at most.
SIDE, WINDOW = 128, 320
#: Black is this percentile, over sites, of a site's 1st percentile; full colour that of its 99th.
LOW, HIGH = 5, 95
_QUALITY = 78
#: Values that are decoded for one page's pictures, and pictures that there are however large sites are.
_READ, _FEWEST = 1.2e9, 60


@dataclass(frozen=True)
class Painter:
    """Paints the sites of one dataset, all with the same contrast, so that brightness can be compared.

    Attributes:
        dataset: the sites.
        low, high: stored intensities of each channel that are black and full colour.
    """

    dataset: Dataset
    low: Float[np.ndarray, " c"]
    high: Float[np.ndarray, " c"]

    def picture(self, position: int, side: int = SIDE, *, whole: bool = False) -> UInt8[np.ndarray, "h w 3"]:
        """A site, or a window of it, with the outlines of its cells."""
        image, mask = self.dataset.pixels(position)
        if not whole:
            image, mask = window(image, mask)
        step = max(1, -(-max(mask.shape) // side))
        return outlined(composite(shrunk(image, step), self.low, self.high), mask[::step, ::step])

    def affordable(self, wanted: int) -> int:
        """How many of so many pictures can be read in some seconds: sites are decoded whole for them."""
        values = float(self.dataset.index[["height", "width"]].prod(axis=1).max()) * len(self.dataset.channel_names)
        return min(wanted, max(_FEWEST, int(_READ / values)))

    def legend(self) -> str:
        """Which channel has which colour, and the contrast, as HTML."""
        names = self.dataset.channel_names
        if len(names) == 1:
            colours = f"{html_text(names[0])} in grey"
        else:
            colours = "".join(
                f'<span><span class="swatch" style="background:{COLOURS[at % len(COLOURS)]}"></span>{html_text(name)} '
                f"({_WORDS[at % len(COLOURS)]})</span>"
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


def painter(dataset: Dataset) -> Painter:
    """A painter whose contrast is taken from the index of the whole dataset."""
    low, high = [], []
    for name in dataset.channel_names:
        bottom = float(np.percentile(_numbers(dataset, f"p01_{name}"), LOW))
        top = float(np.percentile(_numbers(dataset, f"p99_{name}"), HIGH))
        low.append(bottom)
        high.append(max(top, bottom + 1))
    return Painter(dataset, np.array(low), np.array(high))


def _numbers(dataset: Dataset, column: str) -> np.ndarray:
    return pd.to_numeric(dataset.column(column), errors="coerce").fillna(0).to_numpy(dtype=float)


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


def shrunk(image: UInt[np.ndarray, "h w c"], step: int) -> Float[np.ndarray, "h2 w2 c"]:
    """Means of step × step pixels; what is left over at the end is repeated."""
    high, wide, channels = image.shape
    padded = np.pad(image, ((0, -high % step), (0, -wide % step), (0, 0)), mode="edge").astype(float)
    return padded.reshape(-(-high // step), step, -(-wide // step), step, channels).mean(axis=(1, 3))


def composite(
    image: Float[np.ndarray, "h w c"], low: Float[np.ndarray, " c"], high: Float[np.ndarray, " c"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Channels as lights of their colours on one screen: where two are bright it is brighter than either, never cut."""
    share = np.clip((image - low) / (high - low), 0, 1)
    channels = image.shape[-1]
    colours = np.ones((1, 3)) if channels == 1 else np.array([_rgb(c) for c in COLOURS]) / 255
    dark = np.ones((*image.shape[:2], 3))
    for at in range(channels):
        dark *= 1 - share[..., at, None] * colours[at % len(colours)]
    return np.rint(255 * (1 - dark)).astype(np.uint8)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def outlined(
    picture: UInt8[np.ndarray, "h w 3"], mask: UInt16[np.ndarray, "h w"], strength: float = 0.5
) -> UInt8[np.ndarray, "h w 3"]:
    """White outlines laid over a picture, half transparent."""
    edge: Bool[np.ndarray, "h w"] = encode(np.ascontiguousarray(mask), "boundary").astype(bool)
    found = picture.astype(np.float32)
    found[edge] += strength * (OUTLINE - found[edge])
    return found.astype(np.uint8)


def atlas(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], side: int, across: int) -> UInt8[np.ndarray, "high wide 3"]:
    """Pictures of at most side × side pixels in rows of `across`, in one."""
    sheet = np.zeros((-(-len(pictures) // across) * side, across * side, 3), np.uint8)
    for at, picture in enumerate(pictures):
        row, column = divmod(at, across)
        high, wide = min(side, picture.shape[0]), min(side, picture.shape[1])
        sheet[row * side : row * side + high, column * side : column * side + wide] = picture[:high, :wide]
    return sheet


def address(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture (WebP) as an address that holds it."""
    import imagecodecs

    return (
        "data:image/webp;base64,"
        + base64.b64encode(imagecodecs.webp_encode(picture, level=_QUALITY, lossless=False)).decode()
    )


def shot(address: str, caption: str, alt: str, *, css: str = "", name: str = "", tip: str = "") -> str:
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
