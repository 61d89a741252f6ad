"""The network of cellpose 3: a residual U-Net whose decoder is told the image's style.

Stringer et al. 2021 (doi:10.1038/s41592-020-01018-x), with the sums, paddings and the order of normalisation of the
published package, so that its weights give its numbers. Images are NHWC.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.layers import BatchNorm, Conv, Dense, Mode, max_pool
from perturbjax.segmentation.tiles import TILE, Tiling

#: Widths of the published networks of cellpose 1 to 3, after the input's channels.
PUBLISHED_WIDTHS = (32, 64, 128, 256)
#: Widest level of networks that are shown whole images, up to this side; wider ones are shown tiles, as they were
#: trained.
NARROW, WHOLE = 64, 1024
#: The share of new statistics in the running ones, as the package trains.
MOMENTUM = 0.05


@dataclass(frozen=True)
class CPnetConfig:
    """Everything that decides the network's shape, and the sizes its weights know."""

    nbase: tuple[int, ...] = (2, *PUBLISHED_WIDTHS)
    """Channels in, then the width of each level, fullest resolution first."""
    outputs: int = 3
    """Maps out: flow down, flow right, logit of being a cell's pixel; more for users' own classes."""
    diam_mean: float = 30.0
    """Pixels to which the typical diameter of an object was brought for training."""
    diam_labels: float = 30.0
    """Typical diameter in pixels in the images it was trained on, before that."""

    precision = "float32"

    @property
    def channels(self) -> int:
        return self.nbase[0]

    @property
    def tiling(self) -> Tiling:
        return Tiling(whole=WHOLE if max(self.nbase) <= NARROW else TILE)

    def build(self, rngs: nnx.Rngs) -> CPnet:
        return CPnet(self, rngs=rngs)

    @property
    def multiple(self) -> int:
        """Height and width of the input must be multiples of this."""
        return 2 ** (len(self.nbase) - 2)


class CPOutputs(NamedTuple):
    """What the network returns, in float32."""

    maps: Float[Array, "b h w outputs"]
    """Flow down and right, five times the unit vector, and the logit of a cell's pixel."""
    style: Float[Array, "b s"]
    """Mean of the deepest features over the image, of length 1."""


class NormConv(nnx.Module):
    """Normalisation, ReLU where `active`, convolution: in this order, for the sums between blocks stay linear."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, active: bool = True, rngs: nnx.Rngs
    ):
        self.norm = BatchNorm(inputs, momentum=MOMENTUM)
        self.conv = Conv(inputs, outputs, size, rngs=rngs)
        self.active = active

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h w o"]:
        x = self.norm(x, mode)
        return self.conv(jax.nn.relu(x) if self.active else x)


class Down(nnx.Module):
    """Two residual pairs of convolutions; the first pair's shortcut changes the width."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.proj = NormConv(inputs, outputs, 1, active=False, rngs=rngs)
        widths = (inputs, outputs, outputs, outputs)
        self.convs = nnx.List([NormConv(width, outputs, 3, rngs=rngs) for width in widths])

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h w o"]:
        x = self.proj(x, mode) + self.convs[1](self.convs[0](x, mode), mode)
        return x + self.convs[3](self.convs[2](x, mode), mode)


class Up(nnx.Module):
    """As `Down`, with the encoder's map of the same size added after the first convolution, and the style before
    each of the other three."""

    def __init__(self, inputs: int, outputs: int, style: int, *, rngs: nnx.Rngs):
        self.proj = NormConv(inputs, outputs, 1, active=False, rngs=rngs)
        widths = (inputs, outputs, outputs, outputs)
        self.convs = nnx.List([NormConv(width, outputs, 3, rngs=rngs) for width in widths])
        self.styles = nnx.List([Dense(style, outputs, rngs=rngs) for _ in range(3)])

    def __call__(
        self,
        x: Float[Array, "b h0 w0 i"],
        skipped: Float[Array, "b h w o"],
        style: Float[Array, "b s"],
        mode: Mode,
    ) -> Float[Array, "b h w o"]:
        """`x` is brought to the size of `skipped` by repeating its pixels."""
        double = x.shape[1] != skipped.shape[1]
        # What is done to single pixels is done before they are repeated: the same numbers for a quarter of the work.
        shortcut = self.proj(x, mode)
        if double:
            x, shortcut = _doubled(x), _doubled(shortcut)
        y = self.convs[0](x, mode) + skipped
        x = shortcut + self._styled(1, y, style, mode)
        return x + self._styled(3, self._styled(2, x, style, mode), style, mode)

    def _styled(self, number: int, x: Array, style: Array, mode: Mode) -> Array:
        told = self.styles[number - 1](style)[:, None, None]
        return self.convs[number](x + told.astype(x.dtype), mode)


class CPnet(nnx.Module):
    """The network; parameters are float32, activations of the mode's dtype, results float32."""

    def __init__(self, config: CPnetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.nbase
        self.down = nnx.List([Down(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)])
        # The deepest level is decoded at its own width, and every other one at the width it was encoded with.
        inner = (*widths[1:], widths[-1])
        self.up = nnx.List([Up(i, o, widths[-1], rngs=rngs) for o, i in itertools.pairwise(inner)])
        self.output = NormConv(widths[1], config.outputs, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode | None = None) -> CPOutputs:
        """Height and width are multiples of `config.multiple`.

        Raises:
            ValueError: they are not, or the channels are not the network's.
        """
        mode = Mode() if mode is None else mode
        multiple = self.config.multiple
        if x.shape[1] % multiple or x.shape[2] % multiple or x.shape[3] != self.config.channels:
            raise ValueError(
                f"input {x.shape}: wants multiples of {multiple}, and {self.config.channels} channels"
            )
        x = x.astype(mode.dtype)
        encoded: list[Array] = []
        for level, block in enumerate(self.down):
            encoded.append(block(max_pool(encoded[-1]) if level else x, mode))
        style = _style(encoded[-1])
        x = encoded[-1]
        for up, skipped in zip(reversed(self.up), reversed(encoded), strict=True):
            x = up(x, skipped, style, mode)
        return CPOutputs(self.output(x, mode).astype(jnp.float32), style)


def _style(x: Float[Array, "b h w s"]) -> Float[Array, "b s"]:
    mean = x.astype(jnp.float32).mean((1, 2))
    return mean / jnp.sqrt(jnp.square(mean).sum(-1, keepdims=True))


def _doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def create(config: CPnetConfig, seed: int = 0) -> CPnet:
    """A freshly initialised network.

    Raises:
        ValueError: a width is not positive, or there is no level.
    """
    if (
        len(config.nbase) < 2
        or min(*config.nbase, config.outputs) < 1
        or not math.isfinite(config.diam_mean)
    ):
        raise ValueError(f"{config}: wants at least one level, and positive widths")
    return CPnet(config, rngs=nnx.Rngs(seed))
