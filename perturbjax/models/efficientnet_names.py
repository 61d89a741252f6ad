"""Tensor names of EfficientNets in the libraries that publish weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from perturbjax.models.backbone import Naming, Path, name_by_layer


def list_blocks(stages: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """List (stage, position in the stage) of each block."""
    return [
        (stage, position)
        for stage, (repeats, *_) in enumerate(stages)
        for position in range(repeats)
    ]


_TIMM_LAYERS = {"expand": "pw", "depthwise": "dw", "project": "pwl"}


def _pytorch(path: Path) -> str:
    match path:
        case ("stem" | "top" as end, part):
            names = ("_conv_stem", "_bn0") if end == "stem" else ("_conv_head", "_bn1")
            return names[part == "norm"]
        case ("blocks", number, "squeeze", part):
            return f"_blocks.{number}._se_{part}"
        # efficientnet_pytorch numbers the blocks of all stages consecutively.
        case ("blocks", number, layer, "conv"):
            return f"_blocks.{number}._{layer}_conv"
        case ("blocks", number, layer, "norm"):
            return f"_blocks.{number}._bn{('expand', 'depthwise', 'project').index(layer)}"
    return "_fc"


def _timm(path: Path, blocks: list[tuple[int, int]]) -> str:
    match path:
        case ("stem" | "top" as end, part):
            names = ("conv_stem", "bn1") if end == "stem" else ("conv_head", "bn2")
            return names[part == "norm"]
        case ("blocks", number, "squeeze", part):
            return "blocks.{}.{}.se.conv_{}".format(*blocks[number], part)
        case ("blocks", number, layer, part):
            # The first block does not expand; timm uses other names in it.
            layers = {"depthwise": "dw", "project": "pw"} if number == 0 else _TIMM_LAYERS
            name = (
                f"conv_{layers[layer]}" if part == "conv" else f"bn{list(layers).index(layer) + 1}"
            )
            return "blocks.{}.{}.{}".format(*blocks[number], name)
    return "classifier"


def _torchvision(path: Path, blocks: list[tuple[int, int]]) -> str:
    match path:
        case ("stem" | "top" as end, part):
            # features.0 is the stem, the stages follow, and the last one is the top.
            number = 0 if end == "stem" else blocks[-1][0] + 2
            return f"features.{number}.{('conv', 'norm').index(part)}"
        case ("blocks", number, layer, part):
            order = ["expand", "depthwise", "squeeze", "project"]
            order = order[number == 0 :]  # the first block does not expand
            # Squeeze-and-excitation has layers fc1 and fc2; elsewhere 0 is the convolution and 1 is
            # BatchNorm.
            last = {"reduce": "fc1", "expand": "fc2", "conv": "0", "norm": "1"}[part]
            stage, position = blocks[number]
            return f"features.{stage + 1}.{position}.block.{order.index(layer)}.{last}"
    return "classifier.1"


def efficientnet_namings(stages: Sequence[tuple[int, ...]]) -> tuple[Naming, ...]:
    """Return the names of the libraries; two of them number the blocks within each stage."""
    blocks = list_blocks(stages)
    return (
        Naming("efficientnet", "efficientnet_pytorch", name_by_layer(_pytorch)),
        Naming("efficientnet", "timm", name_by_layer(partial(_timm, blocks=blocks))),
        Naming("efficientnet", "torchvision", name_by_layer(partial(_torchvision, blocks=blocks))),
    )
