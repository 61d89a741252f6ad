"""Convert stored sites to RGB images of fixed size and range, the input of ImageNet networks."""

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

#: Values of `--normalize`; "auto" is that of the weights.
INPUT_SCALINGS = {"imagenet": IMAGENET_SCALING, "half": SYMMETRIC_SCALING, "none": NO_SCALING}
EACH = "each"
#: Quantile, over sites, of their 99th percentiles that becomes the common maximum of a plate or
#: dataset.
WHITE = 0.95

ChannelsAs = Literal["auto", "joined", "mean", "rgb"]
Scale = Literal["site", "plate", "dataset", "dtype"]


@dataclass(frozen=True)
class AdaptConfig:
    """Input of the backbone"""

    channels: str = EACH
    """Channels, separated by commas; three form one RGB image. each: every channel as a gray
    image."""
    channels_as: ChannelsAs = python_only("auto")
    """joined: features of all channels side by side. mean: averaged over channels. rgb: three
    channels as red, green and blue of one image. auto: rgb for three named channels, else
    joined."""
    use: Literal["image", "masked"] = python_only("image")
    """masked: set pixels outside the cells to 0."""
    scale: Scale = python_only("site")
    """Intensity range of each channel. site: 1st to 99th percentile of the site. plate, dataset:
    quantiles of these percentiles over the plate or dataset. dtype: range of the integer type."""
    normalize: Literal["auto", "imagenet", "half", "none"] = "auto"
    """imagenet: ImageNet mean and standard deviation. half: about -1 to 1. none: 0 to 1. auto: that
    of the weights."""
    size: int | None = None
    """Height and width in pixels of the input; 0 keeps the size. By default that of the weights,
    usually 224."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("size", self.size, self.size is None or self.size >= 0, "0 (no resizing) or more")


def channel_triples(
    channels: str, stored: list[str], channels_as: ChannelsAs = "auto"
) -> dict[str, tuple[int, int, int]]:
    """Return the images that a site gives, as name -> positions of three stored channels.

    Args:
        channels: names separated by commas, or "each".
        stored: names of the stored channels.
        channels_as: see `AdaptConfig`.

    Raises:
        InputError: A channel is not stored or named twice, or "rgb" does not get three.
    """
    each = channels == EACH
    names = list(stored) if each else list(names_in(channels))
    if unknown := [name for name in names if name not in stored]:
        raise InputError(
            f"--channels {channels}: {unknown[0]!r} is not stored (available: {', '.join(stored)})"
        )
    if not names:
        raise InputError(
            f"--channels {channels!r}: contains no name (available: {EACH}, {', '.join(stored)})"
        )
    positions = [stored.index(name) for name in names]
    if channels_as == "rgb" or (channels_as == "auto" and not each and len(names) == 3):
        if len(names) != 3:
            raise InputError(
                f'--channels {channels}: has {len(names)} names, but channels_as="rgb" needs three'
            )
        red, green, blue = positions
        return {"-".join(names): (red, green, blue)}
    if len(set(names)) < len(names):
        raise InputError(f"--channels {channels}: names a channel twice")
    # A gray image: red, green and blue are the same channel.
    return {name: (position,) * 3 for name, position in zip(names, positions, strict=True)}


def intensity_range(
    dataset: Dataset, scale: Scale
) -> tuple[Float32[np.ndarray, "n c"], Float32[np.ndarray, "n c"]]:
    """Compute the intensity range of every site and channel from the statistics of the index.

    Returns:
        shift and factor, so that (stored - shift) * factor lies in [0, 1].
    """
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
        group = dataset.column(PLATE) if scale == "plate" else np.zeros(len(dataset))
        # The median is robust to a few sites; the high quantile avoids clipping most sites.
        low = low.groupby(group).transform("quantile", 0.5)
        high = high.groupby(group).transform("quantile", WHITE)
    shift, span = low.to_numpy(np.float32), (high - low).to_numpy(np.float32)
    # A channel of constant intensity becomes 0.
    return shift, (1 / np.where(span > 0, span, 1)).astype(np.float32)


def adapt(
    raw: RawBatch, config: AdaptConfig, triples: Int[np.ndarray, "k 3"], scaling: InputScaling
) -> Float[Array, "bk h w 3"]:
    """Convert a batch to RGB images: k images of the first site, then of the second, ...

    Args:
        raw: stored pixels with shift and scale.
        config: settings.
        triples: positions of the channels of each image, see `channel_triples`.
        scaling: mean and standard deviation that the network expects.
    """
    x = jnp.clip((raw.image - raw.shift[:, None, None]) * raw.scale[:, None, None], 0, 1)
    if config.use == "masked":
        x = x * (raw.mask > 0)[..., None]
    b, h, w, c = x.shape
    if config.size and (h, w) != (config.size, config.size):
        h = w = config.size
        x = jax.image.resize(x, (b, h, w, c), "bilinear", antialias=True)
    x = jnp.moveaxis(x[..., triples], 3, 1)  # (b, h, w, k, 3) -> (b, k, h, w, 3)
    mean, deviation = (jnp.asarray(values, jnp.float32) for values in scaling)
    return ((x - mean) / deviation).reshape(b * len(triples), h, w, 3)
