"""Speed of a step of the attention network on CPU, compared with PyTorch.

    python -m experiments.bench --only step --out runs/bench [--quick]

Training steps (forward, backward, Adam) and evaluation steps with batches of 128 sites (mask and
one channel) of 128 and 64 pixels. The same network runs in PyTorch (float32, bfloat16 autocast,
both memory layouts), in JAX with plain layers (`reduce_window`, gradients of XLA), in perturbjax,
and with oneDNN if it is installed. All variants alternate in one process. `images/s`
is the median; `x PyTorch` is the median over rounds of the ratio to the fastest variant of PyTorch
at the same precision. `CPU ms` is the CPU time per image of all threads, which other jobs hardly
affect.

Profile of the training step in float32 without oneDNN (`perturbjax train --profile`, two cores):
convolutions, forward and for the gradient of the input, 37 %; weight gradients and their copies
37 %; elementwise operations and sums the rest. These alternatives were not faster: weight gradients
of XLA; matrix products over nine shifted views, stacked gradients or a transposed input; float32
products as three bfloat16 products; convolutions with 32 to 64 channels as bfloat16 products;
im2col; scans over groups of images; window pooling with the index of the maximum; XLA flags
(oneDNN, fast math, concurrent scheduler).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch.nn import functional

from experiments.bench.tables import CannotRun
from perturbjax import models
from perturbjax.core.memory import keep_freed_memory
from perturbjax.models.kernels import onednn
from perturbjax.models.layers import leaky_relu

BATCH, CLASSES, RATE, DECAY = 128, 13, 1e-3, 1e-4
#: Warm-up rounds, in which memory is allocated.
WARM = 3
Way = tuple[Callable[[], object], Callable[[], object], float | None]


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure every crop size and variant."""
    keep_freed_memory()
    if jax.default_backend() != "cpu":
        raise CannotRun(
            "JAX uses an accelerator, but this benchmark compares CPUs: set JAX_PLATFORMS=cpu"
        )
    sides, batch, rounds = ((64,), 32, 3) if quick else ((128, 64), BATCH, 7)
    return [row for side in sides for row in _measure(side, batch, rounds)]


def _measure(side: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    ways: dict[tuple[str, str], Way] = {
        ("PyTorch", "float32"): _torch_way(side, batch, half=False, last=False),
        ("PyTorch, channels last", "float32"): _torch_way(side, batch, half=False, last=True),
        ("JAX, plain layers", "float32"): _jax_way(side, batch, jnp.float32, plain=True),
        ("perturbjax", "float32"): _jax_way(side, batch, jnp.float32),
        ("PyTorch", "bf16"): _torch_way(side, batch, half=True, last=False),
        ("PyTorch, channels last", "bf16"): _torch_way(side, batch, half=True, last=True),
        ("perturbjax", "bf16"): _jax_way(side, batch, jnp.bfloat16),
    }
    if onednn.is_usable():
        for precision, dtype in (("float32", jnp.float32), ("bf16", jnp.bfloat16)):
            ways["perturbjax, oneDNN", precision] = _jax_way(side, batch, dtype, with_onednn=True)
    seconds, cpu = ({(kind, way): [] for kind in (0, 1) for way in ways} for _ in range(2))
    for round_, (way, kind) in itertools.product(
        range(WARM + rounds), itertools.product(ways, (0, 1))
    ):
        start, used = time.perf_counter(), time.process_time()
        ways[way][kind]()
        if round_ >= WARM:
            seconds[kind, way].append(time.perf_counter() - start)
            cpu[kind, way].append(time.process_time() - used)
    return [_row(side, batch, way, ways, seconds, cpu) for way in ways]


def _row(
    side: int, batch: int, way: tuple[str, str], ways: dict, seconds: dict, cpu: dict
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pixels": side,
        "way": way[0],
        "precision": way[1],
        "compile s": ways[way][2],
    }
    rivals = [rival for rival in ways if rival[0].startswith("PyTorch") and rival[1] == way[1]]
    for kind, name in enumerate(("train", "evaluate")):
        best = min((seconds[kind, rival] for rival in rivals), key=statistics.median)
        ratios = [rival / own for rival, own in zip(best, seconds[kind, way], strict=True)]
        row[f"{name} images/s"] = batch / statistics.median(seconds[kind, way])
        row[f"{name} x PyTorch"] = statistics.median(ratios)
        row[f"{name} spread"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
        row[f"{name} CPU ms"] = statistics.median(cpu[kind, way]) / batch * 1e3
    return row


def _images(side: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.random((batch, side, side, 2), np.float32)
    x[..., 0] = x[..., 0] > 0.5
    return x, rng.integers(0, CLASSES, batch)


def _jax_way(
    side: int, batch: int, dtype: Any, *, plain: bool = False, with_onednn: bool = False
) -> Way:
    model = models.create("attention", classes=CLASSES, channels=1, dropout=0.3, seed=0)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.adam(RATE))
    x, labels = map(jnp.asarray, _images(side, batch))
    keys = jax.random.split(jax.random.key(0), batch)

    def forward(params: Any, stats: Any, mode: models.Mode) -> tuple[Any, Any]:
        network = nnx.merge(graphdef, params, stats, copy=True)
        logits = _plain_logits(network, x, mode) if plain else network(x, mode).logits
        return logits, nnx.state(network, nnx.BatchStat)

    def loss(params: Any, stats: Any) -> tuple[Any, Any]:
        logits, stats = forward(params, stats, models.Mode(train=True, keys=keys, dtype=dtype))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

    def train(params: Any, stats: Any, moments: Any) -> tuple[Any, Any, Any]:
        (_, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, stats)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), stats, moments

    state = (params, stats, optimizer.init(params))
    start = time.perf_counter()
    with nullcontext() if with_onednn else mock.patch.object(onednn, "library", lambda: None):
        train_step = jax.jit(train, donate_argnums=(0, 1, 2)).lower(*state).compile()
    took = time.perf_counter() - start
    evaluation = jax.jit(lambda params, stats: forward(params, stats, models.Mode(dtype=dtype))[0])
    # Training donates its buffers, so evaluation needs copies.
    copies = jax.tree.map(jnp.copy, (params, stats))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(train_step(*state))

    return step, lambda: jax.block_until_ready(evaluation(*copies)), took


def _plain_logits(network: Any, x: jax.Array, mode: models.Mode) -> jax.Array:
    """Compute the logits with plain layers, without dropout and running statistics."""

    def conv(layer: Any, x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, layer.kernel[...], (1, 1), "SAME", dimension_numbers=dims
        )
        return y + layer.bias[...]

    def norm(layer: Any, x: jax.Array) -> jax.Array:
        mean, var = (
            (x.mean((0, 1, 2)), x.var((0, 1, 2)))
            if mode.train
            else (layer.mean[...], layer.var[...])
        )
        return (x - mean) * jax.lax.rsqrt(var + layer.epsilon) * layer.scale[...] + layer.bias[...]

    def branch(blocks: Any, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = leaky_relu(norm(block.norm, conv(block.conv, x)))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x

    mask, image = branch(network.mask_blocks, x[..., :1]), branch(network.image_blocks, x[..., 1:])
    attention = network.attention
    hidden = leaky_relu(norm(attention.norm, conv(attention.conv, mask)))
    image = image * jax.nn.sigmoid(conv(attention.project, hidden))
    features = jnp.concatenate([image.mean((1, 2)), mask.mean((1, 2))], axis=-1)
    return network.head(leaky_relu(network.hidden(features)))


class _Attention(torch.nn.Module):
    """The same network in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.image = self._branch(), self._branch()
        self.attention = torch.nn.Sequential(
            *self._conv_block(128, 128), torch.nn.Conv2d(128, 1, 1), torch.nn.Sigmoid()
        )
        self.head = torch.nn.Sequential(
            torch.nn.Linear(256, 128),
            torch.nn.LeakyReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(128, CLASSES),
        )

    def _conv_block(self, inputs: int, outputs: int) -> list[torch.nn.Module]:
        conv = torch.nn.Conv2d(inputs, outputs, 3, padding=1)
        return [conv, torch.nn.BatchNorm2d(outputs), torch.nn.LeakyReLU()]

    def _branch(self) -> torch.nn.Sequential:
        pairs = itertools.pairwise((1, 32, 64, 128))
        return torch.nn.Sequential(
            *[m for i, o in pairs for m in (*self._conv_block(i, o), torch.nn.MaxPool2d(2))]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask, image = self.mask(x[:, :1]), self.image(x[:, 1:])
        image = image * self.attention(mask)
        return self.head(torch.cat([image.mean((2, 3)), mask.mean((2, 3))], dim=1))


def _torch_way(side: int, batch: int, *, half: bool, last: bool) -> Way:
    layout = torch.channels_last if last else torch.contiguous_format
    network = _Attention().to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, weight_decay=DECAY)
    images, labels = map(torch.tensor, _images(side, batch))
    x = images.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def logits() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(x)

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        functional.cross_entropy(logits().float(), labels).backward()
        optimizer.step()

    def evaluate() -> None:
        network.eval()
        with torch.inference_mode():
            logits()

    return step, evaluate, None
