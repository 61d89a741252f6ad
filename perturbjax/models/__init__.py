"""Networks by name. Every one maps (mask, image) to logits and features; see `layers.Mode` and `layers.Outputs`."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from perturbjax.console import InputError
from perturbjax.models.attention import AttentionClassifier
from perturbjax.models.attention_multiscale import MultiscaleAttentionClassifier
from perturbjax.models.efficientnet import efficientnet_b0, efficientnet_lite0
from perturbjax.models.layers import Mode, Outputs
from perturbjax.models.masked_cnn import MaskedCNN
from perturbjax.models.resnet import resnet18, resnet34, resnet50

__all__ = ["MODELS", "Mode", "Outputs", "create"]

#: Name → constructor taking (classes, channels, dropout, rngs) by keyword.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "attention": AttentionClassifier,
    "attention_multiscale": MultiscaleAttentionClassifier,
    "masked_cnn": MaskedCNN,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "efficientnet_b0": efficientnet_b0,
    "efficientnet_lite0": efficientnet_lite0,
}

#: Networks that flatten their feature maps, and so work at one input side only.
SIZED = ("masked_cnn",)


def create(name: str, *, classes: int, channels: int, dropout: float, seed: int, image_size: int = 128) -> nnx.Module:
    """A freshly initialised network, its parameters decided by `seed`.

    `channels` counts the image's channels, without the mask. `image_size` is the side of the input in pixels; only
    the networks of `SIZED` are tied to it.

    Raises:
        InputError: there is no network of that name; the message lists those there are.
    """
    if name not in MODELS:
        raise InputError(f"--model {name}: unknown; choose one of {', '.join(MODELS)}")
    sized = {"image_size": image_size} if name in SIZED else {}
    return MODELS[name](classes=classes, channels=channels, dropout=dropout, rngs=nnx.Rngs(seed), **sized)
