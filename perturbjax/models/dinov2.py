"""DINOv2 vision transformers (Oquab et al. 2023, arXiv:2304.07193), also with registers.

Registers are additional tokens without a patch (Darcet et al. 2023, arXiv:2309.16588). The image
is divided into patches of 14 pixels; an incomplete patch at the right or bottom is dropped.
Position embeddings were trained on one grid of patches. They are interpolated to other grids as
in the transformers library: bicubically, and with antialiasing for networks with registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from perturbjax.models.backbone import Backbone, Naming, Path, Tensors
from perturbjax.models.layers import Conv, Dense, LayerNorm, Mode, Outputs, classify

PATCH = 14
#: Height and width in pixels of the images in the last training steps; 37 patches.
PUBLISHED_SIZE = 518
REGISTERS = 4
#: Number of maps that `stage_maps` returns.
STAGES = 4


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.query, self.key, self.value, self.out = (
            Dense(width, width, rngs=rngs) for _ in range(4)
        )
        self.heads = heads

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        # (b, n, heads, width / heads) each.
        query, key, value = (
            f(x).reshape(b, n, self.heads, -1) for f in (self.query, self.key, self.value)
        )
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(b, n, d))


class Block(nnx.Module):
    """Attention, then two dense layers; each normalized before, scaled, and added to its input."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, rngs=rngs)
        self.dense1, self.dense2 = (
            Dense(width, 4 * width, rngs=rngs),
            Dense(4 * width, width, rngs=rngs),
        )
        # LayerScale (Touvron et al. 2021, arXiv:2103.17239): a learned factor for each channel.
        self.scale1, self.scale2 = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.attention(self.norm1(x)) * self.scale1[...].astype(x.dtype)
        # The exact GELU, PyTorch's default.
        hidden = jax.nn.gelu(self.dense1(self.norm2(x)), approximate=False)
        return x + self.dense2(hidden) * self.scale2[...].astype(x.dtype)


class DinoV2(nnx.Module):
    """Vision transformer on (B, H, W, inputs), with height and width of at least 14 pixels.

    `features` are the (B, width) class token after the last normalization, before dropout.

    Args:
        width: size of a token.
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        registers: number of register tokens, 0 or 4.
        classes: width of the logits.
        channels: image channels. With the mask, the network takes 1 + channels.
        inputs: input channels if not 1 + channels (3 for published weights).
        dropout: dropout rate of the features before the last layer.
        image_size: height and width in pixels of the grid of position embeddings.
        rngs: random streams for the parameters.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        registers: int = 0,
        classes: int,
        channels: int = 1,
        inputs: int | None = None,
        dropout: float = 0.0,
        image_size: int = PUBLISHED_SIZE,
        rngs: nnx.Rngs,
    ):
        def tokens(count: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, count, width)))

        inputs = 1 + channels if inputs is None else inputs
        self.stem = Conv(inputs, width, PATCH, stride=PATCH, padding=0, rngs=rngs)
        self.class_token, self.positions = tokens(1), tokens(1 + (image_size // PATCH) ** 2)
        self.registers = tokens(registers) if registers else None
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = LayerNorm(width)
        self.head = Dense(width, classes, rngs=rngs)
        self.feature_size, self.dropout = width, dropout
        self.stage_widths = (width,) * min(STAGES, depth)

    def tokens(
        self, x: Float[Array, "b h w inputs"], mode: Mode
    ) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
        """Return all tokens after the last normalization, and the grid of patches.

        The order is: class token, registers, patches row by row.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        *_, last = self.block_outputs(x, mode)
        return self.norm(last), self.grid(x)

    def block_outputs(
        self, x: Float[Array, "b h w inputs"], mode: Mode
    ) -> Iterator[Float[Array, "b n d"]]:
        """Yield the tokens after each block, before the last normalization.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        height, width = x.shape[1:3]
        if min(height, width) < PATCH:
            raise ValueError(f"dinov2 needs at least {PATCH}×{PATCH} pixels, not {height}×{width}")
        patches = self.stem(x.astype(mode.dtype))
        b, rows, columns, d = patches.shape
        # Position 0 belongs to the class token. Registers have no position.
        positions = self.positions[...].astype(jnp.float32)
        patch_positions = interpolate(
            positions[0, 1:], (rows, columns), antialias=self.registers is not None
        )
        patches = patches.reshape(b, -1, d) + patch_positions.astype(mode.dtype)
        first = [self.class_token[...] + positions[:, :1]]
        first += [] if self.registers is None else [self.registers[...]]
        repeated = [
            jnp.broadcast_to(token.astype(mode.dtype), (b, *token.shape[1:])) for token in first
        ]
        tokens = jnp.concatenate([*repeated, patches], axis=1)
        for block in self.blocks:
            tokens = block(tokens)
            yield tokens

    def grid(self, x: Float[Array, "b h w inputs"]) -> tuple[int, int]:
        """Return the rows and columns of the patch grid."""
        return x.shape[1] // PATCH, x.shape[2] // PATCH

    def stage_maps(
        self, x: Float[Array, "b h w inputs"], mode: Mode
    ) -> list[Float[Array, "b h2 w2 d"]]:
        """Return the patch tokens after each quarter of the blocks, with the last normalization."""
        outputs, stages = list(self.block_outputs(x, mode)), len(self.stage_widths)
        # Index of the last block of each quarter.
        ends = [len(outputs) * (stage + 1) // stages - 1 for stage in range(stages)]
        return [self._as_map(self.norm(outputs[end]), self.grid(x)) for end in ends]

    def feature_map(self, x: Float[Array, "b h w inputs"], mode: Mode) -> Float[Array, "b h2 w2 d"]:
        """Return the patch tokens as a map of 1/14 of height and width, rounded down."""
        return self._as_map(*self.tokens(x, mode))

    def _as_map(
        self, tokens: Float[Array, "b n d"], grid: tuple[int, int]
    ) -> Float[Array, "b h2 w2 d"]:
        # The patches are the last tokens.
        return tokens[:, -grid[0] * grid[1] :].reshape(len(tokens), *grid, -1)

    def __call__(self, x: Float[Array, "b h w inputs"], mode: Mode) -> Outputs:
        # Token 0 is the class token.
        features = self.tokens(x, mode)[0][:, 0].astype(jnp.float32)
        return classify(self.head, features, self.dropout, mode)


def interpolate(
    positions: Float[Array, "n d"], grid: tuple[int, int], *, antialias: bool
) -> Float[Array, "m d"]:
    """Interpolate the position embeddings of a square grid of n patches to another grid."""
    side = math.isqrt(len(positions))
    square = positions.reshape(side, side, -1)
    rows, columns = (cubic_weights(side, length, antialias=antialias) for length in grid)
    # Bicubic interpolation is separable: one matrix for the rows and one for the columns.
    resized = jnp.einsum("ri,cj,ijd->rcd", rows, columns, square, precision="highest")
    return resized.reshape(grid[0] * grid[1], -1)


def cubic_weights(
    before: int, after: int, *, antialias: bool
) -> Float32[np.ndarray, "after before"]:
    """Compute PyTorch's matrix of bicubic resampling along one axis.

    Without antialiasing: Keys' kernel with a = -0.75, and repeated borders. With antialiasing:
    a = -0.5, a kernel as wide as an output pixel, and weights beyond the border left out.
    """
    scale = before / after
    # Pixel centers are at half-integers (`align_corners=False` in PyTorch).
    centers = (np.arange(after) + 0.5) * scale - 0.5
    if antialias:
        weights = _keys((np.arange(before) - centers[:, None]) / max(scale, 1.0), -0.5)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    weights = np.zeros((after, before))
    for step in range(-1, 3):
        pixel = np.floor(centers).astype(int) + step
        columns = np.clip(pixel, 0, before - 1)
        # At a border several taps refer to the same pixel, so weights are added.
        np.add.at(weights, (np.arange(after), columns), _keys(centers - pixel, -0.75))
    return weights.astype(np.float32)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution kernel (Keys 1981, doi 10.1109/TASSP.1981.1163711); 0 from distance 2."""
    x = np.abs(distance)
    # Horner forms of (a + 2)|x|³ - (a + 3)|x|² + 1 and a|x|³ - 5a|x|² + 8a|x| - 4a.
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


_TRANSFORMERS: dict[str, str] = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "dense1": "mlp.fc1",
    "dense2": "mlp.fc2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "registers": "embeddings.register_tokens",
    "stem": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}


def _transformers(path: Path) -> str:
    """Names in the published files; transformers 5 renames some when it reads them."""
    *layer, last = path
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(last)
    # Class token, positions, registers and scales are parameters without a layer.
    name: str = last if leaf is None else layer[-1]
    within = f"encoder.layer.{path[1]}." if path[0] == "blocks" else ""
    return within + ".".join([_TRANSFORMERS.get(name, name), *([] if leaf is None else [leaf])])


def _arguments(naming: Naming, tensors: Tensors, source: str) -> dict[str, Any]:
    """Infer the arguments. Published classifiers use more than the class token: no logits here."""
    stem, positions = (tensors[naming.tensor(path)] for path in (naming.stem, ("positions",)))
    # The first position belongs to the class token; the rest form a square.
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    return {
        "inputs": stem.shape[1] if stem.ndim == 4 else 0,
        "classes": 0,
        "image_size": PATCH * side,
    }


def _backbone(name: str, width: int, depth: int, heads: int, registers: int = 0) -> Backbone:
    family = "dinov2_with_registers" if registers else "dinov2"
    naming = Naming(
        "dinov2",
        "transformers",
        _transformers,
        stem=("stem", "kernel"),
        prefix=f"{family}.",
        unused=("embeddings.mask_token", "classifier.weight", "classifier.bias"),
    )
    return Backbone(
        partial(DinoV2, width=width, depth=depth, heads=heads, registers=registers),
        namings=(naming,),
        arguments=_arguments,
        argument_names=("inputs", "classes", "image_size"),
        patch=PATCH,
        stages="blocks",
        stage_count=depth,
        stem=("stem", "class_token", "positions", "registers"),
        source=f"hf:facebook/{family.replace('_', '-')}-{name}",
        license="Apache-2.0",
    )


SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
DINOV2 = {
    f"dinov2_{name}{'_registers' if registers else ''}": _backbone(name, *size, registers)
    for registers in (0, REGISTERS)
    for name, size in SIZES.items()
}
