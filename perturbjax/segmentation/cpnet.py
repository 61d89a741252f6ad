"""Network of Cellpose 3: a residual U-Net whose decoder receives a style vector of the image.

Stringer et al. 2021 (doi:10.1038/s41592-020-01018-x). Sums, padding and the order of normalization
are those of the cellpose package, so that published weights give the same output. Images are NHWC.
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

#: Channels of each level of the published networks of Cellpose 1 to 3.
PUBLISHED_WIDTHS = (32, 64, 128, 256)
#: Networks of at most NARROW channels segment images up to WHOLE pixels in one tile; wider ones use
#: tiles, as in their training.
NARROW, WHOLE = 64, 1024
#: Output channels up to which XLA's CPU convolutions take 2 to 9 times as long as those of oneDNN,
#: which is used instead if it is installed.
NARROW_OUTPUTS = 16
#: Fraction of new statistics in the running ones, as in the cellpose package.
MOMENTUM = 0.05


@dataclass(frozen=True)
class CPnetConfig:
    """Shape of the network, and the diameters it was trained on."""

    nbase: tuple[int, ...] = (2, *PUBLISHED_WIDTHS)
    """Input channels, then the channels of each level, full resolution first."""
    outputs: int = 3
    """Output maps: flow down, flow right, cell logit; more for additional classes."""
    diam_mean: float = 30.0
    """Diameter in pixels to which objects are rescaled for the network."""
    diam_labels: float = 30.0
    """Typical diameter in pixels of the objects in the training images."""

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
        # Every level but the first halves height and width.
        return 2 ** (len(self.nbase) - 2)


class CPOutputs(NamedTuple):
    """Output of the network, in float32."""

    maps: Float[Array, "b h w outputs"]
    """Flow down and right (five times the unit vector), and the cell logit."""
    style: Float[Array, "b s"]
    """Mean of the deepest features over the image, normalized to length 1."""


class NormConv(nnx.Module):
    """Batch normalization, ReLU if `active`, convolution. In this order the sums between blocks
    stay linear."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, active: bool = True, rngs: nnx.Rngs
    ):
        self.norm = BatchNorm(inputs, momentum=MOMENTUM)
        use_onednn = outputs <= NARROW_OUTPUTS
        self.conv = Conv(inputs, outputs, size, use_onednn=use_onednn, rngs=rngs)
        self.active = active

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h w o"]:
        x = self.norm(x, mode)
        return self.conv(jax.nn.relu(x) if self.active else x)


class Down(nnx.Module):
    """Two residual pairs of convolutions; the first shortcut changes the number of channels."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.proj = NormConv(inputs, outputs, 1, active=False, rngs=rngs)
        widths = (inputs, outputs, outputs, outputs)
        self.convs = nnx.List([NormConv(width, outputs, 3, rngs=rngs) for width in widths])

    def __call__(self, x: Float[Array, "b h w i"], mode: Mode) -> Float[Array, "b h w o"]:
        x = self.proj(x, mode) + self.convs[1](self.convs[0](x, mode), mode)
        return x + self.convs[3](self.convs[2](x, mode), mode)


class Up(nnx.Module):
    """Like `Down`; the encoder's map of the same size is added after the first convolution, and the
    style before each of the other three."""

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
        """Decode one level; `x` is enlarged to the size of `skipped` by repeating pixels."""
        double = x.shape[1] != skipped.shape[1]
        # Pixelwise operations come before the repetition: the same result for a quarter of the
        # work.
        shortcut = self.proj(x, mode)
        if double:
            x, shortcut = _doubled(x), _doubled(shortcut)
        y = self.convs[0](x, mode) + skipped
        x = shortcut + self._styled(1, y, style, mode)
        return x + self._styled(3, self._styled(2, x, style, mode), style, mode)

    def _styled(self, number: int, x: Array, style: Array, mode: Mode) -> Array:
        # (b, 1, 1, o): the same offset at every pixel, because the style describes the whole image.
        offset = self.styles[number - 1](style)[:, None, None]
        return self.convs[number](x + offset.astype(x.dtype), mode)


class CPnet(nnx.Module):
    """The network; parameters are float32, activations of the mode's dtype, results float32."""

    def __init__(self, config: CPnetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.nbase
        self.down = nnx.List([Down(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)])
        # Each level is decoded with the channels it was encoded with.
        inner = (*widths[1:], widths[-1])
        self.up = nnx.List([Up(i, o, widths[-1], rngs=rngs) for o, i in itertools.pairwise(inner)])
        self.output = NormConv(widths[1], config.outputs, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode | None = None) -> CPOutputs:
        """Run the network.

        Raises:
            ValueError: height or width is not a multiple of `config.multiple`, or the number of
                channels is wrong.
        """
        mode = Mode() if mode is None else mode
        multiple = self.config.multiple
        if x.shape[1] % multiple or x.shape[2] % multiple or x.shape[3] != self.config.channels:
            raise ValueError(
                f"input {x.shape}: must have sizes that are multiples of {multiple}, and "
                f"{self.config.channels} channels"
            )
        x = x.astype(mode.dtype)
        # One map for each level, full resolution first; the decoder adds them in reverse order.
        encoded: list[Array] = []
        for level, block in enumerate(self.down):
            encoded.append(block(max_pool(encoded[-1]) if level else x, mode))
        style = _style(encoded[-1])
        x = encoded[-1]
        # The deepest level has no coarser input: its map is both the input and the skip connection.
        for up, skipped in zip(reversed(self.up), reversed(encoded), strict=True):
            x = up(x, skipped, style, mode)
        return CPOutputs(self.output(x, mode).astype(jnp.float32), style)


def _style(x: Float[Array, "b h w s"]) -> Float[Array, "b s"]:
    mean = x.astype(jnp.float32).mean((1, 2))
    # Length 1 makes the style independent of the scale of the features.
    return mean / jnp.sqrt(jnp.square(mean).sum(-1, keepdims=True))


def _doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    b, h, w, c = x.shape
    # A broadcast and a reshape repeat pixels without a lookup.
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def create(config: CPnetConfig, seed: int = 0) -> CPnet:
    """Return a network with random parameters.

    Raises:
        ValueError: a number of channels is not positive, or there is no level.
    """
    if (
        len(config.nbase) < 2
        or min(*config.nbase, config.outputs) < 1
        or not math.isfinite(config.diam_mean)
    ):
        raise ValueError(
            f"{config}: must have at least one level, and positive numbers of channels"
        )
    return CPnet(config, rngs=nnx.Rngs(seed))
