"""Baseline of the original program: a plain convolutional network on image times mask."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.backbone import Backbone, Tensors
from perturbjax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Mode,
    Outputs,
    classify,
    leaky_relu,
    max_pool,
)

WIDTHS = (16, 32, 64)
HIDDEN = 128


class MaskedCNN(nnx.Module):
    """Three convolutions with LeakyReLU, 2×2 max-pooling and BatchNorm, then two dense layers.

    The last convolution has no BatchNorm before flattening. The input is
    (B, image_size, image_size, 1 + channels), the mask first. Image channels are multiplied by
    the mask values; a binary mask sets the background to 0. Flattening fixes the input size to
    `image_size` pixels. `features` are the (B, 128) activations before dropout. The original
    uses dropout 0.5.
    """

    feature_size = HIDDEN

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 1,
        dropout: float = 0.5,
        image_size: int = 128,
        rngs: nnx.Rngs,
    ):
        pairs = zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.convs = nnx.List([Conv(i, o, rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([BatchNorm(width) for width in WIDTHS[:-1]])
        # Each of the three poolings halves height and width.
        flat = WIDTHS[-1] * (image_size // 2 ** len(WIDTHS)) ** 2
        self.flat_norm = BatchNorm(flat)
        self.hidden = Dense(flat, HIDDEN, rngs=rngs)
        self.head = Dense(HIDDEN, classes, rngs=rngs)
        self.dropout, self.image_size = dropout, image_size

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        height, width = x.shape[1:3]
        if height != self.image_size or width != self.image_size:
            size = f"{self.image_size}×{self.image_size}"
            raise ValueError(f"masked_cnn was built for {size} pixels, not {height}×{width}")
        x = x.astype(mode.dtype)
        x = x[..., 1:] * x[..., :1]
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            x = norm(max_pool(leaky_relu(conv(x))), mode)
        x = max_pool(leaky_relu(self.convs[-1](x)))
        # Flatten in PyTorch's NCHW order, so that its dense weights need no permutation.
        x = self.flat_norm(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1), mode)
        outputs = classify(self.head, leaky_relu(self.hidden(x)), self.dropout, mode)
        return outputs._replace(features=outputs.features.astype(jnp.float32))


def _infer_image_size(tensors: Tensors) -> int:
    """Infer the input size from the (size / 8)² positions of the flattened features."""
    # This tensor is the scale of the BatchNorm after flattening: channels times positions.
    positions = tensors["classifier.1.weight"].size / WIDTHS[-1]
    return 2 ** len(WIDTHS) * max(round(math.sqrt(positions)), 1)


MASKED_CNN = Backbone(
    MaskedCNN,
    original=(
        ("features.0", "convs.0"),
        ("features.3", "norms.0"),
        ("features.4", "convs.1"),
        ("features.7", "norms.1"),
        ("features.8", "convs.2"),
        ("classifier.1", "flat_norm"),
        ("classifier.2", "hidden"),
        ("classifier.5", "head"),
    ),
    infer_image_size=_infer_image_size,
)
