"""Speed of feature extraction with ResNet-50 and EfficientNet-B0, compared with PyTorch.

    python -m experiments.bench --only features --out runs/bench [--quick]

Forward pass to the pooled features: 224 x 224 pixels, batches of 32, random weights, float32 and
bfloat16. PyTorch runs the ResNet of transformers and efficientnet_pytorch with `inference_mode`, in
both memory layouts, bfloat16 by autocast. All variants alternate in one process. The table has
medians of images per second, and their ratio to the fastest variant of PyTorch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench.tables import CannotRun
from perturbjax.models import BACKBONES, Mode

SIZE, BATCH = 224, 32
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure every network, precision and variant.

    Returns:
        Rows with `images_per_s` (median), `spread` (maximum minus minimum) and `of_pytorch` (ratio
        to the fastest variant of PyTorch at the same precision).
    """
    batch, rounds = (4, 2) if quick else (BATCH, 5)
    return [
        row
        for backbone in ("resnet50", "efficientnet_b0")
        for precision in PRECISIONS
        for row in _measure(backbone, precision, batch, rounds)
    ]


def _measure(backbone: str, precision: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    x = np.random.default_rng(0).normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
    ways = {"perturbjax": _ours(backbone, precision, x), **_pytorch(backbone, precision, x)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, forward in ways.items():
            start = time.perf_counter()
            forward()
            rates[way].append(batch / (time.perf_counter() - start))
    # The first round compiles.
    medians = {way: statistics.median(values[1:]) for way, values in rates.items()}
    base = max(rate for way, rate in medians.items() if way != "perturbjax")
    return [
        {
            "network": backbone,
            "precision": precision,
            "batch": batch,
            "way": way,
            "images_per_s": medians[way],
            "spread": max(rates[way][1:]) - min(rates[way][1:]),
            "of_pytorch": medians[way] / base,
        }
        for way in ways
    ]


def _ours(backbone: str, precision: str, x: np.ndarray) -> Callable[[], object]:
    model = BACKBONES[backbone].network(classes=1000, inputs=3, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def forward(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats, copy=True)(
            x, Mode(dtype=PRECISIONS[precision])
        ).features

    return lambda: forward(params, stats, x).block_until_ready()


def _pytorch(backbone: str, precision: str, x: np.ndarray) -> dict[str, Callable[[], object]]:
    try:
        import torch
        from efficientnet_pytorch import EfficientNet
        from transformers import ResNetConfig, ResNetModel
    except ImportError as error:
        raise CannotRun(
            "PyTorch networks are not installed; run `pip install 'perturbjax[test]'`"
        ) from error
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"

    def way(layout: torch.memory_format) -> Callable[[], object]:
        if backbone == "resnet50":
            network = ResNetModel(ResNetConfig()).eval()
        else:
            network = EfficientNet.from_name("efficientnet-b0", include_top=False).eval()
        network = network.to(device, memory_format=layout)

        def forward() -> object:
            images = torch.from_numpy(x.transpose(0, 3, 1, 2)).to(device, memory_format=layout)
            low = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
            with torch.inference_mode(), low:
                features = network(images)
            return getattr(features, "pooler_output", features).float().cpu()

        return forward

    return {
        "PyTorch": way(torch.contiguous_format),
        "PyTorch, channels_last": way(torch.channels_last),
    }
