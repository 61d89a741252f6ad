"""Two-phase models: a backbone with published weights, new layers on top, and what moves when.

In phase 1 only the new layers are trained; the backbone stands still, its BatchNorm in evaluation mode. In phase 2
everything moves, the backbone at a lower rate that may fall from its last stage to its stem; its BatchNorm may keep
the published statistics.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.core.config import BackboneNorm, Head, TransferConfig
from perturbjax.core.errors import InputError
from perturbjax.models.attention import ConvBlock, SpatialAttention
from perturbjax.models.backbone import Backbone
from perturbjax.models.ensemble_head import EnsembleClassifier
from perturbjax.models.layers import Dense, Mode, Outputs, dropout

Phase = Literal["new layers", "all layers"]

BACKBONE = "backbone"
#: Channels of the two blocks that read the mask, at four times and at twice the side of the feature map.
MASK_WIDTHS = (16, 32)


class TransferClassifier(nnx.Module):
    """New layers on a backbone that takes three channels. Takes (B, H, W, 1 + channels): the mask first.

    One image channel is repeated to three; three are taken as they are; more are shared out among the three and
    averaged. The image should come with mean 0 and deviation 1 (`--normalize site` or `plate`), as the weights expect.

    With the dense head, `features` are the averages of the backbone's feature map and the mask is not looked at. With
    the attention head they are averages of the feature map weighted by the mask's attention, and of the mask's own
    features beside them.

    Attributes:
        frozen: whether the backbone stands still: no gradient reaches it, and its BatchNorm is in evaluation mode.
        backbone_norm: what the backbone's BatchNorm normalises by when it does not stand still.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        head: Head,
        classes: int,
        channels: int,
        dropout: float,
        backbone_norm: BackboneNorm = "batch",
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.backbone.head = None
        self.attention = MaskAttention(rngs=rngs) if head == "attention" else None
        self.feature_size = backbone.feature_size + (MASK_WIDTHS[-1] if head == "attention" else 0)
        self.head = Dense(self.feature_size, classes, rngs=rngs)
        self.dropout, self.channels, self.frozen = dropout, channels, False
        self.backbone_norm = backbone_norm

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        mask, image = x[..., :1], x[..., 1:] @ _to_colours(self.channels)
        settled = self.frozen or self.backbone_norm == "published"
        feature_map = self.backbone.feature_map(image, mode.frozen() if settled else mode)
        if self.frozen:
            feature_map = jax.lax.stop_gradient(feature_map)
        features = feature_map.astype(jnp.float32)
        attention = None
        if self.attention is None:
            features = features.mean((1, 2))
        else:
            weights, of_mask = self.attention(mask.astype(mode.dtype), feature_map.shape[1:3], mode)
            features = jnp.concatenate([(features * weights).mean((1, 2)), of_mask], axis=-1)
            attention = weights[..., 0]
        logits = self.head(dropout(features, self.dropout, mode).astype(mode.dtype))
        return Outputs(logits.astype(jnp.float32), features, attention)


class MaskAttention(nnx.Module):
    """Where to look in a feature map, from the mask: in (0, 1) a position; and averages of the mask's own features."""

    def __init__(self, *, rngs: nnx.Rngs):
        widths = (1, *MASK_WIDTHS)
        self.blocks = nnx.List([ConvBlock(i, o, rngs=rngs) for i, o in pairwise(widths)])
        self.attention = SpatialAttention(widths[-1], widths[-1], rngs=rngs)

    def __call__(
        self, mask: Float[Array, "b h w 1"], size: tuple[int, int], mode: Mode
    ) -> tuple[Float[Array, "b h2 w2 1"], Float[Array, "b d"]]:
        fine = [side * 2 ** len(self.blocks) for side in size]  # every block halves the side
        x = jax.image.resize(mask, (mask.shape[0], *fine, 1), "linear", antialias=True)
        for block in self.blocks:
            x = block(x, mode)
        return self.attention(x, mode).astype(jnp.float32), x.astype(jnp.float32).mean((1, 2))


#: What has a backbone with published weights and new layers on it.
PretrainedClassifier = TransferClassifier | EnsembleClassifier


def _to_colours(channels: int) -> Float[np.ndarray, "channels 3"]:
    """One channel to all three colours; more dealt out in turn, each colour the mean of its own."""
    colours = np.ones((1, 3)) if channels == 1 else np.eye(3)[np.arange(channels) % 3]
    return (colours / np.maximum(colours.sum(0), 1)).astype(np.float32)


def build(
    backbone: str,
    transfer: TransferConfig,
    *,
    classes: int,
    channels: int,
    ways: int,
    dropout: float,
    seed: int,
) -> tuple[PretrainedClassifier, dict[str, Any]]:
    """A backbone with its published weights and fresh new layers; and where the weights came from.

    Raises:
        InputError: the weights cannot be had, are not the backbone's, or take other than three channels.
    """
    from perturbjax.models.weights import load_pretrained

    pretrained = load_pretrained(backbone, transfer.weights)
    model = _classifier(
        pretrained.model, pretrained.provenance, transfer, classes, channels, ways, dropout, seed
    )
    return model, pretrained.provenance


def abstract_classifier(
    provenance: dict[str, Any],
    transfer: TransferConfig,
    *,
    classes: int,
    channels: int,
    ways: int,
    dropout: float,
) -> PretrainedClassifier:
    """The same network without values, for a checkpoint to fill: the weights themselves are not needed."""
    from perturbjax.models.weights import empty_backbone

    return nnx.eval_shape(
        lambda: _classifier(
            empty_backbone(provenance),
            provenance,
            transfer,
            classes,
            channels,
            ways,
            dropout,
            seed=0,
        )
    )


def _classifier(
    backbone: nnx.Module,
    provenance: dict[str, Any],
    transfer: TransferConfig,
    classes: int,
    channels: int,
    ways: int,
    dropout: float,
    seed: int,
) -> PretrainedClassifier:
    if provenance["inputs"] != 3:
        raise InputError(
            f"--weights {transfer.weights}: takes {provenance['inputs']} channels; transfer needs 3"
        )
    shape: dict[str, Any] = {
        "classes": classes,
        "channels": channels,
        "dropout": dropout,
        "rngs": nnx.Rngs(seed),
    }
    if transfer.head == "channels":
        from perturbjax.models import BACKBONES

        input_scaling = BACKBONES[provenance["backbone"]].input_scaling
        own: dict[str, Any] = {
            "ways": ways,
            "input_scaling": input_scaling,
            "symmetries": transfer.symmetries,
        }
        return EnsembleClassifier(backbone, **own, **shape)
    return TransferClassifier(
        backbone, head=transfer.head, backbone_norm=transfer.backbone_norm, **shape
    )


def set_phase(model: PretrainedClassifier, phase: Phase) -> PretrainedClassifier:
    """The same network with its backbone standing still, or not."""
    model.frozen = phase == "new layers"
    return model


def rate_scales(params: Any, phase: Phase, transfer: TransferConfig, backbone: Backbone) -> Any:
    """Each parameter's learning rate as a share of the recipe's: a pytree of floats, 0 where nothing moves.

    Of a `EnsembleClassifier` the eyes alone move."""

    def depth(path: tuple) -> int:
        return backbone.depth(_keys(path)[1:])

    top = max(
        (
            depth(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
            if _in_backbone(path)
        ),
        default=0,
    )

    def scale(path: tuple, _: Any) -> float:
        if transfer.head == "channels":
            return float(_keys(path)[0] == "trainable_branch")
        if not _in_backbone(path):
            return 1.0
        frozen = phase == "new layers"
        return (
            0.0 if frozen else transfer.finetune_rate * transfer.layer_decay ** (top - depth(path))
        )

    return jax.tree_util.tree_map_with_path(scale, params)


def scale_updates(
    optimizer: optax.GradientTransformation, scales: Any
) -> optax.GradientTransformation:
    """The optimizer with each parameter's update multiplied; at 0 a parameter keeps every bit."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        # x + -0.0 is x for every x; 0.0 would turn -0.0 into 0.0.
        return jax.tree.map(
            lambda u, s: u * s if s else jnp.full_like(u, -0.0), updates, scales
        ), state

    return optax.GradientTransformation(optimizer.init, update)


def _keys(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _in_backbone(path: tuple) -> bool:
    return _keys(path)[0] == BACKBONE
