"""A network that sees photographs' features of every channel, what can be measured of the site, and the site itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.core.config import LINEAR_COMPONENTS
from perturbjax.models.attention import AttentionClassifier
from perturbjax.models.backbone import InputScaling
from perturbjax.models.layers import Dense, Mode, Outputs, dropout
from perturbjax.models.pooling import pool_stages, pooled_size
from perturbjax.models.symmetries import dihedral

#: Statistics of a channel's pixels: mean, deviation, and these percentiles.
PERCENTILES = (1.0, 50.0, 99.0)
#: Side in pixels of the grid that they are taken on: those of more pixels are the same, and cost a sort.
GRID = 56
#: Sites that the backbone is shown at a time, in all their channels and views: more take more memory.
SITES_PER_CHUNK = 4
#: Principal components that are kept of what the backbone finds, as by the linear baseline.
COMPONENTS = LINEAR_COMPONENTS
#: Units between these and the answer, and the share of them that is dropped in training (of what comes in, half that).
HIDDEN, DROPPED = 512, 0.4
#: Weight of the trained eyes beside the head, in the mean of their log-probabilities.
BRANCH_WEIGHT = 0.2

#: Former names of submodules and parameters in checkpoints, and their present names.
_FORMER_NAMES = {
    "eyes": "trainable_branch",
    "perceptron": "mlp",
    "linear": "logistic_regression",
    "past": "skip",
    "shares": "ensemble_weights",
}


def rename_saved_arrays(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace former names in the paths (`params/head/mlp/…`) of a checkpoint's arrays."""
    return {
        "/".join(_FORMER_NAMES.get(part, part) for part in path.split("/")): array
        for path, array in tree.items()
    }


class EnsembleClassifier(nnx.Module):
    """What photographs' features tell of every channel, and beside it a small network that is trained on the sites.

    Takes (B, H, W, 1 + ways × channels): the mask first, then every channel as the logarithm of intensities over the
    background, perhaps a second time relative to the plate (`--normalize log`, `log_plate`). The backbone sees each
    channel by itself, linear again and between its 1st and 99th percentile, as `perturbjax features` shows it, and the
    mask says where in its stages' maps cells lie (`models.pooling`). It stands still, as does the head on its
    components and on statistics of the site: it is set before the first step (`training.head_start`). What is
    trained are the `trainable_branch`, the attention network, which look at the site at half its side; in training the logits are
    theirs alone, and the backbone is not asked. The answer is the weighted mean of both log-probabilities.

    `features` are the components and the statistics; `attention` is the eyes'.

    Attributes:
        seen: how many of what is described of a site the backbone finds.
        symmetries: views of the site that what it finds is averaged over.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        classes: int,
        channels: int,
        ways: int,
        dropout: float,
        input_scaling: InputScaling,
        symmetries: int = 1,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.backbone.head = None
        self.channels = channels // ways
        self.backbone_feature_size = self.channels * pooled_size(backbone)
        known = channels * (2 + len(PERCENTILES)) + 2
        self.feature_size = min(COMPONENTS, self.backbone_feature_size) + known
        self.reduce = LinearReduction(self.backbone_feature_size + known, self.feature_size)
        self.head = EnsembleHead(self.feature_size, classes, rngs=rngs)
        self.trainable_branch = AttentionClassifier(
            classes=classes, channels=channels, dropout=dropout, rngs=rngs
        )
        self.input_scaling, self.symmetries, self.frozen = input_scaling, symmetries, True

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        looked = self.trainable_branch(downsample_by_2(x), mode)
        if mode.train:
            return looked
        features = self.reduce(self.compute_features(x, mode))
        answers = [
            jax.nn.log_softmax(logits) for logits in (self.head(features, mode), looked.logits)
        ]
        return Outputs(
            (1 - BRANCH_WEIGHT) * answers[0] + BRANCH_WEIGHT * answers[1],
            features,
            looked.attention,
        )

    def compute_features(self, x: Float[Array, "b h w c"], mode: Mode) -> Float[Array, "b d"]:
        """What the backbone finds in every channel, and what is measured of the site, before any of it is reduced."""
        mask, image = x[..., 0], x[..., 1:]
        stored = jnp.concatenate([x[..., :1], image[..., : self.channels]], axis=-1)
        found = _in_turn(lambda sites: self.pool_channels(sites, mode), stored)
        return jnp.concatenate([found, compute_statistics(mask, image)], axis=-1)

    def pool_channels(self, x: Float[Array, "b h w c"], mode: Mode) -> Float[Array, "b seen"]:
        """What the backbone finds in each stored channel, one channel after the other; the mask comes first."""
        linear = jnp.expm1(x[..., 1:])
        low, high = jnp.percentile(
            _on_grid(linear), jnp.array([1.0, 99.0]), axis=(1, 2), keepdims=True
        )
        seen = jnp.clip((linear - low) / jnp.maximum(high - low, 1e-6), 0, 1)
        b, h, w, c = seen.shape
        seen = jnp.moveaxis(seen, 3, 1).reshape(b * c, h, w, 1)
        both = jnp.concatenate([seen, jnp.repeat(x[..., :1], c, axis=0)], axis=-1)
        views = jnp.concatenate([dihedral(both, element) for element in range(self.symmetries)])
        return self.pool_images(views, mode).reshape(self.symmetries, b, -1).mean(0)

    def pool_images(self, images: Float[Array, "n h w 2"], mode: Mode) -> Float[Array, "n d"]:
        """What the backbone finds in grey images in [0, 1], each with the mask of its cells."""
        mean, deviation = (jnp.asarray(values, jnp.float32) for values in self.input_scaling)
        maps = self.backbone.stage_maps((images[..., :1] - mean) / deviation, mode.frozen())
        return pool_stages(maps, images[..., 1])


def _in_turn(found: Callable[[Array], Array], x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """The same, of `SITES_PER_CHUNK` sites at a time, taken from all over: several devices hold a stretch of them each."""
    n = x.shape[0]
    if not isinstance(n, int):  # exported for any number
        return found(x)
    whole = n // SITES_PER_CHUNK * SITES_PER_CHUNK
    features = []
    if whole:
        parts = x[:whole].reshape(SITES_PER_CHUNK, -1, *x.shape[1:]).swapaxes(0, 1)
        features.append(jax.lax.map(found, parts).swapaxes(0, 1).reshape(whole, -1))
    if whole < n:
        features.append(found(x[whole:]))
    return jnp.concatenate(features)


class LinearReduction(nnx.Module):
    """A linear map that no step moves: what is described of a site to its components and statistics."""

    def __init__(self, inputs: int, outputs: int):
        self.mean = nnx.BatchStat(jnp.zeros(inputs))
        self.kernel = nnx.BatchStat(jnp.eye(inputs, outputs))

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        return jnp.dot(x - self.mean[...], self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class EnsembleHead(nnx.Module):
    """A perceptron and a linear model beside each other: the sum of their log-probabilities, each times its share.

    Attributes:
        shares: (2,) of the perceptron and of the linear model. Their sum need not be 1: it is one over a temperature.
    """

    def __init__(self, inputs: int, classes: int, *, rngs: nnx.Rngs):
        self.mlp = MLP(inputs, classes, rngs=rngs)
        self.logistic_regression = Dense(inputs, classes, rngs=nnx.Rngs(0))
        self.ensemble_weights = nnx.BatchStat(jnp.array([1.0, 0.0]))

    def __call__(self, x: Float[Array, "b d"], mode: Mode) -> Float[Array, "b classes"]:
        return jnp.tensordot(self.ensemble_weights[...], self.log_probabilities(x, mode), 1)

    def log_probabilities(self, x: Float[Array, "b d"], mode: Mode) -> Float[Array, "2 b classes"]:
        """The log-probabilities of each part."""
        return jnp.stack(
            [
                jax.nn.log_softmax(logits)
                for logits in (self.mlp(x, mode), self.logistic_regression(x))
            ]
        )


class MLP(nnx.Module):
    """One hidden layer, and a linear one past it that starts at 0."""

    def __init__(self, inputs: int, classes: int, *, rngs: nnx.Rngs):
        self.hidden = Dense(inputs, HIDDEN, rngs=rngs)
        self.out = Dense(HIDDEN, classes, rngs=rngs)
        self.skip = nnx.Param(jnp.zeros((inputs, classes)))

    def __call__(self, x: Float[Array, "b d"], mode: Mode) -> Float[Array, "b classes"]:
        x = dropout(x, DROPPED / 2, mode)
        if mode.keys is not None:
            mode = dataclasses.replace(
                mode, keys=jax.vmap(jax.random.fold_in, (0, None))(mode.keys, 1)
            )
        hidden = dropout(jax.nn.relu(self.hidden(x)), DROPPED, mode)
        return self.out(hidden) + x @ self.skip[...]


def downsample_by_2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Mask and channels averaged over 2 × 2 pixels, the mask as the share of them that is cell."""
    x = jnp.concatenate([(x[..., :1] > 0).astype(x.dtype), x[..., 1:]], axis=-1)
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def compute_statistics(
    mask: Float[Array, "b h w"], image: Float[Array, "b h w c"]
) -> Float[Array, "b d"]:
    """Mean, deviation and percentiles of every channel; the logarithms of the cells' number and of their share."""
    pixels = _on_grid(image)
    percentiles = jnp.moveaxis(jnp.percentile(pixels, jnp.array(PERCENTILES), axis=(1, 2)), 0, 1)
    numbers = jnp.sort(mask.reshape(mask.shape[0], -1), axis=1)
    count = ((numbers[:, 1:] != numbers[:, :-1]) & (numbers[:, 1:] > 0)).sum(1) + (
        numbers[:, 0] > 0
    )
    share = (mask > 0).mean((1, 2))
    of_cells = jnp.stack([jnp.log1p(count.astype(jnp.float32)), jnp.log(share + 1e-3)], axis=1)
    of_light = [pixels.mean((1, 2)), pixels.std((1, 2)), percentiles.reshape(mask.shape[0], -1)]
    return jnp.concatenate([*of_light, of_cells], axis=1)


def _on_grid(image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    step = max(1, image.shape[1] // GRID)
    return image[:, ::step, ::step]
