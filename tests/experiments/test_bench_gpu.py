"""The GPU's benchmark is run at a small size here, so that it is known to run where there is a GPU."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.bench import gpu
from experiments.bench.gpu import Measured, Size, TorchSetting
from experiments.bench.tables import CannotRun
from perturbjax import models

TINY = Size(sites=10, train=7, stored=16, crop=16, batch=4, epochs=3, classes=3, evaluate_every=2)
PAPER = Size()


def assert_timed(measured: Measured) -> None:
    assert measured.whole > measured.first > 0 and measured.step > 0
    assert measured.step * TINY.steps < measured.whole


def test_the_recipe_is_the_papers():
    assert PAPER.epochs * PAPER.steps == 3600 and PAPER.recipe("bf16").optim.learning_rate == 0.005
    assert TINY.steps == 2


def test_jax_trains_and_judges():
    assert_timed(gpu.measure_jax(TINY, "float32"))


@pytest.mark.parametrize(
    "setting",
    [
        TorchSetting("eager", "float32"),
        TorchSetting("compiled, channels_last", "bf16", channels_last=True, compiled={"backend": "eager"}),
    ],
)
def test_pytorch_trains(setting):
    measured = gpu.measure_torch(TINY, setting, "cpu")
    assert_timed(measured)
    assert measured.peak_bytes is None


def test_convolutions_are_those_of_the_network():
    network = models.create("attention", classes=3, channels=1, dropout=0.0, seed=0)
    kernels = [leaf.shape for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)) if leaf.ndim == 4]
    mine = sorted((3, 3, inputs, outputs) for _, inputs, outputs in gpu.convolutions(PAPER))
    assert sorted(shape for shape in kernels if shape[0] == 3) == mine


def test_flops_are_those_that_xla_counts():
    """The compiler's count of forward and backward passes, its few other operations included, within 5 %."""
    size = dataclasses.replace(TINY, crop=64)
    network = models.create("attention", classes=3, channels=1, dropout=0.0, seed=0)
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def loss(params, x):
        return nnx.merge(graphdef, params, stats, copy=True)(x, models.Mode()).logits.sum()

    x = np.zeros((1, 64, 64, 2), np.float32)
    counted = jax.jit(jax.grad(loss)).lower(params, x).cost_analysis()["flops"]
    assert gpu.flops_per_image(size) == pytest.approx(counted, rel=0.05)


def test_bytes_of_one_convolution_by_hand():
    """One of 8 × 8 pixels, 2 → 3 channels: 7 passes over the output and 3 over the input, two bytes a value."""
    one = type("One", (Size,), {})()
    original, gpu.convolutions = gpu.convolutions, lambda size: [(8, 2, 3)]
    try:
        assert gpu.bytes_per_image(one, "bf16") == 2 * 64 * (7 * 3 + 3 * 2)
        assert gpu.bytes_per_image(one, "float32") == 4 * 64 * (7 * 3 + 3 * 2)
    finally:
        gpu.convolutions = original


def test_the_roofline_is_the_greater_of_arithmetic_and_memory():
    assert gpu.roofline_seconds("NVIDIA H100 80GB HBM3", "bf16", 989e12, 3.35e12 / 2) == pytest.approx(1)
    assert gpu.roofline_seconds("NVIDIA H100 80GB HBM3", "float32", 495e12 / 4, 3.35e12) == pytest.approx(1)
    assert gpu.roofline_seconds("NVIDIA H200", "bf16", 0, 4.8e12) == pytest.approx(1)
    assert gpu.roofline_seconds("a GPU nobody knows", "bf16", 1, 1) is None


def test_rows_compare_each_precision_with_pytorchs_best_and_keep_what_failed():
    last = len(gpu.TORCH_SETTINGS) - 1
    assert gpu.TORCH_SETTINGS[0].precision == "bf16" and gpu.TORCH_SETTINGS[last].precision == "float32"
    results = [
        ("jax", "bf16", Measured(10.0, 5.0, 0.002, 2**31)),
        ("torch", 0, Measured(40.0, 9.0, 0.01, 2**30)),
        ("torch", 1, Measured(20.0, 9.0, 0.005, 2**30)),
        ("torch", last, "out of memory"),
        ("jax", "float32", Measured(12.0, 5.0, 0.003, None)),
    ]
    jax_bf16, _, torch_best, failed, jax_float32 = gpu.table(results, PAPER, "NVIDIA H200")
    assert jax_bf16["× PyTorch's best run"] == 2 and torch_best["× PyTorch's best run"] == 1
    assert jax_bf16["images/s"] == 64_000 and jax_bf16["peak GiB"] == 2
    assert 0 < jax_bf16["of roofline"] < 1
    assert "out of memory" in failed["way"] and "step ms" not in failed
    assert jax_float32["× PyTorch's best run"] is None


@pytest.mark.skipif(bool(gpu._accelerators()), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(CannotRun, match="needs an NVIDIA GPU"):
        gpu.run(quick=True)
    assert "JAX sees no GPU" in gpu._apart("jax", "bf16", TINY)
