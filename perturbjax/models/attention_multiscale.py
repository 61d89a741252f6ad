"""The mask-attention network with an attention after every stage, not only after the last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.attention import WIDTHS, ConvBlock, SpatialAttention
from perturbjax.models.backbone import Backbone
from perturbjax.models.layers import Dense, Mode, Outputs, dropout


class MultiscaleAttentionClassifier(nnx.Module):
    """Two convolutional branches; after each stage the mask's attention multiplies the image's features.

    The attended features are what the next image stage sees. Takes (B, H, W, 1 + channels): the mask first.
    `features` are the (B, 256) joined averages of the last attended image features and the mask features;
    `logits` come from dense 128, ReLU, dropout, dense. The stages use ReLU; the attentions keep LeakyReLU.
    """

    feature_size = 2 * WIDTHS[-1]

    def __init__(self, *, classes: int, channels: int = 1, dropout: float = 0.3, rngs: nnx.Rngs):
        def stages(inputs: int) -> nnx.List:
            pairs = zip((inputs, *WIDTHS[:-1]), WIDTHS, strict=True)
            return nnx.List([ConvBlock(i, o, activation=jax.nn.relu, rngs=rngs) for i, o in pairs])

        self.image_blocks = stages(channels)
        self.mask_blocks = stages(1)
        self.attentions = nnx.List([SpatialAttention(width, width, rngs=rngs) for width in WIDTHS])
        self.hidden = Dense(self.feature_size, 128, rngs=rngs)
        self.head = Dense(128, classes, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        x = x.astype(mode.dtype)
        mask, image = x[..., :1], x[..., 1:]
        stages = zip(self.image_blocks, self.mask_blocks, self.attentions, strict=True)
        for image_block, mask_block, attend in stages:
            mask = mask_block(mask, mode)
            attention = attend(mask, mode)
            image = image_block(image, mode) * attention
        features = jnp.concatenate([image.mean((1, 2)), mask.mean((1, 2))], axis=-1)
        hidden = dropout(jax.nn.relu(self.hidden(features)), self.dropout, mode)
        logits = self.head(hidden).astype(jnp.float32)
        return Outputs(logits, features.astype(jnp.float32), attention[..., 0].astype(jnp.float32))


ATTENTION_MULTISCALE = Backbone(
    MultiscaleAttentionClassifier,
    original=(
        *(
            (f"{branch}_block{stage + 1}.{at}", f"{branch}_blocks.{stage}.{layer}")
            for branch in ("image", "mask")
            for stage in range(len(WIDTHS))
            for at, layer in enumerate(("conv", "norm"))
        ),
        *(
            (f"attention{stage + 1}.attention_conv.{at}", f"attentions.{stage}.{layer}")
            for stage in range(len(WIDTHS))
            for at, layer in ((0, "conv"), (1, "norm"), (3, "project"))
        ),
        ("classifier.0", "hidden"),
        ("classifier.3", "head"),
    ),
)
