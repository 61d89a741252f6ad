"""Ensemble of an MLP, a logistic regression and a trainable attention branch.

Inputs of the first two members are frozen: features of every channel from a backbone with
ImageNet weights, and statistics of the site (intensities, number and area of cells). Both are
fitted once, before the first training step (`training.ensemble_fit`). The third member is an
`AttentionClassifier` on the site downsampled by 2; it is the only part that is trained by steps.

    head(z) = w_mlp log p_mlp(z) + w_lr log p_lr(z)
    output  = 0.8 log softmax(head(z)) + 0.2 log p_branch(x)

The weights w are fitted on training sites held out by group (stacking, Wolpert 1992,
doi 10.1016/S0893-6080(05)80023-1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from perturbjax.core.config import LINEAR_COMPONENTS
from perturbjax.models.attention import AttentionClassifier
from perturbjax.models.backbone import InputScaling
from perturbjax.models.layers import Dense, Mode, Outputs, dropout
from perturbjax.models.pooling import pool_stages, pooled_size
from perturbjax.models.symmetries import dihedral
from perturbjax.models.windows import choose_windows, cut_windows, pad_to

#: Percentiles of a channel's pixels, used as features with mean and standard deviation.
PERCENTILES = (1.0, 50.0, 99.0)
#: Height and width of the pixel grid for these statistics. A finer grid changes little and
#: costs a longer sort.
STATISTICS_GRID = 56
#: Sites that pass through the backbone at a time, with all channels and views. Limits memory.
SITES_PER_CHUNK = 4
#: Maximum number of principal components of the backbone features.
COMPONENTS = LINEAR_COMPONENTS
#: Hidden units of the MLP. Dropout rate of hidden units; inputs are dropped at half this rate.
HIDDEN_UNITS, DROPOUT_RATE = 512, 0.4
#: Weight of the trainable branch in the mean of log-probabilities.
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
    """Ensemble of frozen-feature classifiers and a trainable attention branch.

    The input is (B, H, W, 1 + channels): the mask, then the channels as log1p of intensity over
    background, optionally followed by copies relative to the plate (`--normalize log` or
    `log_plate`). The backbone gets each stored channel as a gray image, linear and scaled from
    its 1st to its 99th percentile, and its feature maps are pooled with the mask
    (`models.pooling`).

    In training, `logits` are those of the trainable branch, and the backbone does not run.
    Otherwise they are the ensemble's weighted mean of log-probabilities. `features` are the trained
    representation: the hidden units of the MLP and the features of the trainable branch.
    `attention` is the branch's attention map. For sites larger than the input, the backbone
    features of windows of native resolution can replace those of the resized site
    (`pool_windows`).

    Args:
        backbone: network with `stage_maps`; its own head is removed.
        classes: width of the logits.
        channels: image channels of the input, counting all copies.
        copies: number of normalized copies of each stored channel.
        dropout: dropout rate of the trainable branch.
        input_scaling: mean and standard deviation that the backbone's weights expect.
        symmetries: number of flips and rotations (1 to 8) over which features are averaged.
        rngs: random streams for the parameters.

    Attributes:
        backbone_feature_size: number of backbone features of a site before reduction.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        classes: int,
        channels: int,
        copies: int,
        dropout: float,
        input_scaling: InputScaling,
        symmetries: int = 1,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.backbone.head = None
        self.channels = channels // copies
        self.backbone_feature_size = self.channels * pooled_size(backbone)
        # Mean, standard deviation and percentiles of each channel, and number and area of cells.
        statistics = channels * (2 + len(PERCENTILES)) + 2
        reduced = min(COMPONENTS, self.backbone_feature_size) + statistics
        self.reduce = LinearReduction(self.backbone_feature_size + statistics, reduced)
        self.head = EnsembleHead(reduced, classes, rngs=rngs)
        self.trainable_branch = AttentionClassifier(
            classes=classes, channels=channels, dropout=dropout, rngs=rngs
        )
        self.feature_size = HIDDEN_UNITS + self.trainable_branch.feature_size
        self.input_scaling, self.symmetries, self.frozen = input_scaling, symmetries, True

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        if mode.train:
            return self.run_branch(x, mode)
        return self.classify(x, self.compute_features(x, mode), mode)

    def classify(
        self, x: Float[Array, "b h w c"], site_features: Float[Array, "b d"], mode: Mode
    ) -> Outputs:
        """Predict from the input and its site features, see `compute_features`."""
        branch = self.run_branch(x, mode)
        reduced = self.reduce(site_features)
        # A weighted sum of log-probabilities is not normalized, so log-softmax is applied again.
        head = jax.nn.log_softmax(self.head(reduced, mode))
        trained = jax.nn.log_softmax(branch.logits)
        logits = (1 - BRANCH_WEIGHT) * head + BRANCH_WEIGHT * trained
        hidden = self.head.mlp.activations(reduced)
        features = jnp.concatenate([hidden, branch.features], axis=1)
        return Outputs(logits, features, branch.attention)

    def run_branch(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        """Run the trainable branch only, for example for its attention map."""
        return self.trainable_branch(downsample_by_2(x), mode)

    def compute_features(
        self,
        x: Float[Array, "b h w c"],
        mode: Mode,
        backbone_features: Float[Array, "b e"] | None = None,
    ) -> Float[Array, "b d"]:
        """Compute backbone features of all stored channels and site statistics, unreduced.

        Args:
            x: network input.
            mode: mode of the layers.
            backbone_features: of `pool_windows`; None computes those of the resized site `x`.
        """
        if backbone_features is None:
            return self.compute_features_of_masks(x[..., :1], x[..., 1:], mode)[:, 0]
        statistics = compute_statistics(x[..., 0], x[..., 1:])
        return jnp.concatenate([backbone_features, statistics], axis=-1)

    def compute_features_of_masks(
        self, masks: Float[Array, "b h w m"], image: Float[Array, "b h w c"], mode: Mode
    ) -> Float[Array, "b m d"]:
        """Compute the features of sites with each of several masks.

        The feature maps do not depend on the masks, so the backbone runs once for all of them.
        """
        count = masks.shape[-1]
        # The first copy of each channel; further copies are normalized differently.
        stored = jnp.concatenate([masks, image[..., : self.channels]], axis=-1)
        features = map_in_chunks(lambda sites: self.pool_channels(sites, mode, count), stored)
        # (b, m d) -> (b, m, d)
        features = features.reshape(*features.shape[:1], count, features.shape[1] // count)
        statistics = [compute_statistics(masks[..., number], image) for number in range(count)]
        return jnp.concatenate([features, jnp.stack(statistics, axis=1)], axis=-1)

    def pool_channels(
        self, x: Float[Array, "b h w c"], mode: Mode, masks: int = 1
    ) -> Float[Array, "b d"]:
        """Compute backbone features of (masks, channels), one channel after the other.

        The features of the masks are concatenated, and within them those of the channels.
        """
        pairs = _pair_with_masks(x[..., :masks], _scale_channels(x[..., masks:]))
        views = jnp.concatenate([dihedral(pairs, element) for element in range(self.symmetries)])
        pooled = self.pool_images(views, mode)
        # The views are averaged; the features of the channels of a site are concatenated.
        return jnp.concatenate(
            [one.reshape(self.symmetries, x.shape[0], -1).mean(0) for one in pooled], axis=-1
        )

    def pool_windows(
        self, x: Float[Array, "b h w c"], labels: Integer[Array, "b h w"], size: int, mode: Mode
    ) -> Float[Array, "b d"]:
        """Compute mean backbone features of windows of native resolution at the cells.

        The orientation of cells is random, so that windows are not averaged over symmetries.

        Args:
            x: mask and first copy of each channel, at the resolution of the stored site.
            labels: instance labels, 0 is background.
            size: height and width of a window in pixels.
            mode: mode of the layers.
        """
        x = jnp.concatenate([x[..., :1], _scale_channels(x[..., 1:])], axis=-1)

        def pool_site(site: tuple[Array, Array]) -> Float[Array, " d"]:
            image, labels = (pad_to(site[0][..., 1:], size, "symmetric"), site[1][..., None])
            mask = pad_to(site[0][..., :1], size, "constant")
            labels = pad_to(labels, size, "constant")[..., 0]
            corners, weight = choose_windows(labels, size)
            windows = cut_windows(jnp.concatenate([mask, image], axis=-1), corners, size)
            pairs = _pair_with_masks(windows[..., :1], windows[..., 1:])
            features = self.pool_images(pairs, mode)[0].reshape(len(windows), -1)
            return weight @ features / weight.sum()

        # One site after the other, because its windows and channels are many images.
        many = isinstance(x.shape[0], int)
        return jax.lax.map(pool_site, (x, labels)) if many else jax.vmap(pool_site)((x, labels))

    def pool_images(self, images: Float[Array, "n h w k"], mode: Mode) -> list[Float[Array, "n d"]]:
        """Compute pooled backbone features of gray images in [0, 1], for each of their masks.

        Args:
            images: the gray image, then its masks.
            mode: evaluation mode.
        """
        mean, deviation = (jnp.asarray(values, jnp.float32) for values in self.input_scaling)
        # The gray image is broadcast to three channels by the means of red, green and blue.
        maps = self.backbone.stage_maps((images[..., :1] - mean) / deviation, mode.frozen())
        return [pool_stages(maps, images[..., number]) for number in range(1, images.shape[-1])]


def _scale_channels(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scale each channel from its 1st to its 99th percentile to [0, 1], linear in intensity."""
    # The inverse of log1p: the backbone takes linear intensities.
    linear = jnp.expm1(x)
    percentiles = jnp.array([1.0, 99.0])
    low, high = jnp.percentile(_subsample(linear), percentiles, axis=(1, 2), keepdims=True)
    return jnp.clip((linear - low) / jnp.maximum(high - low, 1e-6), 0, 1)


def _pair_with_masks(
    masks: Float[Array, "b h w m"], channels: Float[Array, "b h w c"]
) -> Float[Array, "bc h w 1+m"]:
    """Return each channel as a separate image, with its masks."""
    b, h, w, c = channels.shape
    gray = jnp.moveaxis(channels, 3, 1).reshape(b * c, h, w, 1)
    return jnp.concatenate([gray, jnp.repeat(masks, c, axis=0)], axis=-1)


def map_in_chunks(function: Callable[[Any], Array], x: Any) -> Float[Array, "b d"]:
    """Apply `function` to `SITES_PER_CHUNK` sites at a time.

    A chunk takes sites at regular distances in the batch. With several devices each holds a
    contiguous part of the batch, so that every chunk uses all of them.

    Args:
        function: chunk of sites -> features.
        x: pytree of arrays with one row per site.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    if not isinstance(n, int):  # a symbolic batch size of an exported program
        return function(x)
    whole = n // SITES_PER_CHUNK * SITES_PER_CHUNK
    features = []
    if whole:
        # (chunks, SITES_PER_CHUNK, h, w, c).
        chunks = jax.tree.map(
            lambda a: a[:whole].reshape(SITES_PER_CHUNK, -1, *a.shape[1:]).swapaxes(0, 1), x
        )
        features.append(jax.lax.map(function, chunks).swapaxes(0, 1).reshape(whole, -1))
    if whole < n:
        features.append(function(jax.tree.map(lambda a: a[whole:], x)))
    return jnp.concatenate(features)


class LinearReduction(nnx.Module):
    """Affine map (x - mean) @ kernel that is fitted once and not trained by steps."""

    def __init__(self, inputs: int, outputs: int):
        # Not `nnx.Param`, so that the optimizer does not update these values.
        self.mean = nnx.BatchStat(jnp.zeros(inputs))
        self.kernel = nnx.BatchStat(jnp.eye(inputs, outputs))

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        # Accelerators otherwise round the factors to fewer bits.
        return jnp.dot(x - self.mean[...], self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class EnsembleHead(nnx.Module):
    """Weighted sum of log-probabilities of an MLP and a logistic regression.

    Attributes:
        ensemble_weights: (2,) weights of MLP and logistic regression. Their sum is an inverse
            temperature and need not be 1.
    """

    def __init__(self, inputs: int, classes: int, *, rngs: nnx.Rngs):
        self.mlp = MLP(inputs, classes, rngs=rngs)
        self.logistic_regression = Dense(inputs, classes, rngs=nnx.Rngs(0))
        # Before the fit, the prediction is that of the MLP.
        self.ensemble_weights = nnx.BatchStat(jnp.array([1.0, 0.0]))

    def __call__(self, x: Float[Array, "b d"], mode: Mode) -> Float[Array, "b classes"]:
        return jnp.tensordot(self.ensemble_weights[...], self.log_probabilities(x, mode), 1)

    def log_probabilities(self, x: Float[Array, "b d"], mode: Mode) -> Float[Array, "2 b classes"]:
        """Compute the log-probabilities of each member."""
        members = self.mlp(x, mode), self.logistic_regression(x)
        return jnp.stack([jax.nn.log_softmax(logits) for logits in members])


class MLP(nnx.Module):
    """One hidden layer, plus a linear skip connection that is initialized to zero."""

    def __init__(self, inputs: int, classes: int, *, rngs: nnx.Rngs):
        self.hidden = Dense(inputs, HIDDEN_UNITS, rngs=rngs)
        self.out = Dense(HIDDEN_UNITS, classes, rngs=rngs)
        self.skip = nnx.Param(jnp.zeros((inputs, classes)))

    def __call__(self, x: Float[Array, "b d"], mode: Mode) -> Float[Array, "b classes"]:
        x = dropout(x, DROPOUT_RATE / 2, mode)
        if mode.keys is not None:  # other keys, for an independent mask of the hidden units
            keys = jax.vmap(jax.random.fold_in, (0, None))(mode.keys, 1)
            mode = dataclasses.replace(mode, keys=keys)
        hidden = dropout(self.activations(x), DROPOUT_RATE, mode)
        return self.out(hidden) + x @ self.skip[...]

    def activations(self, x: Float[Array, "b d"]) -> Float[Array, "b h"]:
        """Compute the hidden units without dropout."""
        return jax.nn.relu(self.hidden(x))


def downsample_by_2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Average over 2×2 pixels. Channel 0, the mask, becomes the fraction of cell pixels."""
    x = jnp.concatenate([(x[..., :1] > 0).astype(x.dtype), x[..., 1:]], axis=-1)
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def compute_statistics(
    mask: Float[Array, "b h w"], image: Float[Array, "b h w c"]
) -> Float[Array, "b d"]:
    """Compute intensity and cell statistics of sites.

    Args:
        mask: instance labels, 0 for background.
        image: normalized channels.

    Returns:
        Mean, standard deviation and `PERCENTILES` of every channel, then log1p of the number of
        cells and the log of the area fraction of cells.
    """
    pixels = _subsample(image)
    # (b, percentiles, c).
    percentiles = jnp.moveaxis(jnp.percentile(pixels, jnp.array(PERCENTILES), axis=(1, 2)), 0, 1)
    # Count distinct labels above 0: each starts a run in the sorted pixels.
    labels = jnp.sort(mask.reshape(mask.shape[0], -1), axis=1)
    starts = (labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] > 0)
    count = starts.sum(1) + (labels[:, 0] > 0)
    area = (mask > 0).mean((1, 2))
    # The term 1e-3 bounds the logarithm for an empty mask.
    cells = jnp.stack([jnp.log1p(count.astype(jnp.float32)), jnp.log(area + 1e-3)], axis=1)
    moments = [pixels.mean((1, 2)), pixels.std((1, 2)), percentiles.reshape(mask.shape[0], -1)]
    return jnp.concatenate([*moments, cells], axis=1)


def feature_channels(count: int, channels: int, copies: int) -> Int[np.ndarray, " d"]:
    """Return the stored channel on which each site feature depends; -1 for the mask only.

    Args:
        count: number of site features, see `EnsembleClassifier.compute_features`.
        channels: number of stored channels.
        copies: number of normalized copies of each.
    """
    planes = np.arange(channels * copies) % channels
    statistics = np.tile(planes, 2 + len(PERCENTILES))
    backbone = np.arange(channels).repeat((count - len(statistics) - 2) // channels)
    return np.concatenate([backbone, statistics, [-1, -1]])


def _subsample(image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    step = max(1, image.shape[1] // STATISTICS_GRID)
    return image[:, ::step, ::step]
