"""Multiple-instance classifier: one network per cell, gated attention over the cells of a site.

A bag has n windows, one for each cell. All windows pass through the same network, which gives the
features h_k of each cell. Their weighted mean is the feature vector of the site:

    a_k = softmax_k( w . (tanh(V h_k) * sigmoid(U h_k)) ),    z = sum_k a_k h_k

The last layers of the network map z to logits. A bag of fewer cells is padded; padding has weight
0 in the attention and in the statistics of BatchNorm. A bag without cells has z = 0.

Source: Ilse, Tomczak and Welling 2018, Attention-based deep multiple instance learning,
arXiv:1802.04712, equation 9.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from perturbjax.core.errors import InputError
from perturbjax.models.layers import Dense, Mode, Outputs

#: Units of the hidden layers of the attention.
HIDDEN = 128
#: Score of padding; finite, because differences of infinities are not. Lower bound of the sum of
#: exponentials, of which the largest is 1.
_ABSENT, _MIN_SUM = -1e30, 1e-6
#: Name of the network of a cell in the paths of parameters.
CELLS = "cells"


class Bags(NamedTuple):
    """Network input of a batch of sites as bags of cells."""

    windows: Float[Array, "b n h w c"]
    """The mask of the cell, then the normalized image around it."""
    present: Bool[Array, "b n"]
    """Whether a window contains a cell; the others are padding."""


class GatedAttention(nnx.Module):
    """Attention score of each cell of a bag, from its features."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.value = Dense(inputs, HIDDEN, rngs=rngs)
        self.gate = Dense(inputs, HIDDEN, rngs=rngs)
        self.score = Dense(HIDDEN, 1, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], present: Bool[Array, "b n"]
    ) -> Float[Array, "b n"]:
        """Return weights whose sum over the cells of a bag is 1; 0 for padding."""
        hidden = jnp.tanh(self.value(features)) * jax.nn.sigmoid(self.gate(features))
        scores = self.score(hidden)[..., 0]
        scores = jnp.where(present, scores, _ABSENT)
        exponential = jnp.exp(scores - scores.max(-1, keepdims=True)) * present
        # A bag without cells gives zeros instead of NaN, also in the gradient.
        return exponential / jnp.maximum(exponential.sum(-1, keepdims=True), _MIN_SUM)


class BagClassifier(nnx.Module):
    """A network for single cells, applied to bags of cells.

    The input is `Bags`. `features` are the weighted mean of the features of the cells, and
    `cell_attention` contains the weights.

    Args:
        cells: network with `compute_features`, `apply_head` and `feature_size`.
        seed: seed of the parameters of the attention.
    """

    def __init__(self, cells: Any, *, seed: int):
        if not hasattr(cells, "compute_features"):
            raise InputError(
                "--model: this network cannot be applied to single cells. Use --model attention, "
                "or pretrained weights with --head dense or attention."
            )
        self.cells = cells
        self.attention = GatedAttention(cells.feature_size, rngs=nnx.Rngs(seed))
        self.feature_size = cells.feature_size

    def __call__(self, bags: Bags, mode: Mode) -> Outputs:
        windows, present = bags
        b, n = present.shape
        # (b * n, h, w, c): all cells are rows of one batch.
        flat = windows.reshape(b * n, *windows.shape[2:])
        features, _ = self.cells.compute_features(flat, _cell_mode(mode, present))
        features = features.astype(jnp.float32).reshape(b, n, -1)
        weights = self.attention(features, present)
        pooled = jnp.einsum("bn,bnd->bd", weights, features)
        logits = self.cells.apply_head(pooled, mode).astype(jnp.float32)
        return Outputs(logits, pooled, cell_attention=weights)


def _cell_mode(mode: Mode, present: Bool[Array, "b n"]) -> Mode:
    """Return the options of the pass over all cells, with one weight per cell."""
    weight = present.astype(jnp.float32)
    if mode.weight is not None:
        weight = weight * mode.weight[:, None]
    # Statistics over no cell at all would be NaN.
    weight = jnp.where(weight.sum() > 0, weight, 1.0)
    return dataclasses.replace(mode, weight=weight.reshape(-1), keys=None)
