"""Mask-attention network with an attention map after every stage, not only after the last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.attention import (
    HIDDEN,
    WIDTHS,
    SpatialAttention,
    attention_outputs,
    conv_blocks,
)
from perturbjax.models.backbone import Backbone
from perturbjax.models.layers import Dense, Mode, Outputs, dropout


class MultiscaleAttentionClassifier(nnx.Module):
    """Two convolutional branches; after each stage an attention map multiplies the image features.

    The attended features are the input of the next image stage. The input of the network is
    (B, H, W, 1 + channels), the mask first. `features` are (B, 256): means of the last attended
    image features and of the mask features. `logits` follow from dense 128, ReLU, dropout and a
    dense layer. Stages use ReLU, attention maps LeakyReLU.
    """

    feature_size = 2 * WIDTHS[-1]

    def __init__(self, *, classes: int, channels: int = 1, dropout: float = 0.3, rngs: nnx.Rngs):
        relu = jax.nn.relu
        self.image_blocks = conv_blocks((channels, *WIDTHS), activation=relu, rngs=rngs)
        self.mask_blocks = conv_blocks((1, *WIDTHS), activation=relu, rngs=rngs)
        self.attentions = nnx.List([SpatialAttention(width, width, rngs=rngs) for width in WIDTHS])
        self.hidden = Dense(self.feature_size, HIDDEN, rngs=rngs)
        self.head = Dense(HIDDEN, classes, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        x = x.astype(mode.dtype)
        mask, image = x[..., :1], x[..., 1:]
        stages = zip(self.image_blocks, self.mask_blocks, self.attentions, strict=True)
        for image_block, mask_block, attend in stages:
            # Mask features do not depend on the image, so attention follows the shape of cells
            # only.
            mask = mask_block(mask, mode)
            attention = attend(mask, mode)
            image = image_block(image, mode) * attention
        # Only the attention map of the last stage is returned.
        features = jnp.concatenate([image.mean((1, 2)), mask.mean((1, 2))], axis=-1)
        hidden = dropout(jax.nn.relu(self.hidden(features)), self.dropout, mode)
        return attention_outputs(self.head(hidden), features, attention)


ATTENTION_MULTISCALE = Backbone(
    MultiscaleAttentionClassifier,
    original=(
        *(
            (f"{branch}_block{stage + 1}.{offset}", f"{branch}_blocks.{stage}.{layer}")
            for branch in ("image", "mask")
            for stage in range(len(WIDTHS))
            for offset, layer in enumerate(("conv", "norm"))
        ),
        *(
            (f"attention{stage + 1}.attention_conv.{offset}", f"attentions.{stage}.{layer}")
            for stage in range(len(WIDTHS))
            for offset, layer in ((0, "conv"), (1, "norm"), (3, "project"))
        ),
        ("classifier.0", "hidden"),
        ("classifier.3", "head"),
    ),
)
