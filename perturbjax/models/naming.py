"""What the libraries that publish weights call the tensors of our backbones.

A naming maps the path of a layer in our network to the layer's name in theirs. Kernels are stored the other way round
there: convolutions (out, in, height, width), dense layers (out, in).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from perturbjax.models.efficientnet import STAGES

#: A path in our networks, such as ("stages", 0, 1, "layers", 2, "conv").
LayerPath = tuple[str | int, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
#: EfficientNet's flat block number → (stage, position in it).
_BLOCKS = [(stage, position) for stage, (repeats, *_) in enumerate(STAGES) for position in range(repeats)]


class Naming(NamedTuple):
    """Attributes:
    family: resnet or efficientnet.
    library: whose names these are.
    layer: our path of a layer → their name of it.
    """

    family: str
    library: str
    layer: Callable[[LayerPath], str]

    def tensor(self, path: LayerPath) -> str:
        """Their name of the tensor at our `path`."""
        return f"{self.layer(path[:-1])}.{_LEAVES[path[-1]]}"


def _resnet_torchvision(path: LayerPath) -> str:
    match path:
        case ("stem", "conv"):
            return "conv1"
        case ("stem", "norm"):
            return "bn1"
        case ("stages", stage, block, "shortcut", part):
            return f"layer{stage + 1}.{block}.downsample.{('conv', 'norm').index(part)}"
        case ("stages", stage, block, "layers", number, part):
            return f"layer{stage + 1}.{block}.{'conv' if part == 'conv' else 'bn'}{number + 1}"
    return "fc"


def _resnet_transformers(path: LayerPath) -> str:
    part = {"conv": "convolution", "norm": "normalization"}.get(path[-1])
    match path:
        case ("stem", _):
            return f"embedder.embedder.{part}"
        case ("stages", stage, block, "shortcut", _):
            return f"encoder.stages.{stage}.layers.{block}.shortcut.{part}"
        case ("stages", stage, block, "layers", number, _):
            return f"encoder.stages.{stage}.layers.{block}.layer.{number}.{part}"
    return "classifier.1"


def _efficientnet_pytorch(path: LayerPath) -> str:
    match path:
        case ("stem" | "top" as place, "conv"):
            return "_conv_stem" if place == "stem" else "_conv_head"
        case ("stem" | "top" as place, "norm"):
            return "_bn0" if place == "stem" else "_bn1"
        case ("blocks", number, "squeeze", part):
            return f"_blocks.{number}._se_{part}"
        case ("blocks", number, layer, "conv"):
            return f"_blocks.{number}._{layer}_conv"
        case ("blocks", number, layer, "norm"):
            return f"_blocks.{number}._bn{('expand', 'depthwise', 'project').index(layer)}"
    return "_fc"


def _efficientnet_timm(path: LayerPath) -> str:
    match path:
        case ("stem" | "top" as place, "conv"):
            return "conv_stem" if place == "stem" else "conv_head"
        case ("stem" | "top" as place, "norm"):
            return "bn1" if place == "stem" else "bn2"
        case ("blocks", number, "squeeze", part):
            return "blocks.{}.{}.se.conv_{}".format(*_BLOCKS[number], part)
        case ("blocks", number, layer, part):
            layers = {"depthwise": "dw", "project": "pw"} if number == 0 else _TIMM_LAYERS
            name = f"conv_{layers[layer]}" if part == "conv" else f"bn{list(layers).index(layer) + 1}"
            return "blocks.{}.{}.{}".format(*_BLOCKS[number], name)
    return "classifier"


_TIMM_LAYERS = {"expand": "pw", "depthwise": "dw", "project": "pwl"}


def _efficientnet_torchvision(path: LayerPath) -> str:
    match path:
        case ("stem" | "top" as place, part):
            return f"features.{0 if place == 'stem' else len(STAGES) + 1}.{('conv', 'norm').index(part)}"
        case ("blocks", number, layer, part):
            order = ["expand", "depthwise", "squeeze", "project"][number == 0 :]  # the first block does not expand
            last = {"reduce": "fc1", "expand": "fc2", "conv": "0", "norm": "1"}[part]
            stage, position = _BLOCKS[number]
            return f"features.{stage + 1}.{position}.block.{order.index(layer)}.{last}"
    return "classifier.1"


NAMINGS = (
    Naming("resnet", "torchvision", _resnet_torchvision),  # and timm, which took the names over
    Naming("resnet", "transformers", _resnet_transformers),
    Naming("efficientnet", "efficientnet_pytorch", _efficientnet_pytorch),
    Naming("efficientnet", "timm", _efficientnet_timm),
    Naming("efficientnet", "torchvision", _efficientnet_torchvision),
)


def recognise(names: set[str]) -> Naming | None:
    """Whose names these are, told by what the first convolution is called; None if nobody's."""
    for naming in NAMINGS:
        if naming.tensor(("stem", "conv", "kernel")) in names:
            return naming
    return None


def to_our_layout(value: np.ndarray, dimensions: int) -> np.ndarray:
    """A published tensor with its axes in our order.

    Convolution kernels (out, in, h, w) become (h, w, in, out), dense ones (out, in) become (in, out); 1×1 convolutions
    that are dense layers here (`dimensions` 2) lose their sides.
    """
    if value.ndim == 4 and dimensions == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
    return value if axes is None else value.transpose(axes)
