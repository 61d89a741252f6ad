"""Processor time of convolutions by XLA and by oneDNN on CPUs.

    python -m experiments.bench --only convolutions --out runs/bench [--quick]

Layers of the attention network (batches of 32): forward, gradient of the input, gradient of the
kernel. Layers of the included segmentation network with few channels (one tile of 528 x 688
pixels): forward, and the whole network. Frozen EfficientNet-Lite0: features of all stages. Both
libraries alternate in one process. Times are medians of the processor time of all threads;
`GFLOP/s` counts multiplications and additions. Needs the extra `onednn`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from experiments.bench.tables import CannotRun, Row
from perturbjax.models import BACKBONES, Mode
from perturbjax.models.kernels import onednn
from perturbjax.models.kernels.convolution import conv2d
from perturbjax.segmentation import Segmenter

ROUNDS = 7
#: (batch, height, width, input channels, output channels) of 3 x 3 convolutions.
TRAINING = (
    (32, 128, 128, 1, 32),
    (32, 64, 64, 32, 64),
    (32, 32, 32, 64, 128),
    (32, 16, 16, 128, 128),
)
SEGMENTATION = ((1, 528, 688, 1, 8), (1, 528, 688, 8, 8), (1, 264, 344, 16, 16))
#: Batch, height and width.
TILE = (1, 528, 688)
FROZEN = ((30, 48, 48), (96, 80, 80), (32, 128, 128))
PRECISIONS = ("float32", "bfloat16")

Shape = tuple[int, int, int, int, int]
Function = Callable[..., Array]


def run(quick: bool) -> Iterator[list[Row]]:
    """Measure every layer; yield the rows so far.

    Raises:
        CannotRun: oneDNN is not installed.
    """
    if not onednn.is_usable():
        raise CannotRun("oneDNN is not installed: pip install 'perturbjax[onednn]'")
    rounds, rows = (1 if quick else ROUNDS), []
    for precision in PRECISIONS:
        for shape in TRAINING[-1:] if quick else TRAINING:
            for name, function in _operations().items():
                x, kernel, gradient = _arrays(shape, precision)
                arrays = (x, kernel, gradient) if name != "forward" else (x, kernel)
                rows.append(_row(name, shape, precision, _measure(function, arrays, rounds)))
            yield rows
    for shape in SEGMENTATION:
        x, kernel, _ = _arrays(shape, "float32")
        times = _measure(_convolve, (x, kernel), rounds)
        rows.append(_row("forward, segmentation", shape, "float32", times))
        yield rows
    networks = {"segmentation network": (_segmentation_network(), TILE)}
    for place in FROZEN[:1] if quick else FROZEN:
        networks[f"EfficientNet-Lite0, {place[0]} images"] = (_frozen_network(place), place)
    for name, ((function, arrays), place) in networks.items():
        times = _measure(function, arrays, rounds)
        rows.append(_row(name, (*place, 0, 0), "float32", times))
        yield rows


def _convolve(x: Array, kernel: Array) -> Array:
    return conv2d(x, kernel, padding=1, use_onednn=True)


def _operations() -> dict[str, Function]:
    def gradients(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(_convolve, x, kernel)[1](gradient)

    return {
        "forward": _convolve,
        "input gradient": lambda *arrays: gradients(*arrays)[0],
        "kernel gradient": lambda *arrays: gradients(*arrays)[1],
    }


def _segmentation_network() -> tuple[Function, tuple[nnx.State, Array]]:
    config = Segmenter("nuclei_small").config
    # The values of the parameters do not affect the time.
    graph, state = nnx.split(config.build(nnx.Rngs(0)))

    def network(state: nnx.State, x: Array) -> Array:
        return nnx.merge(graph, state)(x, Mode()).maps

    return network, (state, jnp.zeros((*TILE, config.channels)))


def _frozen_network(place: tuple[int, int, int]) -> tuple[Function, tuple[nnx.State, Array]]:
    network = BACKBONES["efficientnet_lite0"].network(classes=0, inputs=3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(network)

    def maps(state: nnx.State, x: Array) -> list[Array]:
        return nnx.merge(graph, state, copy=True).stage_maps(x, Mode(use_onednn=True))

    return maps, (state, jnp.zeros((*place, 3)))


def _arrays(shape: Shape, precision: str) -> tuple[Array, Array, Array]:
    batch, height, width, inputs, outputs = shape
    random = np.random.default_rng(0)
    sizes = (
        (batch, height, width, inputs),
        (3, 3, inputs, outputs),
        (batch, height, width, outputs),
    )
    x, kernel, gradient = (jnp.asarray(random.normal(size=size), precision) for size in sizes)
    return x, kernel, gradient


def _measure(function: Function, arrays: tuple, rounds: int) -> tuple[float, float]:
    """Return the median seconds of XLA and of oneDNN."""
    programs = []
    for patch in (mock.patch.object(onednn, "library", lambda: None), nullcontext()):
        # A new function, so that JAX does not reuse the program of the other library.
        with patch:
            programs.append(jax.jit(lambda *args: function(*args)).lower(*arrays).compile())
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for times, program in zip(seconds, programs, strict=True):
            start = time.process_time()
            jax.block_until_ready(program(*arrays))
            if turn:  # the first turn creates the primitives
                times.append(time.process_time() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _row(operation: str, shape: Shape, precision: str, times: tuple[float, float]) -> Row:
    batch, height, width, inputs, outputs = shape
    flops = 2 * 9 * batch * height * width * inputs * outputs
    rates = [round(flops / each / 1e9) if flops else None for each in times]
    return {
        "operation": operation,
        "channels": f"{inputs} to {outputs}" if inputs else "",
        "pixels": f"{height} x {width}",
        "precision": precision,
        "XLA ms": 1000 * times[0],
        "oneDNN ms": 1000 * times[1],
        "ratio": times[0] / times[1],
        "XLA GFLOP/s": rates[0],
        "oneDNN GFLOP/s": rates[1],
    }
