"""What is known of a network, in one record: how it is made, whose weights fit it, and what those weights expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

#: A path in our networks, such as ("stages", 0, 1, "layers", 2, "conv", "kernel").
Path = tuple[Any, ...]
Tensors = Mapping[str, np.ndarray]

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class InputScaling(NamedTuple):
    """Mean and deviation of red, green and blue in what weights were trained on (images in [0, 1])."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


IMAGENET_SCALING = InputScaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: To about ±1, as TensorFlow's networks like it.
SYMMETRIC_SCALING = InputScaling((127 / 255,) * 3, (128 / 255,) * 3)
#: As they come.
NO_SCALING = InputScaling((0.0,) * 3, (1.0,) * 3)


class Naming(NamedTuple):
    """What a library that publishes weights calls a network's tensors.

    Attributes:
        family: of networks, such as resnet.
        library: whose names these are.
        tensor: our path of a tensor → their name of it.
        stem: our path of the kernel of the first convolution, by whose name a file is recognised.
        prefix: what their networks with a head put before every name but the head's.
        unused: their tensors that have no place here.
    """

    family: str
    library: str
    tensor: Callable[[Path], str]
    stem: Path = ("stem", "conv", "kernel")
    prefix: str = ""
    unused: tuple[str, ...] = ()


def name_by_layer(layer: Callable[[Path], str]) -> Callable[[Path], str]:
    """A naming of tensors from a naming of layers: what is left is torch's (weight, bias, running_mean …)."""
    return lambda path: f"{layer(path[:-1])}.{_LEAVES[path[-1]]}"


class Package(NamedTuple):
    """An installed Python package that carries weights: its importable name, the file in it, and its project's."""

    module: str
    file: str
    project: str


def inputs_and_classes(naming: Naming, tensors: Tensors, source: str) -> dict[str, Any]:
    """Channels in and logits out; no logits where the head was not published."""
    stem = tensors[naming.tensor(naming.stem)]
    head = tensors.get(naming.tensor(("head", "kernel")))
    return {
        "inputs": stem.shape[1] if stem.ndim == 4 else 0,
        "classes": 0 if head is None else len(head),
    }


@dataclass(frozen=True)
class Backbone:
    """All that is known of a network.

    Attributes:
        network: constructor; takes (classes, channels, dropout, rngs) by keyword, and the `arguments`.
        original: (torch's prefix, our module) of every layer in torch's order, where the original program had it.
        side_of: tensors under the original's names → side of the input in pixels, where the network is tied to one.
        namings: whose published weights fit.
        arguments: (naming, tensors, where they are from) → the constructor's arguments that the weights decide.
        argument_names: of those.
        input_scaling: what the published weights expect of an image.
        input_size: side in pixels at which they are usually applied.
        stages: the attribute whose entries, from the first on, are each a step further from the stem (for layer-wise
            rates); what lies before them is in `stem`, and the rest is on top of them.
        stage_count: how many entries it has.
        stem: attributes before the stages.
        source, licence: published weights that fit, as `--weights` takes them, and their licence.
        package: where `package:NAME` finds them.
    """

    network: Callable[..., nnx.Module]
    original: tuple[tuple[str, str], ...] = ()
    infer_image_size: Callable[[Tensors], int] | None = None
    namings: tuple[Naming, ...] = ()
    arguments: Callable[[Naming, Tensors, str], dict[str, Any]] = inputs_and_classes
    argument_names: tuple[str, ...] = ("inputs", "classes")
    input_scaling: InputScaling = IMAGENET_SCALING
    input_size: int = 224
    stages: str = "stages"
    stage_count: int = 0
    stem: tuple[str, ...] = ("stem",)
    source: str = ""
    license: str = ""
    package: Package | None = None

    def depth(self, path: Path | list[str]) -> int:
        """Steps from the input of what lies at a path: 0 the stem, then the stages, then what comes on top of them."""
        part, *rest = path
        if part == self.stages:
            return 1 + int(rest[0])
        return 0 if part in self.stem else 1 + self.stage_count
