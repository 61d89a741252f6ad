"""A network that sees photographs' features of every channel, and what can be measured of the site beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.config import BackboneNorm
from perturbjax.models.backbone import Colours
from perturbjax.models.layers import Dense, Mode, Outputs, dropout
from perturbjax.models.pooling import pool_stages, pooled_size
from perturbjax.models.symmetries import dihedral

#: Statistics of a channel's pixels: mean, deviation, and these percentiles.
PERCENTILES = (1.0, 50.0, 99.0)
#: Side in pixels of the grid that they are taken on: those of more pixels are the same, and cost a sort.
GRID = 56
#: Images that a backbone is shown at a time: where it moves, and what lies between is kept for the way back, and else.
TOGETHER_MOVING, TOGETHER = 12, 96


class ChannelClassifier(nnx.Module):
    """One dense layer on a backbone's features of every channel, and on statistics of the site.

    Takes (B, H, W, 1 + ways × channels): the mask first, then every channel as the logarithm of intensities over the
    background, perhaps a second time relative to the plate (`--normalize log`, `log_plate`). The backbone sees each
    channel by itself, linear again and between its 1st and 99th percentile, as `perturbjax features` shows it, and the
    mask says where in its stages' maps cells lie (`models.pooling`).

    The features are standardised by fixed statistics (see `training.linear_start`), so that all inputs of the dense
    layer move alike.

    Attributes:
        symmetries: views of the site that the features are averaged over where it is not training.
        frozen, backbone_norm: as of `TransferClassifier`.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        classes: int,
        channels: int,
        ways: int,
        dropout: float,
        colours: Colours,
        backbone_norm: BackboneNorm = "published",
        symmetries: int = 1,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.backbone.head = None
        self.channels = channels // ways
        self.seen = self.channels * pooled_size(backbone)
        self.feature_size = self.seen + channels * (2 + len(PERCENTILES)) + 2
        self.standardize = Standardize(self.feature_size)
        self.head = Dense(self.feature_size, classes, rngs=rngs)
        self.dropout, self.colours, self.symmetries = dropout, colours, symmetries
        self.frozen, self.backbone_norm = False, backbone_norm

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        mask, image = x[..., 0], x[..., 1:]
        features = jnp.concatenate([self.of_channels(mask, image, mode), measured(mask, image)], axis=-1)
        features = self.standardize(features)
        logits = self.head(dropout(features, self.dropout, mode))
        return Outputs(logits, features)

    def of_channels(self, mask: Float[Array, "b h w"], image: Float[Array, "b h w c"], mode: Mode) -> Array:
        """(B, seen): what the backbone finds in each stored channel, one channel after the other."""
        linear = jnp.expm1(image[..., : self.channels])
        low, high = jnp.percentile(_on_grid(linear), jnp.array([1.0, 99.0]), axis=(1, 2), keepdims=True)
        seen = jnp.clip((linear - low) / jnp.maximum(high - low, 1e-6), 0, 1)
        b, h, w, c = seen.shape
        seen = jnp.moveaxis(seen, 3, 1).reshape(b * c, h, w, 1)
        both = jnp.concatenate([seen, jnp.repeat(mask[..., None], c, axis=0)], axis=-1)
        views = [dihedral(both, element) for element in range(1 if mode.train else self.symmetries)]
        # Views of a site stay together: so they are on its device, where sites are dealt to several.
        found = self.of_images(jnp.stack(views, axis=1).reshape(-1, h, w, 2), mode)
        return found.reshape(b, c, len(views), -1).mean(2).reshape(b, -1)

    def of_images(self, images: Float[Array, "n h w 2"], mode: Mode) -> Float[Array, "n d"]:
        """What the backbone finds in grey images in [0, 1], each with the mask of its cells."""
        image, mask = images[..., :1], images[..., 1]
        mean, deviation = (jnp.asarray(values, jnp.float32) for values in self.colours)
        settled = self.frozen or self.backbone_norm == "published"
        x = (image - mean) / deviation

        def found(x: Array, mask: Array) -> Array:
            return pool_stages(self.backbone.stage_maps(x, mode.frozen() if settled else mode), mask)

        if mode.train and not settled:  # its statistics are those of the whole batch
            return found(x, mask)
        if self.frozen or not mode.train:
            return jax.lax.stop_gradient(_in_turn(found, x, mask, TOGETHER))
        return _in_turn(jax.checkpoint(found), x, mask, TOGETHER_MOVING)


def _in_turn(found: Callable[[Array, Array], Array], x: Array, mask: Array, most: int) -> Array:
    """The same a few images at a time. Of 96 images of 128×128 pixels EfficientNet-Lite0 would keep 5 GB for the way
    back, and of four views of 384 it held 11 GB at once."""
    whole = len(x) // most * most
    features = []
    if whole:  # those of each turn are taken from all over, since several devices hold a stretch each
        parts = tuple(part[:whole].reshape(most, -1, *part.shape[1:]).swapaxes(0, 1) for part in (x, mask))
        of_parts = jax.lax.map(lambda part: found(*part), parts)
        features.append(of_parts.swapaxes(0, 1).reshape(whole, -1))
    if whole < len(x):
        features.append(found(x[whole:], mask[whole:]))
    return jnp.concatenate(features)


class Standardize(nnx.Module):
    """Every feature to mean 0 and deviation 1 of the training sites; statistics that no step moves."""

    def __init__(self, size: int):
        self.mean = nnx.BatchStat(jnp.zeros(size))
        self.gain = nnx.BatchStat(jnp.ones(size))

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return (x - self.mean[...]) * self.gain[...]


def measured(mask: Float[Array, "b h w"], image: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Mean, deviation and percentiles of every channel; the logarithms of the cells' number and of their share."""
    pixels = _on_grid(image)
    percentiles = jnp.moveaxis(jnp.percentile(pixels, jnp.array(PERCENTILES), axis=(1, 2)), 0, 1)
    numbers = jnp.sort(mask.reshape(len(mask), -1), axis=1)
    count = ((numbers[:, 1:] != numbers[:, :-1]) & (numbers[:, 1:] > 0)).sum(1) + (numbers[:, 0] > 0)
    share = (mask > 0).mean((1, 2))
    of_cells = jnp.stack([jnp.log1p(count.astype(jnp.float32)), jnp.log(share + 1e-3)], axis=1)
    of_light = [pixels.mean((1, 2)), pixels.std((1, 2)), percentiles.reshape(len(mask), -1)]
    return jnp.concatenate([*of_light, of_cells], axis=1)


def _on_grid(image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    step = max(1, image.shape[1] // GRID)
    return image[:, ::step, ::step]
