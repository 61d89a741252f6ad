"""The mask-attention network: features of the mask say where to look in the features of the image."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.backbone import Backbone
from perturbjax.models.layers import BatchNorm, Conv, Dense, Mode, Outputs, dropout, leaky_relu

WIDTHS = (32, 64, 128)


class ConvBlock(nnx.Module):
    """3×3 convolution, BatchNorm, activation, 2×2 max-pool: half the side, `outputs` channels.

    The activation never decreases, so it may wait until the pool has left it a quarter of the values.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        activation: Callable[[Array], Array] = leaky_relu,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(inputs, outputs, rngs=rngs)
        self.norm = BatchNorm(outputs)
        self.activation = activation

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h2 w2 o"]:
        turn = self.norm.turn()
        bias = self.conv.bias[...]  # type: ignore[index]
        z = self.norm.pooled(self.conv.unbiased(x, turn), mode, shift=bias, turned=turn)
        return self.activation(z)


class SpatialAttention(nnx.Module):
    """Where to look: one value in (0, 1) a position, from the mask's features."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, hidden, rngs=rngs)
        self.norm = BatchNorm(hidden)
        self.project = Conv(hidden, 1, size=1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h w 1"]:
        hidden = self.norm(self.conv.unbiased(x), mode, shift=self.conv.bias[...])  # type: ignore[index]
        return jax.nn.sigmoid(self.project(leaky_relu(hidden)))


class AttentionClassifier(nnx.Module):
    """Two convolutional branches, mask and image; the mask's attention multiplies the image's features.

    Takes (B, H, W, 1 + channels): the mask first. `features` are the (B, 256) joined averages of the attended image
    features and the mask features; `logits` come from dense 128, LeakyReLU, dropout, dense.
    """

    feature_size = 2 * WIDTHS[-1]

    def __init__(self, *, classes: int, channels: int = 1, dropout: float = 0.3, rngs: nnx.Rngs):
        self.image_blocks = nnx.List(
            [
                ConvBlock(i, o, rngs=rngs)
                for i, o in zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)
            ]
        )
        self.mask_blocks = nnx.List(
            [ConvBlock(i, o, rngs=rngs) for i, o in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True)]
        )
        self.attention = SpatialAttention(WIDTHS[-1], WIDTHS[-1], rngs=rngs)
        self.hidden = Dense(self.feature_size, 128, rngs=rngs)
        self.head = Dense(128, classes, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        x = x.astype(mode.dtype)
        mask, image = x[..., :1], x[..., 1:]
        for block in self.mask_blocks:
            mask = block(mask, mode)
        for block in self.image_blocks:
            image = block(image, mode)
        attention = self.attention(mask, mode)
        image = image * attention
        features = jnp.concatenate([image.mean((1, 2)), mask.mean((1, 2))], axis=-1)
        hidden = dropout(leaky_relu(self.hidden(features)), self.dropout, mode)
        logits = self.head(hidden).astype(jnp.float32)
        return Outputs(logits, features.astype(jnp.float32), attention[..., 0].astype(jnp.float32))


ATTENTION = Backbone(
    AttentionClassifier,
    original=(
        *(
            (f"{branch}_features.{4 * stage + at}", f"{branch}_blocks.{stage}.{layer}")
            for branch in ("image", "mask")
            for stage in range(len(WIDTHS))
            for at, layer in enumerate(("conv", "norm"))
        ),
        ("attention.attention_conv.0", "attention.conv"),
        ("attention.attention_conv.1", "attention.norm"),
        ("attention.attention_conv.3", "attention.project"),
        ("classifier.0", "hidden"),
        ("classifier.3", "head"),
    ),
)
