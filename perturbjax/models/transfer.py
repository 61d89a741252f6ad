"""Transfer learning: a backbone with published weights, new layers, and two training phases.

Phase 1 ("new layers") trains the new layers. The backbone is frozen, its BatchNorm in evaluation
mode. Phase 2 ("all layers") trains everything, the backbone at a lower rate that may fall
from its last stage to its stem. Its BatchNorm may keep the published statistics.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.core.config import BackboneNorm, Head, TransferConfig
from perturbjax.core.errors import InputError
from perturbjax.models.attention import SpatialAttention, conv_blocks
from perturbjax.models.backbone import Backbone
from perturbjax.models.bags import CELLS, BagClassifier
from perturbjax.models.ensemble_head import EnsembleClassifier
from perturbjax.models.layers import Dense, Mode, Outputs, ShapeRngs, classify

Phase = Literal["new layers", "all layers"]

BACKBONE = "backbone"
#: Output channels of the two mask blocks; each halves height and width.
MASK_WIDTHS = (16, 32)


class TransferClassifier(nnx.Module):
    """New layers on a backbone that takes RGB images.

    The input is (B, H, W, 1 + channels): the mask, then the image, standardized to mean 0 and
    standard deviation 1 (`--normalize site` or `plate`), as published weights expect. One
    channel is copied to red, green and blue. Several are assigned to the three in turn, and
    those assigned to the same color are averaged.

    With the dense head, `features` are the means of the backbone's feature map, and the mask is
    not used. With the attention head they are means of the feature map times the mask's
    attention, followed by means of the mask's own feature map.

    Attributes:
        frozen: no gradient reaches the backbone, and its BatchNorm is in evaluation mode.
        backbone_norm: statistics of the backbone's BatchNorm when it is not frozen, "batch" or
            "published".
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
        # The classes of the published head are not those of the dataset.
        self.backbone.head = None
        self.attention = MaskAttention(rngs=rngs) if head == "attention" else None
        self.feature_size = backbone.feature_size + (MASK_WIDTHS[-1] if head == "attention" else 0)
        self.head = Dense(self.feature_size, classes, rngs=rngs)
        self.dropout, self.channels, self.frozen = dropout, channels, False
        self.backbone_norm = backbone_norm

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode) -> Outputs:
        features, attention = self.compute_features(x, mode)
        outputs = classify(self.head, features, self.dropout, mode)
        return outputs._replace(attention=attention)

    def compute_features(
        self, x: Float[Array, "b h w c"], mode: Mode
    ) -> tuple[Float[Array, "b d"], Float[Array, "b h2 w2"] | None]:
        """Compute the features of each image, and its attention map if there is one."""
        mask, image = x[..., :1], x[..., 1:] @ _rgb_weights(self.channels)
        fixed_statistics = self.frozen or self.backbone_norm == "published"
        feature_map = self.backbone.feature_map(image, mode.frozen() if fixed_statistics else mode)
        if self.frozen:
            # The backward pass ends here, because gradients of a frozen backbone are not used.
            feature_map = jax.lax.stop_gradient(feature_map)
        features, attention = feature_map.astype(jnp.float32), None
        if self.attention is None:
            features = features.mean((1, 2))
        else:
            mask = mask.astype(mode.dtype)
            # (b, h, w, 1) at the resolution of the feature map, and (b, MASK_WIDTHS[-1]).
            weights, mask_features = self.attention(mask, feature_map.shape[1:3], mode)
            features = jnp.concatenate([(features * weights).mean((1, 2)), mask_features], axis=-1)
            attention = weights[..., 0]
        return features, attention

    def apply_head(self, features: Float[Array, "b d"], mode: Mode) -> Float[Array, "b classes"]:
        """Compute the logits of features."""
        return classify(self.head, features, self.dropout, mode).logits


class MaskAttention(nnx.Module):
    """Attention map in (0, 1) over a feature map's positions, and mean features of the mask."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = conv_blocks((1, *MASK_WIDTHS), rngs=rngs)
        self.attention = SpatialAttention(MASK_WIDTHS[-1], MASK_WIDTHS[-1], rngs=rngs)

    def __call__(
        self, mask: Float[Array, "b h w 1"], size: tuple[int, int], mode: Mode
    ) -> tuple[Float[Array, "b h2 w2 1"], Float[Array, "b d"]]:
        # Resize such that the blocks, which halve height and width, end at the wanted size.
        fine = [length * 2 ** len(self.blocks) for length in size]
        x = jax.image.resize(mask, (mask.shape[0], *fine, 1), "linear", antialias=True)
        for block in self.blocks:
            x = block(x, mode)
        return self.attention(x, mode).astype(jnp.float32), x.astype(jnp.float32).mean((1, 2))


#: Networks with a pretrained backbone.
PretrainedClassifier = TransferClassifier | EnsembleClassifier | BagClassifier


def _rgb_weights(channels: int) -> Float[np.ndarray, "channels 3"]:
    """Matrix from image channels to red, green and blue; each color is a mean of its channels."""
    # (channels, 3): channel k is assigned to color k mod 3.
    weights = np.ones((1, 3)) if channels == 1 else np.eye(3)[np.arange(channels) % 3]
    return (weights / np.maximum(weights.sum(0), 1)).astype(np.float32)


def build(
    backbone: str, transfer: TransferConfig, *, seed: int, **shape: Any
) -> tuple[TransferClassifier | EnsembleClassifier, dict[str, Any]]:
    """Build a backbone with its published weights and new layers.

    Args:
        backbone: a name of `models.with_weights`.
        transfer: source of the weights, kind of head, training of the backbone.
        seed: seed of the new layers' parameters.
        shape: `classes`, `channels` (of the image), `copies` (normalized copies of each stored
            channel) and `dropout`.

    Returns:
        The network, and the provenance of the weights.

    Raises:
        InputError: the weights cannot be loaded, belong to another backbone, or take another
            number of channels than three.
    """
    from perturbjax.models.weights import load_pretrained

    pretrained = load_pretrained(backbone, transfer.weights)
    facts = pretrained.provenance
    return _classifier(pretrained.model, facts, transfer, rngs=nnx.Rngs(seed), **shape), facts


def abstract_classifier(
    provenance: dict[str, Any], transfer: TransferConfig, **shape: Any
) -> TransferClassifier | EnsembleClassifier:
    """Build the same network without values, to be filled from a checkpoint.

    The published weights are not needed. Arguments as of `build`.
    """
    from perturbjax.models.weights import empty_backbone

    def classifier() -> TransferClassifier | EnsembleClassifier:
        backbone = empty_backbone(provenance)
        return _classifier(backbone, provenance, transfer, rngs=ShapeRngs(), **shape)

    return nnx.eval_shape(classifier)


def _classifier(
    backbone: nnx.Module,
    provenance: dict[str, Any],
    transfer: TransferConfig,
    *,
    copies: int,
    **shape: Any,
) -> TransferClassifier | EnsembleClassifier:
    if provenance["inputs"] != 3:
        raise InputError(
            f"--weights {transfer.weights}: takes {provenance['inputs']} channels, but transfer "
            "learning needs 3. Choose weights of an RGB network."
        )
    if transfer.head == "channels":
        from perturbjax.models import BACKBONES

        scaling = BACKBONES[provenance["backbone"]].input_scaling
        shape |= {"input_scaling": scaling, "symmetries": transfer.symmetries}
        return EnsembleClassifier(backbone, copies=copies, **shape)
    return TransferClassifier(
        backbone, head=transfer.head, backbone_norm=transfer.backbone_norm, **shape
    )


def set_phase(model: PretrainedClassifier, phase: Phase) -> PretrainedClassifier:
    """Freeze the backbone in phase "new layers", unfreeze it in "all layers"."""
    network = model.cells if isinstance(model, BagClassifier) else model
    network.frozen = phase == "new layers"
    return model


def rate_scales(params: Any, phase: Phase, transfer: TransferConfig, backbone: Backbone) -> Any:
    """Compute each parameter's learning rate as a multiple of the recipe's.

    A stage of the backbone has finetune_rate × layer_decay^d, with d the number of stages
    between it and the last one. Of an `EnsembleClassifier` only the trainable branch is trained.

    Returns:
        Pytree of floats like `params`; 0 for parameters that are not trained.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    # Paths as lists of names, for example backbone, stages, 0, ...
    keys = [jax.tree_util.keystr(path, simple=True, separator="/").split("/") for path, _ in leaves]
    # The network of the cells of a bag has the same layers one level deeper.
    keys = [key[1:] if key[0] == CELLS else key for key in keys]
    # None for new layers.
    depths = [backbone.depth(key[1:]) if key[0] == BACKBONE else None for key in keys]
    top = max((depth for depth in depths if depth is not None), default=0)

    def scale(key: list[str], depth: int | None) -> float:
        if transfer.head == "channels":
            return float(key[0] == "trainable_branch")
        if depth is None:
            return 1.0
        if phase == "new layers":
            return 0.0
        # The deepest part has the full fine-tuning rate; `layer_decay` reduces it for each earlier
        # part.
        return transfer.finetune_rate * transfer.layer_decay ** (top - depth)

    return jax.tree_util.tree_unflatten(treedef, map(scale, keys, depths))


def scale_updates(
    optimizer: optax.GradientTransformation, scales: Any
) -> optax.GradientTransformation:
    """Multiply the optimizer's updates by `scales`. At scale 0 a parameter keeps every bit."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        # x + -0.0 is x for every x; x + 0.0 would turn -0.0 into 0.0.
        scaled = jax.tree.map(lambda u, s: u * s if s else jnp.full_like(u, -0.0), updates, scales)
        return scaled, state

    return optax.GradientTransformation(optimizer.init, update)
