"""From stored sites to what an ImageNet network takes: three channels, a known range, a known size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Float32, Int

from perturbjax.augment import RawBatch
from perturbjax.console import InputError, require, require_sound
from perturbjax.dataset import PLATE, SiteDataset

#: Mean and standard deviation, a colour, of what the weights were trained on (images in [0, 1]).
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((127 / 255,) * 3, (128 / 255,) * 3),
    "none": ((0.0,) * 3, (1.0,) * 3),
}
EACH = "each"
#: Of the sites' own 99th percentiles, the share that a common white point leaves below it.
WHITE = 0.95

Scale = Literal["site", "plate", "dataset", "dtype"]


@dataclass(frozen=True)
class AdaptConfig:
    """How a site becomes an RGB image."""

    channels: str = EACH
    """each: every stored channel by itself, repeated to three, their features side by side. One name: that channel,
    repeated to three. Three names with commas: taken as red, green and blue."""
    use: Literal["image", "masked"] = "image"
    """masked: what lies outside the cells is black (mask × image)."""
    scale: Scale = "site"
    """What becomes 0 and 1, a channel at a time; beyond is cut off. site: the site's 1st and 99th percentile. plate,
    dataset: the median of the 1st and the 95th percentile of the 99th over all those sites, so that brighter sites
    stay brighter. dtype: 0 and the largest value of the stored integer type."""
    normalize: Literal["auto", "imagenet", "half", "none"] = "auto"
    """What follows. imagenet: ImageNet's mean and deviation of each colour. half: to about ±1. none: stays in [0, 1].
    auto: as the backbone was trained (half for efficientnet_lite0, imagenet for the others)."""
    size: int = 224
    """Side in pixels that sites are resized to, with antialiasing; 0 keeps their own size."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("size", self.size, self.size >= 0, "0 (as it is) or more")


def channel_triples(channels: str, stored: list[str]) -> dict[str, tuple[int, int, int]]:
    """Name → three positions among the stored channels, for each image that a site gives.

    Raises:
        InputError: a name is not stored, or neither one nor three are named.
    """
    if channels == EACH:
        return {name: (position,) * 3 for position, name in enumerate(stored)}
    names = [name.strip() for name in channels.split(",")]
    if unknown := [name for name in names if name not in stored]:
        raise InputError(f"--channels {channels}: {unknown[0]!r} is not stored; there are {', '.join(stored)}")
    if len(names) not in (1, 3):
        raise InputError(f"--channels {channels}: name one channel or three, or say {EACH}")
    positions = [stored.index(name) for name in names] * (3 if len(names) == 1 else 1)
    return {"-".join(names): tuple(positions)}


def intensity_range(
    dataset: SiteDataset, scale: Scale
) -> tuple[Float32[np.ndarray, "n c"], Float32[np.ndarray, "n c"]]:
    """(shift, factor) of every site and channel such that (stored - shift) × factor lies in [0, 1], from the index."""
    shape = (len(dataset), len(dataset.channel_names))
    if scale == "dtype":
        largest = np.iinfo(dataset.image_dtype).max
        return np.zeros(shape, np.float32), np.full(shape, 1 / largest, np.float32)
    low, high = (
        pd.DataFrame({name: dataset.column(f"{percentile}_{name}") for name in dataset.channel_names})
        for percentile in ("p01", "p99")
    )
    if scale in ("plate", "dataset"):
        together = dataset.column(PLATE) if scale == "plate" else np.zeros(len(dataset))
        low, high = (table.groupby(together).transform("quantile", q) for table, q in ((low, 0.5), (high, WHITE)))
    shift, span = low.to_numpy(np.float32), (high - low).to_numpy(np.float32)
    return shift, (1 / np.where(span > 0, span, 1)).astype(np.float32)  # a flat channel becomes 0


def adapt(
    raw: RawBatch, config: AdaptConfig, triples: Int[np.ndarray, "k 3"], normalize: str
) -> Float[Array, "bk h w 3"]:
    """The k images of every site, one site after the other.

    Pure; shapes follow from `raw`, `triples` and `config.size`. `normalize` is a key of `NORMALIZATIONS`.
    """
    x = jnp.clip((raw.image - raw.shift[:, None, None]) * raw.scale[:, None, None], 0, 1)
    if config.use == "masked":
        x = x * (raw.mask > 0)[..., None]
    b, h, w, c = x.shape
    if config.size and (h, w) != (config.size, config.size):
        h = w = config.size
        x = jax.image.resize(x, (b, h, w, c), "bilinear", antialias=True)
    x = jnp.moveaxis(x[..., triples], 3, 1)  # (b, h, w, k, 3) → (b, k, h, w, 3)
    mean, deviation = (jnp.asarray(values, jnp.float32) for values in NORMALIZATIONS[normalize])
    return ((x - mean) / deviation).reshape(b * len(triples), h, w, 3)


def dihedral(x: Float[Array, "b h w c"], element: int) -> Float[Array, "b h2 w2 c"]:
    """One of the eight symmetries of the square, by number: 0 none, 1 to 3 turn or mirror, 4 to 7 transpose too."""
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in (element & 1, element & 2))
    x = x[:, rows, columns]
    return x.swapaxes(1, 2) if element & 4 else x
