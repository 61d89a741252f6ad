"""Network of Cellpose 4 (cpsam): the image encoder of Segment Anything with small patches and a
pixelwise readout.

Pachitariu, Rariden and Stringer 2025 (doi:10.1101/2025.04.28.651001). The encoder is that of
Kirillov et al. 2023 (arXiv:2304.02643) with global attention in every block. Images are NHWC."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.models.layers import Conv, Dense, LayerNorm, Mode
from perturbjax.segmentation.cpnet import CPOutputs
from perturbjax.segmentation.tiles import Tiling

#: Layer of `CPSam` to its name in the published file: outside the blocks, within a block, and
#: parameters without layer.
_LAYERS = {
    "embed": "encoder.patch_embed.proj",
    "neck.narrow": "encoder.neck.0",
    "neck.norm1": "encoder.neck.1",
    "neck.mix": "encoder.neck.2",
    "neck.norm2": "encoder.neck.3",
    "out": "out",
}
_BLOCK = {
    "norm1": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "norm2": "norm2",
    "dense1": "mlp.lin1",
    "dense2": "mlp.lin2",
}
_BARE = {"positions": "encoder.pos_embed", "down": "attn.rel_pos_h", "across": "attn.rel_pos_w"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
#: Tensor that identifies this network, and limits of the shape that a file may declare.
MARK, WIDEST, DEEPEST, LARGEST_GRID = "encoder.pos_embed", 4096, 64, 128


@dataclass(frozen=True)
class SamConfig:
    """Shape of the network; the published one is ViT-L."""

    width: int = 1024
    """Channels of a token."""
    heads: int = 16
    """Attention heads of each block."""
    reach: tuple[int, ...] = tuple(127 if block % 6 == 5 else 27 for block in range(24))
    """Relative positions along an axis in the weights of each block; others are interpolated."""
    patch: int = 8
    """Height and width of a token in pixels."""
    grid: int = 32
    """Tokens along the height and width of a tile; fixed, because positions are learned."""
    neck: int = 256
    """Channels before the readout."""
    outputs: int = 3
    """Output maps: flow down, flow right, cell logit."""
    diam_mean: float = 30.0
    """Diameter in pixels to which objects are rescaled if a diameter is given."""
    diam_labels: float = 30.0
    """Without a diameter images are not rescaled: the network was trained on many sizes."""

    channels = 3
    precision = "bfloat16"

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.patch * self.grid, fixed=True)

    def build(self, rngs: nnx.Rngs) -> CPSam:
        return CPSam(self, rngs=rngs)


class Attention(nnx.Module):
    """Global self-attention with relative positions along each axis."""

    def __init__(self, width: int, heads: int, reach: int, *, rngs: nnx.Rngs):
        self.qkv, self.out = Dense(width, 3 * width, rngs=rngs), Dense(width, width, rngs=rngs)
        self.down, self.across = (nnx.Param(jnp.zeros((reach, width // heads))) for _ in range(2))
        self.heads = heads

    def __call__(self, x: Float[Array, "b rows columns d"]) -> Float[Array, "b rows columns d"]:
        b, rows, columns, d = x.shape
        qkv = self.qkv(x).reshape(b, rows * columns, 3, self.heads, d // self.heads)
        query, key, value = (qkv[:, :, part] for part in range(3))
        # Tokens are arranged in rows and columns again: relative positions are added along each
        # axis.
        queries = query.reshape(b, rows, columns, self.heads, -1)
        along = (
            jnp.einsum(
                "brcnd,rkd->bnrck", queries, _relative(self.down[...], rows).astype(x.dtype)
            )[..., :, None],
            jnp.einsum(
                "brcnd,ckd->bnrck", queries, _relative(self.across[...], columns).astype(x.dtype)
            )[..., None, :],
        )
        # (b, heads, queries, keys): sum of the bias for the row distance and for the column
        # distance.
        bias = (along[0] + along[1]).reshape(b, self.heads, rows * columns, rows * columns)
        attended = jax.nn.dot_product_attention(query, key, value, bias=bias)
        return self.out(attended.reshape(b, rows, columns, d))


def _relative(table: Float[Array, "reach d"], size: int) -> Float[Array, "size size d"]:
    """Return the entry for distance i - k of query i and key k, from a table interpolated to all
    distances."""
    # Distances between `size` tokens range from -(size - 1) to size - 1.
    stretched = jax.image.resize(table, (2 * size - 1, table.shape[1]), "linear", antialias=False)
    # Add size - 1, so that the smallest distance has index 0.
    return stretched[np.arange(size)[:, None] - np.arange(size) + size - 1]


class Block(nnx.Module):
    """Attention, then two dense layers, both with pre-normalization and residual connection."""

    def __init__(self, width: int, heads: int, reach: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, reach, rngs=rngs)
        self.dense1, self.dense2 = (
            Dense(width, 4 * width, rngs=rngs),
            Dense(4 * width, width, rngs=rngs),
        )

    def __call__(self, x: Float[Array, "b rows columns d"]) -> Float[Array, "b rows columns d"]:
        x = x + self.attention(self.norm1(x))
        return x + self.dense2(jax.nn.gelu(self.dense1(self.norm2(x)), approximate=False))


class Neck(nnx.Module):
    """Reduce the channels, and mix each token with its eight neighbors."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.narrow = Conv(inputs, width, 1, use_bias=False, rngs=rngs)
        self.mix = Conv(width, width, 3, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)

    def __call__(self, x: Float[Array, "b rows columns d"]) -> Float[Array, "b rows columns w"]:
        return self.norm2(self.mix(self.norm1(self.narrow(x))))


class CPSam(nnx.Module):
    """The network; parameters and results are float32, activations have the mode's dtype."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        self.config, width = config, config.width
        self.embed = Conv(
            config.channels, width, config.patch, stride=config.patch, padding=0, rngs=rngs
        )
        self.positions = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1, config.grid, config.grid, width))
        )
        self.blocks = nnx.List(
            [Block(width, config.heads, reach, rngs=rngs) for reach in config.reach]
        )
        self.neck = Neck(width, config.neck, rngs=rngs)
        self.out = Conv(config.neck, config.outputs * config.patch**2, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], mode: Mode | None = None) -> CPOutputs:
        """Run the network on tiles of the configured size; the style is empty.

        Raises:
            ValueError: height, width or number of channels is wrong.
        """
        mode = Mode() if mode is None else mode
        config, side = self.config, self.config.tiling.side
        if x.shape[1:] != (side, side, config.channels):
            raise ValueError(
                f"input {x.shape}: must have {side} x {side} pixels and {config.channels} channels"
            )
        # (b, grid, grid, width).
        tokens = self.embed(x.astype(mode.dtype)) + self.positions[...].astype(mode.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        values = self.out(self.neck(tokens)).astype(jnp.float32)
        # Each token contains the maps of its patch x patch pixels.
        pixels = values.reshape(
            -1, config.grid, config.grid, config.outputs, config.patch, config.patch
        )
        # From (row, column, map, y, x) to (row, y, column, x, map): pixels in the order of the
        # image.
        maps = pixels.transpose(0, 1, 4, 2, 5, 3).reshape(-1, side, side, config.outputs)
        return CPOutputs(maps, jnp.zeros((len(x), 0)))


def tensor_name(path: tuple[Any, ...]) -> str:
    """Return the name in Cellpose's files of the tensor at a path of `CPSam`."""
    if path[0] == "blocks":
        within, leaf = ".".join(map(str, path[2:-1])), path[-1]
        name = _BARE[leaf] if leaf in _BARE else f"{_BLOCK[within]}.{_LEAVES[leaf]}"
        return f"encoder.blocks.{path[1]}.{name}"
    if path[-1] in _BARE:
        return _BARE[path[-1]]
    return f"{_LAYERS['.'.join(map(str, path[:-1]))]}.{_LEAVES[path[-1]]}"


def config_of(tensors: Mapping[str, np.ndarray]) -> SamConfig:
    """Return the shape of the network, derived from the tensors.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    # Number of different block indices in the names of the tensors.
    depth = len(
        {match[1] for name in tensors if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))}
    )
    shapes = {}
    for name, dimensions in (
        ("encoder.patch_embed.proj.weight", 4),
        (MARK, 4),
        ("encoder.neck.0.weight", 4),
    ):
        shapes[name] = np.shape(tensors.get(name, 0))
        if len(shapes[name]) != dimensions:
            raise ValueError(f"tensor {name} is missing or of shape {shapes[name]}")
    # PyTorch's layout of the kernel: (out, in, height, width).
    width, channels, patch, _ = shapes["encoder.patch_embed.proj.weight"]
    reaches = [
        np.shape(tensors.get(f"encoder.blocks.{block}.attn.rel_pos_h", 0)) for block in range(depth)
    ]
    if not depth or any(len(shape) != 2 for shape in reaches):
        raise ValueError("its blocks have no relative positions")
    # Positions are (1, grid, grid, width), relative positions (reach, width / heads).
    grid, head = shapes[MARK][1], reaches[0][1]
    # The readout has one value per map and pixel of a patch.
    maps, remainder = divmod(np.size(tensors.get("out.bias", [])), patch**2)
    # Limits against files that would request excessive memory.
    sound = (
        max(width, shapes["encoder.neck.0.weight"][0]) <= WIDEST
        and depth <= DEEPEST
        and grid <= LARGEST_GRID
    )
    if (
        channels != SamConfig.channels
        or remainder
        or maps < 3
        or not head
        or width % head
        or not sound
    ):
        raise ValueError(
            f"width {width}, {channels} input channels and {maps} output maps are not those of "
            "cpsam"
        )
    _require_plain_readout(tensors, maps * patch**2)
    reach = tuple(int(shape[0]) for shape in reaches)
    neck = int(shapes["encoder.neck.0.weight"][0])
    return SamConfig(int(width), int(width // head), reach, int(patch), int(grid), neck, int(maps))


def _require_plain_readout(tensors: Mapping[str, np.ndarray], values: int) -> None:
    """Check that the values of a token are its pixels in order; the file contains this layout as a
    tensor."""
    layout = tensors.get("W2")
    if layout is not None and not np.array_equal(np.reshape(layout, (values, -1)), np.eye(values)):
        raise ValueError(
            "tensor W2 is not the identity, so the pixels of a token are in another order"
        )
