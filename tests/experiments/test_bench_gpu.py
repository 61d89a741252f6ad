"""The GPU's benchmark is run at a small size here, so that it is known to run where there is a GPU."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.bench import gpu
from experiments.bench.aot import BASELINES
from experiments.bench.gpu import Measured, Size, TorchSetting
from experiments.bench.tables import CannotRun
from perturbjax import models
from perturbjax.core.files import read_json

TINY = Size(sites=10, train=7, stored=16, crop=16, batch=4, epochs=3, classes=3, evaluate_every=2)
PAPER = Size()


def assert_timed(measured: Measured) -> None:
    assert measured.whole > measured.first > 0 and measured.step > 0
    assert measured.step * TINY.steps < measured.whole


def test_the_recipe_is_the_papers():
    assert PAPER.epochs * PAPER.steps == 3600 and PAPER.recipe("bf16").optim.learning_rate == 0.005
    assert TINY.steps == 2


@pytest.mark.slow
def test_jax_trains_and_judges():
    measured = gpu.measure_jax(TINY, "float32")
    assert_timed(measured)
    assert measured.moved > 4 * 3**2 * 128**2  # the parameters at least


@pytest.mark.parametrize(
    "setting",
    [
        TorchSetting("eager", "float32"),
        TorchSetting(
            "compiled, channels_last", "bf16", channels_last=True, compiled={"backend": "eager"}
        ),
    ],
)
def test_pytorch_trains(setting):
    measured = gpu.measure_torch(TINY, setting, "cpu")
    assert_timed(measured)
    assert measured.peak_bytes is None


def test_convolutions_are_those_of_the_network():
    network = models.create("attention", classes=3, channels=1, dropout=0.0, seed=0)
    kernels = [
        leaf.shape for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)) if leaf.ndim == 4
    ]
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
    """One of 8 × 8 pixels, 2 → 3 channels: 6 passes over the output, 6 over its maxima and 3 over the input."""
    one = type("One", (Size,), {})()
    original, gpu.convolutions = gpu.convolutions, lambda size: [(8, 2, 3)]
    try:
        assert gpu.bytes_per_image(one, "bf16") == 2 * (64 * 6 * 3 + 16 * 6 * 3 + 64 * 3 * 2)
        assert gpu.bytes_per_image(one, "float32") == 2 * gpu.bytes_per_image(one, "bf16")
        gpu.convolutions = lambda size: [(size.crop, 2, 3)]  # no gradient of the image is wanted
        assert gpu.bytes_per_image(one, "bf16") == 2 * 128**2 * (5 * 3 + 6 * 3 / 4 + 2 * 2)
    finally:
        gpu.convolutions = original


def test_the_bytes_by_hand_are_a_little_less_than_what_xla_compiles_for_the_h100():
    compiled = read_json(BASELINES)["h100 x1 step bf16"]["GB"]
    assert 0.85 * compiled < PAPER.batch * gpu.bytes_per_image(PAPER, "bf16") / 1e9 < compiled


def test_the_roofline_is_the_greater_of_arithmetic_and_memory():
    assert gpu.roofline_seconds(
        "NVIDIA H100 80GB HBM3", "bf16", 989e12, 3.35e12 / 2
    ) == pytest.approx(1)
    assert gpu.roofline_seconds(
        "NVIDIA H100 80GB HBM3", "float32", 495e12 / 4, 3.35e12
    ) == pytest.approx(1)
    assert gpu.roofline_seconds("NVIDIA H200", "bf16", 0, 4.8e12) == pytest.approx(1)
    assert gpu.roofline_seconds("a GPU nobody knows", "bf16", 1, 1) is None


def test_rows_compare_each_precision_with_pytorchs_best_and_keep_what_failed():
    last = len(gpu.TORCH_SETTINGS) - 1
    assert (
        gpu.TORCH_SETTINGS[0].precision == "bf16"
        and gpu.TORCH_SETTINGS[last].precision == "float32"
    )
    results = [
        ("jax", "bf16", Measured(10.0, 5.036, 0.002, 2**31, 4e9)),
        ("torch", 0, Measured(40.0, 9.0, 0.01, 2**30)),
        ("torch", 1, Measured(20.0, 9.0, 0.005, 2**30)),
        ("torch", last, "out of memory"),
        ("jax", "float32", Measured(12.0, 5.0, 0.003, None)),
        ("jax", "bf16", Measured(6.0, 1.0, 0.002, 2**31, 4e9)),
    ]
    jax_bf16, _, torch_best, failed, jax_float32, again = gpu.table(results, PAPER, "NVIDIA H200")
    assert jax_bf16["× PyTorch"] == 2.5 and torch_best["× PyTorch"] == 1
    assert (
        jax_bf16["images/s"] == 64_000 and jax_bf16["peak GiB"] == 2 and jax_bf16["compile s"] == 5
    )
    assert (
        0 < jax_bf16["of floor, by hand"] < jax_bf16["of floor, compiled"] == 4e9 / 4.8e12 / 0.002
    )
    assert again["way"] == "perturbjax, compiled before"
    assert "out of memory" in failed["way"] and "step ms" not in failed
    assert jax_float32["× PyTorch"] is None


@pytest.mark.skipif(bool(gpu._accelerators()), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(tmp_path):
    with pytest.raises(CannotRun, match="needs an NVIDIA GPU"):
        next(gpu.run(quick=True))
    assert "JAX sees no GPU" in gpu._apart("jax", "bf16", TINY, str(tmp_path))


def test_a_library_that_does_not_see_the_card_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(gpu, "_accelerators", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(gpu, "_apart", lambda *order: pytest.fail("something ran"))
    monkeypatch.setitem(gpu.SEES_A_CARD, "jax", "pass")
    monkeypatch.setitem(gpu.SEES_A_CARD, "torch", "raise RuntimeError('no driver')")
    with pytest.raises(CannotRun, match=r"torch does not see the GPU \(RuntimeError: no driver\)"):
        next(gpu.run(quick=True))


def test_rows_come_one_by_one_and_a_part_that_takes_too_long_is_one_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_accelerators", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(gpu, "SEES_A_CARD", {"jax": "pass", "torch": "pass"})
    monkeypatch.setattr(gpu, "LIMIT_S", 0.01)
    tables = list(gpu.run(quick=True))
    assert [len(rows) for rows in tables] == list(range(1, len(gpu.PARTS) + 1))
    assert "took longer than 0.01 s" in tables[0][0]["way"] and tables[1][1]["library"] == "torch"
    monkeypatch.setattr(gpu, "BUDGET_S", -1)
    assert "not begun after 0 s" in next(gpu.run(quick=True))[0]["way"]


def test_every_part_is_measured_and_what_matters_comes_first():
    assert (
        gpu.PARTS[:2] == [("jax", "bf16"), ("torch", 0)]
        and "CUDA graphs" in gpu.TORCH_SETTINGS[0].name
    )
    assert sorted(which for library, which in gpu.PARTS if library == "torch") == list(
        range(len(gpu.TORCH_SETTINGS))
    )
