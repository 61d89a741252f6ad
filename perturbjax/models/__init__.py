"""Networks by name. Every one maps (mask, image) to logits and features; see `layers.Mode` and `layers.Outputs`."""

from __future__ import annotations

from flax import nnx

from perturbjax.core.config import ModelConfig
from perturbjax.core.errors import InputError
from perturbjax.models.attention import ATTENTION
from perturbjax.models.attention_multiscale import ATTENTION_MULTISCALE
from perturbjax.models.backbone import Backbone
from perturbjax.models.dinov2 import DINOV2
from perturbjax.models.efficientnet import EFFICIENTNET_B0, EFFICIENTNET_LITE0
from perturbjax.models.layers import Mode, Outputs
from perturbjax.models.masked_cnn import MASKED_CNN
from perturbjax.models.resnet import RESNET18, RESNET34, RESNET50

__all__ = ["BACKBONES", "SIZED", "Backbone", "Mode", "Outputs", "create", "with_weights"]

#: All there are. A new one is a file with its record, and its line here.
BACKBONES: dict[str, Backbone] = {
    "attention": ATTENTION,
    "attention_multiscale": ATTENTION_MULTISCALE,
    "masked_cnn": MASKED_CNN,
    "resnet18": RESNET18,
    "resnet34": RESNET34,
    "resnet50": RESNET50,
    "efficientnet_b0": EFFICIENTNET_B0,
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    **DINOV2,
}

#: Networks that flatten their feature maps, and so work at one input side only.
FIXED_SIZE_NETWORKS = tuple(
    name for name, backbone in BACKBONES.items() if backbone.infer_image_size is not None
)


def with_weights() -> list[str]:
    """Names of the backbones that weights are published for."""
    return [name for name, backbone in BACKBONES.items() if backbone.namings]


def create(
    name: str,
    *,
    classes: int,
    channels: int = 1,
    dropout: float = ModelConfig.dropout,
    seed: int = 0,
    image_size: int = 128,
) -> nnx.Module:
    """A freshly initialised Flax NNX network, called as `network(x, Mode())` and giving `Outputs`.

    `x` is (b, h, w, 1 + channels): the mask first, then the normalised image.

    Args:
        name: one of `BACKBONES`.
        classes: width of the logits.
        channels: of the image, without the mask.
        dropout: share of units dropped before the last layer.
        seed: decides the parameters.
        image_size: side of the input in pixels; only the networks of `FIXED_SIZE_NETWORKS` are tied to it.

    Raises:
        InputError: there is no network of that name; the message lists those there are.

    Examples:
        >>> network = perturbjax.create("attention", classes=7)
        >>> outputs = network(jnp.zeros((2, 64, 64, 2)), perturbjax.Mode())
        >>> outputs.logits.shape, outputs.features.shape, outputs.attention.shape
        ((2, 7), (2, 256), (2, 8, 8))
    """
    if name not in BACKBONES:
        raise InputError(f"--model {name}: unknown; choose one of {', '.join(BACKBONES)}")
    sized = {"image_size": image_size} if name in FIXED_SIZE_NETWORKS else {}
    return BACKBONES[name].network(
        classes=classes, channels=channels, dropout=dropout, rngs=nnx.Rngs(seed), **sized
    )
