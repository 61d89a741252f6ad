"""Mask-attention network: an attention map computed from the mask weights the image features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.backbone import Backbone
from perturbjax.models.layers import BatchNorm, Conv, Dense, Mode, Outputs, dropout, leaky_relu

WIDTHS = (32, 64, 128)
#: Units of the hidden layer before the logits.
HIDDEN = 128


class ConvBlock(nnx.Module):
    """3×3 convolution, BatchNorm, activation and 2×2 max-pooling.

    The activation is monotonic, so it is applied after pooling, to a quarter of the values.
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
        # The convolution applies the signs through its kernel, and BatchNorm includes the bias in
        # its statistics only.
        signs = self.norm.channel_signs()
        x = self.conv.without_bias(x, signs)
        bias = self.conv.bias[...]  # type: ignore[index]
        return self.activation(self.norm.normalize_and_pool(x, mode, shift=bias, signs=signs))


def conv_blocks(
    widths: Sequence[int],
    *,
    activation: Callable[[Array], Array] = leaky_relu,
    rngs: nnx.Rngs,
) -> nnx.List:
    """Create consecutive `ConvBlock`s from the channels of the input and of each output."""
    blocks = [ConvBlock(i, o, activation=activation, rngs=rngs) for i, o in pairwise(widths)]
    return nnx.List(blocks)


class SpatialAttention(nnx.Module):
    """Attention map in (0, 1), one value per position, from mask features."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, hidden, rngs=rngs)
        self.norm = BatchNorm(hidden)
        self.project = Conv(hidden, 1, size=1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h w 1"]:
        bias = self.conv.bias[...]  # type: ignore[index]
        hidden = self.norm(self.conv.without_bias(x), mode, shift=bias)
        return jax.nn.sigmoid(self.project(leaky_relu(hidden)))


class AttentionClassifier(nnx.Module):
    """Two convolutional branches; the mask's attention map multiplies the image features.

    The input is (B, H, W, 1 + channels), the mask first. `features` are (B, 256): means of the
    attended image features and of the mask features. `logits` follow from dense 128, LeakyReLU,
    dropout and a dense layer.
    """

    feature_size = 2 * WIDTHS[-1]

    def __init__(self, *, classes: int, channels: int = 1, dropout: float = 0.3, rngs: nnx.Rngs):
        self.image_blocks = conv_blocks((channels, *WIDTHS), rngs=rngs)
        self.mask_blocks = conv_blocks((1, *WIDTHS), rngs=rngs)
        self.attention = SpatialAttention(WIDTHS[-1], WIDTHS[-1], rngs=rngs)
        self.hidden = Dense(self.feature_size, HIDDEN, rngs=rngs)
        self.head = Dense(HIDDEN, classes, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        features, attention = self.compute_features(x, mode)
        return attention_outputs(self.apply_head(features, mode), features, attention)

    def compute_features(
        self, x: Float[Array, "b h w c"], mode: Mode
    ) -> tuple[Float[Array, "b d"], Float[Array, "b h2 w2 1"]]:
        """Compute the features of each image, and its attention map."""
        x = x.astype(mode.dtype)
        mask, image = x[..., :1], x[..., 1:]
        for block in self.mask_blocks:
            mask = block(mask, mode)
        for block in self.image_blocks:
            image = block(image, mode)
        # (b, h / 8, w / 8, 1): each of the three blocks halves height and width.
        attention = self.attention(mask, mode)
        features = jnp.concatenate([(image * attention).mean((1, 2)), mask.mean((1, 2))], axis=-1)
        return features, attention

    def apply_head(self, features: Float[Array, "b d"], mode: Mode) -> Float[Array, "b classes"]:
        """Compute the logits of features."""
        hidden = dropout(leaky_relu(self.hidden(features)), self.dropout, mode)
        return self.head(hidden)


def attention_outputs(logits: Array, features: Array, attention: Array) -> Outputs:
    """Collect the outputs of an attention network in float32."""
    values = (values.astype(jnp.float32) for values in (logits, features, attention[..., 0]))
    return Outputs(*values)


ATTENTION = Backbone(
    AttentionClassifier,
    original=(
        *(
            # A stage of the original has four modules; the first two have parameters.
            (f"{branch}_features.{4 * stage + offset}", f"{branch}_blocks.{stage}.{layer}")
            for branch in ("image", "mask")
            for stage in range(len(WIDTHS))
            for offset, layer in enumerate(("conv", "norm"))
        ),
        ("attention.attention_conv.0", "attention.conv"),
        ("attention.attention_conv.1", "attention.norm"),
        ("attention.attention_conv.3", "attention.project"),
        ("classifier.0", "hidden"),
        ("classifier.3", "head"),
    ),
)
