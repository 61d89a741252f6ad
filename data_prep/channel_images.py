"""Combine the channels of a site into the stored image, and resize images and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt, UInt16

from data_prep.sources import Plane
from perturbjax.core.errors import InputError

Aggregate = Literal["median", "mean", "max", "none"]


def stack_planes(
    planes: Mapping[Plane, UInt[np.ndarray, "_ _"]], selected: Sequence[Plane], where: str
) -> UInt[np.ndarray, "h w c"]:
    """Stack the selected channels of a site.

    Args:
        planes: Pixels of each plane.
        selected: Planes to stack, in this order.
        where: Table and row of the site, for messages.

    Returns:
        Image (height, width, channels); uint16 if at least one channel is uint16.

    Raises:
        InputError: The channels differ in size.
    """
    first = selected[0]
    for plane in selected:
        if planes[plane].shape != planes[first].shape:
            raise InputError(
                f"{where}: {plane} has shape {planes[plane].shape}, but {first} of the same site "
                f"has shape {planes[first].shape}"
            )
    return np.stack([planes[plane] for plane in selected], axis=-1)


def aggregate_channels(
    image: UInt[np.ndarray, "h w c"], method: Aggregate
) -> UInt[np.ndarray, "h w k"]:
    """Combine channels pixel by pixel; fractions are rounded.

    Returns:
        Image with one channel (median, mean or max), or all channels (none).
    """
    if method == "none":
        return image
    if method == "max":
        return image.max(axis=-1, keepdims=True)
    if method == "mean":
        return np.rint(image.mean(axis=-1, keepdims=True)).astype(image.dtype)
    # Sort instead of np.median, which returns float64 and needs four times the memory.
    ordered = np.sort(image, axis=-1)
    half = image.shape[-1] // 2
    if image.shape[-1] % 2:
        return ordered[..., half : half + 1]
    # An even number of channels: mean of the two central values.
    pair = ordered[..., half - 1 : half + 1].mean(axis=-1, keepdims=True)
    return np.rint(pair).astype(image.dtype)


def resize_image(image: UInt[np.ndarray, "h w c"], size: int) -> UInt[np.ndarray, "size size c"]:
    """Resize to `size` x `size` pixels by area averaging (no aliasing); keep the data type."""
    from skimage.transform import resize_local_mean

    if image.shape[:2] == (size, size):
        return image
    resized = resize_local_mean(image, (size, size), preserve_range=True, channel_axis=-1)
    return np.clip(np.rint(resized), 0, np.iinfo(image.dtype).max).astype(image.dtype)


def resize_mask(mask: UInt16[np.ndarray, "h w"], size: int) -> UInt16[np.ndarray, "size size"]:
    """Resize to `size` x `size` pixels by nearest neighbor, so that labels are never mixed."""
    # Source index of the center of each output pixel.
    rows = ((np.arange(size) + 0.5) * mask.shape[0] / size).astype(int)
    columns = ((np.arange(size) + 0.5) * mask.shape[1] / size).astype(int)
    return mask[np.ix_(rows, columns)]


def scaled(image: UInt[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Scale each channel so that its 1st percentile is 0 and its 99.8th is 1, without clipping."""
    # One pair of percentiles for each channel, (c,).
    low, high = np.percentile(image, (1, 99.8), axis=(0, 1))
    return (image.astype(np.float32) - low.astype(np.float32)) / np.maximum(high - low, 1).astype(
        np.float32
    )
