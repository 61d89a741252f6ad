"""The GPU benchmark at a small size on CPU, so that it is tested without a GPU."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.bench import gpu, roofline
from experiments.bench.aot import BASELINES
from experiments.bench.gpu import Measured, TorchSetting
from experiments.bench.sizes import Size
from experiments.bench.tables import CannotRun
from perturbjax import models
from perturbjax.core.files import read_json
from perturbjax.models.kernels import onednn

TINY = Size(sites=10, train=7, stored=16, crop=16, batch=4, epochs=3, classes=3, evaluate_every=2)
PAPER = Size()


def assert_timed(measured: Measured) -> None:
    assert measured.whole > measured.first > 0 and measured.step > 0
    assert measured.step * TINY.steps < measured.whole


def test_size_defaults_to_the_paper():
    assert PAPER.epochs * PAPER.steps == 3600 and PAPER.recipe("bf16").optim.learning_rate == 0.005
    assert TINY.steps == 2


@pytest.mark.slow
def test_measure_jax_trains_and_evaluates():
    measured = gpu.measure_jax(TINY, "float32")
    assert_timed(measured)
    assert measured.moved > 4 * 3**2 * 128**2  # at least the parameters


@pytest.mark.parametrize(
    "setting",
    [
        TorchSetting("eager", "float32"),
        TorchSetting(
            "compiled, channels_last", "bf16", channels_last=True, compiled={"backend": "eager"}
        ),
    ],
)
def test_measure_torch_trains(setting):
    measured = gpu.measure_torch(TINY, setting, "cpu")
    assert_timed(measured)
    assert measured.peak_bytes is None


def test_convolutions_match_the_network():
    network = models.create("attention", classes=3, channels=1, dropout=0.0, seed=0)
    kernels = [
        leaf.shape for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)) if leaf.ndim == 4
    ]
    expected = sorted(
        (3, 3, inputs, outputs) for _, inputs, outputs in roofline.convolutions(PAPER)
    )
    assert sorted(shape for shape in kernels if shape[0] == 3) == expected


def test_flops_match_the_count_of_xla(monkeypatch):
    """The compiler also counts other operations, so the tolerance is 5 %."""
    # The compiler does not know the operations of oneDNN.
    monkeypatch.setattr(onednn, "library", lambda: None)
    size = dataclasses.replace(TINY, crop=64)
    network = models.create("attention", classes=3, channels=1, dropout=0.0, seed=0)
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def loss(params, x):
        return nnx.merge(graphdef, params, stats, copy=True)(x, models.Mode()).logits.sum()

    x = np.zeros((1, 64, 64, 2), np.float32)
    counted = jax.jit(jax.grad(loss)).lower(params, x).cost_analysis()["flops"]
    assert roofline.flops_per_image(size) == pytest.approx(counted, rel=0.05)


def test_bytes_match_one_convolution_by_hand():
    """8 x 8 pixels, 2 to 3 channels: output 6 times, maxima 6 times, input 3 times."""
    one = type("One", (Size,), {})()
    original, roofline.convolutions = roofline.convolutions, lambda size: [(8, 2, 3)]
    try:
        assert roofline.bytes_per_image(one, "bf16") == 2 * (64 * 6 * 3 + 16 * 6 * 3 + 64 * 3 * 2)
        assert roofline.bytes_per_image(one, "float32") == 2 * roofline.bytes_per_image(one, "bf16")
        roofline.convolutions = lambda size: [(size.crop, 2, 3)]  # no gradient of the image
        assert roofline.bytes_per_image(one, "bf16") == 2 * 128**2 * (5 * 3 + 6 * 3 / 4 + 2 * 2)
    finally:
        roofline.convolutions = original


def test_bytes_by_hand_are_85_to_100_percent_of_the_compiled_program():
    compiled = read_json(BASELINES)["h100 x1 step bf16"]["GB"]
    assert 0.85 * compiled < PAPER.batch * roofline.bytes_per_image(PAPER, "bf16") / 1e9 < compiled


def test_roofline_is_the_maximum_of_arithmetic_and_memory():
    assert roofline.roofline_seconds(
        "NVIDIA H100 80GB HBM3", "bf16", 989e12, 3.35e12 / 2
    ) == pytest.approx(1)
    assert roofline.roofline_seconds(
        "NVIDIA H100 80GB HBM3", "float32", 495e12 / 4, 3.35e12
    ) == pytest.approx(1)
    assert roofline.roofline_seconds("NVIDIA H200", "bf16", 0, 4.8e12) == pytest.approx(1)
    assert roofline.roofline_seconds("unknown GPU", "bf16", 1, 1) is None


def test_table_compares_with_the_best_of_pytorch_and_lists_failures():
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
    jax_bf16, _, torch_best, failed, jax_float32, cached = gpu.table(results, PAPER, "NVIDIA H200")
    assert jax_bf16["x PyTorch"] == 2.5 and torch_best["x PyTorch"] == 1
    assert (
        jax_bf16["images/s"] == 64_000 and jax_bf16["peak GiB"] == 2 and jax_bf16["compile s"] == 5
    )
    assert (
        0 < jax_bf16["of floor, by hand"] < jax_bf16["of floor, compiled"] == 4e9 / 4.8e12 / 0.002
    )
    assert cached["way"] == "perturbjax, compilation cached"
    assert "out of memory" in failed["way"] and "step ms" not in failed
    assert jax_float32["x PyTorch"] is None


@pytest.mark.slow  # five processes; two of them compile
def test_measure_runs_every_library_in_its_process_on_cpu():
    """The run on a rented GPU, at a small size: JAX twice, PyTorch compiled and eager."""
    parts = [("jax", "bf16"), ("torch", 0), ("torch", 1), ("jax", "bf16"), ("jax", "float32")]
    *_, rows = gpu.measure(parts, TINY, "this CPU", device="cpu")
    assert [row["way"] for row in rows] == [
        "perturbjax",
        "compiled, channels_last, CUDA graphs",
        "eager, channels_last",
        "perturbjax, compilation cached",
        "perturbjax",
    ]  # a failed part has its message here
    assert all(row["images/s"] > 0 and row["whole run s"] > 0 for row in rows)
    assert rows[3]["compile s"] < rows[0]["compile s"]


@pytest.mark.skipif(bool(gpu._accelerators()), reason="this machine has a GPU")
def test_run_reports_a_missing_gpu(tmp_path):
    with pytest.raises(CannotRun, match="needs an NVIDIA GPU"):
        next(gpu.run(quick=True))
    order = {"library": "jax", "which": "bf16", "cache": str(tmp_path), "device": "cuda"}
    message = gpu._measure_in_process({**order, "size": dataclasses.asdict(TINY)})
    assert "JAX has no GPU" in message


def test_run_names_a_library_without_gpu_before_measuring(monkeypatch):
    monkeypatch.setattr(gpu, "_accelerators", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(gpu, "_measure_in_process", lambda *order: pytest.fail("ran"))
    monkeypatch.setitem(gpu.GPU_CHECKS, "jax", "pass")
    monkeypatch.setitem(gpu.GPU_CHECKS, "torch", "raise RuntimeError('no driver')")
    with pytest.raises(CannotRun, match=r"torch cannot use the GPU \(RuntimeError: no driver\)"):
        next(gpu.run(quick=True))


def test_run_yields_rows_one_by_one_including_timeouts(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_accelerators", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(gpu, "GPU_CHECKS", {"jax": "pass", "torch": "pass"})
    monkeypatch.setattr(gpu, "LIMIT_S", 0.01)
    tables = list(gpu.run(quick=True))
    assert [len(rows) for rows in tables] == list(range(1, len(gpu.PARTS) + 1))
    assert "took longer than 0.01 s" in tables[0][0]["way"] and tables[1][1]["library"] == "torch"
    monkeypatch.setattr(gpu, "BUDGET_S", -1)
    assert "not started after 0 s" in next(gpu.run(quick=True))[0]["way"]


def test_parts_cover_all_settings_with_the_most_important_first():
    assert (
        gpu.PARTS[:2] == [("jax", "bf16"), ("torch", 0)]
        and "CUDA graphs" in gpu.TORCH_SETTINGS[0].name
    )
    assert sorted(which for library, which in gpu.PARTS if library == "torch") == list(
        range(len(gpu.TORCH_SETTINGS))
    )
