"""Making the stored image and mask of the channels of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt, UInt16

from data_prep.sources import Plane
from perturbjax.core.errors import InputError

Aggregate = Literal["median", "mean", "max", "none"]


def stack_planes(
    planes: Mapping[Plane, UInt[np.ndarray, "_ _"]], chosen: Sequence[Plane], where: str
) -> UInt[np.ndarray, "h w c"]:
    """The channels of one site, in the order chosen; uint16 as soon as one of them is.

    Raises:
        InputError: channels differ in shape.
    """
    for plane in chosen:
        if planes[plane].shape != planes[chosen[0]].shape:
            first = planes[chosen[0]].shape
            raise InputError(
                f"{where}: {plane} is {planes[plane].shape}, but {chosen[0]} of the same site is {first}"
            )
    return np.stack([planes[plane] for plane in chosen], axis=-1)


def aggregate_channels(
    image: UInt[np.ndarray, "h w c"], how: Aggregate
) -> UInt[np.ndarray, "h w k"]:
    """The stored image: k = 1 after median, mean (rounded) or max over channels; all of them after none."""
    if how == "none":
        return image
    if how == "max":
        return image.max(axis=-1, keepdims=True)
    if how == "median":
        return _median(image)
    return np.rint(image.mean(axis=-1, keepdims=True)).astype(image.dtype)


def _median(image: UInt[np.ndarray, "h w c"]) -> UInt[np.ndarray, "h w 1"]:
    """The middle value; of an even number of channels the rounded mean of the two in the middle."""
    ordered = np.sort(image, axis=-1)
    middle = image.shape[-1] // 2
    if image.shape[-1] % 2:
        return ordered[..., middle : middle + 1]
    pair = ordered[..., middle - 1 : middle + 1].mean(axis=-1, keepdims=True)
    return np.rint(pair).astype(image.dtype)


def resize_image(image: UInt[np.ndarray, "h w c"], side: int) -> UInt[np.ndarray, "side side c"]:
    """To `side` × `side` pixels by area averaging, so that nothing aliases; stored type kept."""
    from skimage.transform import resize_local_mean

    if image.shape[:2] == (side, side):
        return image
    resized = resize_local_mean(image, (side, side), preserve_range=True, channel_axis=-1)
    return np.clip(np.rint(resized), 0, np.iinfo(image.dtype).max).astype(image.dtype)


def resize_mask(mask: UInt16[np.ndarray, "h w"], side: int) -> UInt16[np.ndarray, "side side"]:
    """To `side` × `side` pixels, each with the label at its centre: labels never mix."""
    rows = ((np.arange(side) + 0.5) * mask.shape[0] / side).astype(int)
    columns = ((np.arange(side) + 0.5) * mask.shape[1] / side).astype(int)
    return mask[np.ix_(rows, columns)]


def scaled(image: UInt[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Each channel with its 1st percentile at 0 and its 99.8th at 1, not clipped."""
    low, high = np.percentile(image, (1, 99.8), axis=(0, 1))
    return (image.astype(np.float32) - low.astype(np.float32)) / np.maximum(high - low, 1).astype(
        np.float32
    )
