"""Residual networks (He et al. 2016, arXiv:1512.03385) with torchvision's layout.

The 3×3 convolution of a bottleneck has the stride (v1.5). Strided convolutions pad symmetrically.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.backbone import Backbone, Naming, Path, name_by_layer
from perturbjax.models.layers import BatchNorm, Conv, Dense, Mode, Outputs, classify, max_pool

STAGE_WIDTHS = (64, 128, 256, 512)


class ConvNorm(nnx.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size, stride=stride, use_bias=False, rngs=rngs)
        self.norm = BatchNorm(outputs)

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h2 w2 o"]:
        return self.norm(self.conv(x), mode)


class Block(nnx.Module):
    """Convolutions with ReLU between them, added to the input.

    A 1×1 convolution projects the input if the shape changes.
    """

    #: Output channels per channel of `width`.
    expansion: int

    def __init__(
        self, inputs: int, layers: list[ConvNorm], *, outputs: int, stride: int, rngs: nnx.Rngs
    ):
        self.layers = nnx.List(layers)
        changes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride=stride, rngs=rngs) if changes else None

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h2 w2 o"]:
        y = x
        for layer in self.layers[:-1]:
            y = jax.nn.relu(layer(y, mode))
        # No ReLU after the last convolution: it follows the addition.
        y = self.layers[-1](y, mode)
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x, mode)))


class BasicBlock(Block):
    """Two 3×3 convolutions; the first has the stride."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int, rngs: nnx.Rngs):
        layers = [
            ConvNorm(inputs, width, 3, stride=stride, rngs=rngs),
            ConvNorm(width, width, 3, rngs=rngs),
        ]
        super().__init__(inputs, layers, outputs=width, stride=stride, rngs=rngs)


class Bottleneck(Block):
    """1×1 convolution to `width`, strided 3×3, and 1×1 to four times `width`."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int, rngs: nnx.Rngs):
        layers = [
            ConvNorm(inputs, width, 1, rngs=rngs),
            ConvNorm(width, width, 3, stride=stride, rngs=rngs),
            ConvNorm(width, width * self.expansion, 1, rngs=rngs),
        ]
        super().__init__(inputs, layers, outputs=width * self.expansion, stride=stride, rngs=rngs)


BlockKind = type[BasicBlock] | type[Bottleneck]


class ResNet(nnx.Module):
    """Residual network on (B, H, W, inputs).

    `features` are (B, feature_size) means of the last feature map, before dropout.

    Args:
        stage_sizes: number of blocks in each of the four stages.
        block: `BasicBlock` or `Bottleneck`.
        classes: width of the logits.
        channels: image channels. With the mask, the network takes 1 + channels.
        inputs: input channels if not 1 + channels (3 for ImageNet weights).
        dropout: dropout rate of the features before the last layer.
        rngs: random streams for the parameters.
    """

    def __init__(
        self,
        *,
        stage_sizes: tuple[int, int, int, int],
        block: BlockKind,
        classes: int,
        channels: int = 1,
        inputs: int | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inputs = 1 + channels if inputs is None else inputs
        self.stem = ConvNorm(inputs, STAGE_WIDTHS[0], 7, stride=2, rngs=rngs)
        stages, width_in = [], STAGE_WIDTHS[0]
        self.stage_widths = tuple(width * block.expansion for width in STAGE_WIDTHS)
        for number, (size, width) in enumerate(zip(stage_sizes, STAGE_WIDTHS, strict=True)):
            blocks = []
            for position in range(size):
                # The first stage follows the max-pool, so it does not reduce the resolution.
                stride = 2 if number > 0 and position == 0 else 1
                blocks.append(block(width_in, width, stride=stride, rngs=rngs))
                width_in = width * block.expansion
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = Dense(width_in, classes, rngs=rngs)
        self.feature_size, self.dropout = width_in, dropout

    def stage_maps(
        self, x: Float[Array, "b h w inputs"], mode: Mode
    ) -> list[Float[Array, "b _h _w _d"]]:
        """Return the output of each of the four stages, finest first."""
        x = jax.nn.relu(self.stem(x.astype(mode.dtype), mode))
        # A quarter of the input's height and width.
        x = max_pool(x, window=3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            for block in stage:
                x = block(x, mode)
            maps.append(x)
        return maps

    def feature_map(self, x: Float[Array, "b h w inputs"], mode: Mode) -> Float[Array, "b h2 w2 d"]:
        """Return the last feature map, of 1/32 of height and width, rounded up."""
        return self.stage_maps(x, mode)[-1]

    def __call__(self, x: Float[Array, "b h w inputs"], mode: Mode) -> Outputs:
        # The mean over positions is computed in float32, also for activations of lower precision.
        features = self.feature_map(x, mode).astype(jnp.float32).mean((1, 2))
        return classify(self.head, features, self.dropout, mode)


def _torchvision(path: Path) -> str:
    match path:
        case ("stem", "conv"):
            return "conv1"
        case ("stem", "norm"):
            return "bn1"
        case ("stages", stage, block, "shortcut", part):
            # `downsample` is a sequence: 0 is the convolution, 1 is BatchNorm.
            return f"layer{stage + 1}.{block}.downsample.{('conv', 'norm').index(part)}"
        case ("stages", stage, block, "layers", number, part):
            return f"layer{stage + 1}.{block}.{'conv' if part == 'conv' else 'bn'}{number + 1}"
    return "fc"


def _transformers(path: Path) -> str:
    # None for the dense layer at the end.
    part = {"conv": "convolution", "norm": "normalization"}.get(path[-1])
    match path:
        case ("stem", _):
            return f"embedder.embedder.{part}"
        case ("stages", stage, block, "shortcut", _):
            return f"encoder.stages.{stage}.layers.{block}.shortcut.{part}"
        case ("stages", stage, block, "layers", number, _):
            return f"encoder.stages.{stage}.layers.{block}.layer.{number}.{part}"
    return "classifier.1"


NAMINGS = (
    Naming("resnet", "torchvision", name_by_layer(_torchvision)),  # also timm
    Naming("resnet", "transformers", name_by_layer(_transformers), prefix="resnet."),
)


def _backbone(stage_sizes: tuple[int, int, int, int], block: BlockKind, source: str) -> Backbone:
    return Backbone(
        partial(ResNet, stage_sizes=stage_sizes, block=block),
        namings=NAMINGS,
        stage_count=len(stage_sizes),
        source=source,
        license="BSD-3-Clause",  # license of torchvision
    )


RESNET18 = _backbone((2, 2, 2, 2), BasicBlock, "hf:timm/resnet18.tv_in1k")
RESNET34 = _backbone((3, 4, 6, 3), BasicBlock, "hf:timm/resnet34.tv_in1k")
RESNET50 = _backbone((3, 4, 6, 3), Bottleneck, "hf:timm/resnet50.tv2_in1k")
