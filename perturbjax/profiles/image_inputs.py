"""From stored sites to what an ImageNet network takes: three channels, a known range, a known size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Float32, Int

from perturbjax.core.errors import InputError
from perturbjax.core.options import names_in, python_only, require, require_sound
from perturbjax.data.augmentation import RawBatch
from perturbjax.dataset import PLATE, Dataset
from perturbjax.models.backbone import IMAGENET_SCALING, NO_SCALING, SYMMETRIC_SCALING, InputScaling

#: What `--normalize` names; auto is the backbone's own.
COLOURS = {"imagenet": IMAGENET_SCALING, "half": SYMMETRIC_SCALING, "none": NO_SCALING}
EACH = "each"
#: Of the sites' own 99th percentiles, the share that a common white point leaves below it.
WHITE = 0.95

ChannelsAs = Literal["auto", "joined", "mean", "rgb"]
Scale = Literal["site", "plate", "dataset", "dtype"]


@dataclass(frozen=True)
class AdaptConfig:
    """Input of the backbone"""

    channels: str = EACH
    """Channels, separated by commas; three form one RGB image. each: every channel as a gray image."""
    channels_as: ChannelsAs = python_only("auto")
    """joined: features of all channels side by side. mean: averaged over channels. rgb: three channels as red, green
    and blue of one image. auto: rgb for three named channels, else joined."""
    use: Literal["image", "masked"] = python_only("image")
    """masked: set pixels outside the cells to 0."""
    scale: Scale = python_only("site")
    """Intensity range of each channel. site: 1st to 99th percentile of the site. plate, dataset: quantiles of these
    percentiles over the plate or dataset. dtype: range of the integer type."""
    normalize: Literal["auto", "imagenet", "half", "none"] = "auto"
    """imagenet: ImageNet mean and standard deviation. half: about -1 to 1. none: 0 to 1. auto: that of the weights."""
    size: int | None = None
    """Height and width in pixels of the input; 0 keeps the size. By default that of the weights, usually 224."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("size", self.size, self.size is None or self.size >= 0, "0 (no resizing) or more")


def channel_triples(
    channels: str, stored: list[str], channels_as: ChannelsAs = "auto"
) -> dict[str, tuple[int, int, int]]:
    """Name → three positions among the stored channels, for each image that a site gives.

    Raises:
        InputError: a name is not stored or named twice, or `rgb` is asked of other than three.
    """
    each = channels == EACH
    names = list(stored) if each else list(names_in(channels))
    if unknown := [name for name in names if name not in stored]:
        raise InputError(
            f"--channels {channels}: {unknown[0]!r} is not stored; there are {', '.join(stored)}"
        )
    if not names:
        raise InputError(
            f"--channels {channels!r}: names none; there are {', '.join(stored)}, or {EACH}"
        )
    positions = [stored.index(name) for name in names]
    if channels_as == "rgb" or (channels_as == "auto" and not each and len(names) == 3):
        if len(names) != 3:
            raise InputError(
                f"--channels {channels}: --channels-as rgb takes three, not {len(names)}"
            )
        red, green, blue = positions
        return {"-".join(names): (red, green, blue)}
    if len(set(names)) < len(names):
        raise InputError(f"--channels {channels}: names a channel twice")
    return {name: (position,) * 3 for name, position in zip(names, positions, strict=True)}


def intensity_range(
    dataset: Dataset, scale: Scale
) -> tuple[Float32[np.ndarray, "n c"], Float32[np.ndarray, "n c"]]:
    """(shift, factor) of every site and channel such that (stored - shift) × factor lies in [0, 1], from the index."""
    shape = (len(dataset), len(dataset.channel_names))
    if scale == "dtype":
        largest = np.iinfo(dataset.image_dtype).max
        return np.zeros(shape, np.float32), np.full(shape, 1 / largest, np.float32)
    low, high = (
        pd.DataFrame(
            {name: dataset.column(f"{percentile}_{name}") for name in dataset.channel_names}
        )
        for percentile in ("p01", "p99")
    )
    if scale in ("plate", "dataset"):
        together = dataset.column(PLATE) if scale == "plate" else np.zeros(len(dataset))
        low, high = (
            table.groupby(together).transform("quantile", q)
            for table, q in ((low, 0.5), (high, WHITE))
        )
    shift, span = low.to_numpy(np.float32), (high - low).to_numpy(np.float32)
    return shift, (1 / np.where(span > 0, span, 1)).astype(np.float32)  # a flat channel becomes 0


def adapt(
    raw: RawBatch, config: AdaptConfig, triples: Int[np.ndarray, "k 3"], colours: InputScaling
) -> Float[Array, "bk h w 3"]:
    """The k images of every site, one site after the other.

    Pure; shapes follow from `raw`, `triples` and `config.size`. `colours` are what the network expects.
    """
    x = jnp.clip((raw.image - raw.shift[:, None, None]) * raw.scale[:, None, None], 0, 1)
    if config.use == "masked":
        x = x * (raw.mask > 0)[..., None]
    b, h, w, c = x.shape
    if config.size and (h, w) != (config.size, config.size):
        h = w = config.size
        x = jax.image.resize(x, (b, h, w, c), "bilinear", antialias=True)
    x = jnp.moveaxis(x[..., triples], 3, 1)  # (b, h, w, k, 3) → (b, k, h, w, 3)
    mean, deviation = (jnp.asarray(values, jnp.float32) for values in colours)
    return ((x - mean) / deviation).reshape(b * len(triples), h, w, 3)
