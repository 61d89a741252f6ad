"""Networks by name. Each maps a mask and an image to `Outputs` (see `layers`)."""

from __future__ import annotations

from flax import nnx

from perturbjax.core.config import ModelConfig
from perturbjax.core.errors import InputError
from perturbjax.models.attention import ATTENTION
from perturbjax.models.attention_multiscale import ATTENTION_MULTISCALE
from perturbjax.models.backbone import Backbone
from perturbjax.models.dinov2 import DINOV2
from perturbjax.models.efficientnet import EFFICIENTNET_B0, EFFICIENTNET_LITE0, EFFICIENTNET_LITE2
from perturbjax.models.layers import Mode, Outputs
from perturbjax.models.masked_cnn import MASKED_CNN
from perturbjax.models.resnet import RESNET18, RESNET34, RESNET50
from perturbjax.models.user_networks import allow_network, create_user_network, is_user_network

__all__ = [
    "BACKBONES",
    "FIXED_SIZE_NETWORKS",
    "Backbone",
    "Mode",
    "Outputs",
    "allow_network",
    "create",
    "with_weights",
]

#: All networks. To add one, write a module with its record and add a line here.
BACKBONES: dict[str, Backbone] = {
    "attention": ATTENTION,
    "attention_multiscale": ATTENTION_MULTISCALE,
    "masked_cnn": MASKED_CNN,
    "resnet18": RESNET18,
    "resnet34": RESNET34,
    "resnet50": RESNET50,
    "efficientnet_b0": EFFICIENTNET_B0,
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    "efficientnet_lite2": EFFICIENTNET_LITE2,
    **DINOV2,
}

#: Networks of fixed input size, because they flatten their feature maps.
FIXED_SIZE_NETWORKS = tuple(
    name for name, backbone in BACKBONES.items() if backbone.infer_image_size is not None
)


def with_weights() -> list[str]:
    """Return the names of backbones with published weights."""
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
    """Create a Flax NNX network with random parameters.

    Call it as `network(x, Mode())`; it returns `Outputs`. The input `x` is float
    (b, h, w, 1 + channels): the mask, then the normalized image.

    Args:
        name: one of `BACKBONES`, or `package.module:function` of a network that the user has
            allowed (see `user_networks`).
        classes: width of the logits.
        channels: image channels, without the mask.
        dropout: dropout rate before the last layer.
        seed: seed of the parameters.
        image_size: height and width of the input in pixels; used by `FIXED_SIZE_NETWORKS` and by
            networks of users.

    Raises:
        InputError: no network has this name (the message lists all names), or the network of a user
            cannot be used.

    Example:
        >>> network = perturbjax.create("attention", classes=7)
        >>> outputs = network(jnp.zeros((2, 64, 64, 2)), perturbjax.Mode())
        >>> outputs.logits.shape, outputs.features.shape, outputs.attention.shape
        ((2, 7), (2, 256), (2, 8, 8))
    """
    if is_user_network(name):
        return create_user_network(
            name,
            classes=classes,
            channels=channels,
            image_size=image_size,
            dropout=dropout,
            rngs=nnx.Rngs(seed),
        )
    if name not in BACKBONES:
        raise InputError(f"--model {name}: unknown network. Choose one of {', '.join(BACKBONES)}.")
    # Other constructors do not take an image size.
    sized = {"image_size": image_size} if name in FIXED_SIZE_NETWORKS else {}
    return BACKBONES[name].network(
        classes=classes, channels=channels, dropout=dropout, rngs=nnx.Rngs(seed), **sized
    )
