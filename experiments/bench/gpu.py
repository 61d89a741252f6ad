"""Time of the paper's recipe on one GPU, compared with PyTorch and with the limits of the GPU.

    pip install -e . "jax[cuda13]==0.10.2" torch==2.13.0
    python -m experiments.bench --only gpu --out DIR

Takes at most ten minutes: JAX and the most likely best setting of PyTorch run first, rows are
written one by one, each part is limited to `LIMIT_S`, and no part starts after `BUDGET_S`. Both
libraries must have access to the GPU before any part starts.

JAX: a simulated plate of 2,867 sites (270 pixels, 16 bit, one channel, noise with one square cell)
is stored on the GPU. `attention` is trained for 200 epochs of 18 steps with 128 crops of 128
pixels, with augmentation, dropout and metrics of every epoch. The 573 test sites are evaluated
every ten epochs, as in `perturbjax train`. PyTorch: the same network, optimizer and schedule, with
batches that are already on the GPU, without gathering, augmentation and evaluation.

Every measurement runs in a separate process, because both libraries reserve the GPU memory. `step
ms` is the median over epochs, without compilation; `x PyTorch` is the ratio to the best step time
of PyTorch at the same precision. `compile s` is the additional time of the first epoch. JAX runs
once with an empty compilation cache and once with a filled one.

Lower bounds (roofline): the maximum of FLOPs / peak and bytes / bandwidth, with data sheet values
for dense products. Float32 products use TF32, the default of both libraries in convolutions. FLOPs
are those of the convolutions (`roofline.convolutions`; the rest is below 1 %): forward once,
backward twice, but once in the first layers, which need no gradient of the input. `of floor, by
hand` counts bytes as if every convolution wrote its output and one kernel computed statistics and
maxima from it (`roofline.VALUES_MOVED`). `of floor, compiled` counts bytes of the compiled step
(`hlo.py`). Both are given as fraction of the measured step time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.bench import hlo
from experiments.bench.roofline import bytes_per_image, flops_per_image, roofline_seconds
from experiments.bench.sizes import Size
from experiments.bench.tables import CannotRun, Row, _accelerators

PRECISIONS = ("bf16", "float32")
#: Maximum seconds of a part, and seconds after which no part starts.
LIMIT_S, BUDGET_S = 150, 600
QUICK = Size(epochs=20)
#: Library -> code that fails if the library cannot use the GPU.
GPU_CHECKS = {
    "jax": "import jax; assert jax.default_backend() == 'gpu', jax.default_backend()",
    "torch": "import torch; torch.zeros(1, device='cuda')",
}


class Measured(NamedTuple):
    """Result of one training.

    Attributes:
        whole: seconds of the training.
        first: seconds of the first epoch.
        step: median seconds of a step.
        peak_bytes: peak memory of the GPU.
        moved: bytes moved by the compiled step, if available.
    """

    whole: float
    first: float
    step: float
    peak_bytes: int | None
    moved: float | None = None


@dataclass(frozen=True)
class TorchSetting:
    """One setting of PyTorch. `compiled`: options of `torch.compile`, `None` for eager mode."""

    name: str
    precision: str
    channels_last: bool = False
    compiled: dict[str, Any] | None = None


TORCH_SETTINGS = [
    setting
    for precision in PRECISIONS
    for setting in (
        TorchSetting(
            "compiled, channels_last, CUDA graphs", precision, True, {"mode": "reduce-overhead"}
        ),
        TorchSetting("eager, channels_last", precision, True),
        TorchSetting(
            "compiled, channels_last, autotuned, CUDA graphs",
            precision,
            True,
            {"mode": "max-autotune"},
        ),
        TorchSetting("eager", precision),
    )
]

#: Measurements, the most important first. The second run of JAX has a filled compilation cache.
PARTS = [
    ("jax", "bf16"),
    ("torch", 0),
    ("jax", "float32"),
    ("torch", 4),
    ("jax", "bf16"),
    ("torch", 1),
    ("torch", 2),
]
PARTS += [("torch", 5), ("torch", 6), ("torch", 3), ("torch", 7)]


def run(quick: bool) -> Iterator[list[Row]]:
    """Measure all parts; yield the rows so far.

    Args:
        quick: train a tenth of the epochs.

    Raises:
        CannotRun: there is no NVIDIA GPU, or a library cannot use it.
    """
    gpus = _accelerators()
    if not gpus:
        raise CannotRun(
            "needs an NVIDIA GPU; run `python -m experiments.bench --only gpu` on an H100 or H200"
        )
    for library in ("jax", "torch"):
        require_card(library)
    yield from measure(PARTS, QUICK if quick else Size(), gpus[0])


def measure(
    parts: Sequence[tuple[str, Any]], size: Size, processor: str, device: str = "cuda"
) -> Iterator[list[Row]]:
    """Measure parts in separate processes; yield the rows so far.

    Args:
        parts: library, and precision (JAX) or number of the setting (PyTorch).
        size: sizes of the training.
        processor: name of the GPU.
        device: "cuda", or "cpu" for a rehearsal without a GPU.
    """
    started, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as cache:
        for library, which in parts:
            spent = time.monotonic() - started
            order = {"library": library, "which": which, "cache": cache, "device": device}
            result = (
                _measure_in_process({**order, "size": dataclasses.asdict(size)})
                if spent < BUDGET_S
                else f"not started after {spent:.0f} s"
            )
            results.append((library, which, result))
            yield table(results, size, processor)


def require_card(library: str) -> None:
    """Check in a separate process that a library can use the GPU.

    Raises:
        CannotRun: it cannot.
    """
    code = GPU_CHECKS[library]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no GPU"])[-1][:200]
        raise CannotRun(
            f"{library} cannot use the GPU ({message}); install it as described in gpu.py"
        )


def table(results: list[tuple[str, Any, Measured | str]], size: Size, gpu: str) -> list[Row]:
    """Make the rows of the table.

    Args:
        results: library, precision (JAX) or number of the setting (PyTorch), and result or error.
        size: sizes of the training.
        gpu: name of the GPU.
    """
    done = [result for result in results if isinstance(result[2], Measured)]
    best = {
        p: min(
            (m.step for lib, i, m in done if lib == "torch" and TORCH_SETTINGS[i].precision == p),
            default=None,
        )
        for p in PRECISIONS
    }
    rows: list[Row] = []
    previous: set[tuple[str, Any]] = set()
    for library, which, measured in results:
        setting = TorchSetting("perturbjax", which) if library == "jax" else TORCH_SETTINGS[which]
        cached = (library, which) in previous
        previous.add((library, which))
        row: Row = {"library": library, "way": setting.name + ", compilation cached" * cached}
        row["precision"] = setting.precision
        if isinstance(measured, Measured):
            row |= _measured_row(measured, setting.precision, size, gpu)
            fastest = best[setting.precision]
            row["x PyTorch"] = None if fastest is None else fastest / measured.step
        else:
            row["way"] += f" (failed: {measured})"
        rows.append(row)
    return rows


def _measured_row(measured: Measured, precision: str, size: Size, gpu: str) -> Row:
    flops = size.batch * flops_per_image(size)
    floors = {
        name: None if moved is None else roofline_seconds(gpu, precision, flops, moved)
        for name, moved in (
            ("by hand", size.batch * bytes_per_image(size, precision)),
            ("compiled", measured.moved),
        )
    }
    return {
        "step ms": 1e3 * measured.step,
        "images/s": size.batch / measured.step,
        "compile s": max(measured.first - measured.step * size.steps, 0),
        "whole run s": measured.whole,
        "peak GiB": None if measured.peak_bytes is None else measured.peak_bytes / 2**30,
        "TFLOP/s": flops / measured.step / 1e12,
        "compiled GB": None if measured.moved is None else measured.moved / 1e9,
        **{
            f"of floor, {name}": None if floor is None else floor / measured.step
            for name, floor in floors.items()
        },
    }


def _measure_in_process(order: dict[str, Any]) -> Measured | str:
    """Measure in a separate process for at most `LIMIT_S`; on failure return its last message."""
    cache = order["cache"]
    folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch", "TRITON_CACHE_DIR": f"{cache}/triton"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(order)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=os.environ | folders,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {LIMIT_S} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _measure(order: dict[str, Any]) -> Measured:
    size = Size(**order["size"])
    if order["library"] == "torch":
        return measure_torch(size, TORCH_SETTINGS[order["which"]], order["device"])
    import jax

    if order["device"] == "cuda" and jax.default_backend() != "gpu":
        raise CannotRun("JAX has no GPU: install jax[cuda13]")
    from perturbjax.training.devices import use_compilation_cache

    use_compilation_cache(f"{order['cache']}/jax")
    return measure_jax(size, order["which"])


def simulated_plate(size: Size) -> Any:
    """Make `ResidentArrays` of noise on the host."""
    from perturbjax.data.batches import ResidentArrays

    random = np.random.default_rng(0)
    shape = (size.sites, size.stored, size.stored)
    mask = np.zeros(shape, np.uint8)
    mask[:, size.stored // 4 : -size.stored // 4, size.stored // 4 : -size.stored // 4] = 1
    scale = np.full((size.sites, 1), 1 / 65535, np.float32)
    image = random.integers(0, 65536, (*shape, 1), dtype=np.uint16)
    return ResidentArrays(
        image, mask, random.integers(0, size.classes, size.sites, np.int32), 0 * scale, scale
    )


def measure_jax(size: Size, precision: str) -> Measured:
    """Train like `perturbjax train`, without reading a dataset or writing checkpoints."""
    import jax
    import jax.numpy as jnp

    from perturbjax import models
    from perturbjax.data.batches import BatchOrder, ResidentBatches, gather
    from perturbjax.training.devices import choose_placement, stack_steps
    from perturbjax.training.optimizer import make_optimizer
    from perturbjax.training.step import (
        initial_state,
        make_predict_step,
        make_train_step,
        split_model,
    )

    recipe, placement = size.recipe(precision), choose_placement("1")
    batches = ResidentBatches(simulated_plate(size), placement)
    network = models.create(
        "attention", classes=size.classes, channels=1, dropout=recipe.model.dropout, seed=0
    )
    graphdef, params, stats = split_model(network)
    optimizer = make_optimizer(recipe.optim, size.epochs * size.steps)
    state = placement.replicate(initial_state(params, stats, optimizer))
    step = make_train_step(graphdef, optimizer, recipe, steps_per_epoch=size.steps)
    run = placement.compile_training(step, batches)
    predict = placement.compile_predict(make_predict_step(graphdef, recipe))
    records = np.arange(size.sites, dtype=np.int32)
    order = BatchOrder.shuffled_epochs(recipe.seed, records[: size.train], size.batch, size.epochs)
    test_order = BatchOrder.single_pass(records[size.train :], size.batch)

    def epoch(number: int) -> float:
        """Train one epoch and evaluate if it is due; return the seconds of training."""
        nonlocal state
        started = time.perf_counter()
        sums = []
        steps = order.select_steps(number * size.steps, (number + 1) * size.steps)
        for next_state, part in run(state, steps):
            state = next_state
            sums.append(part)
        stack_steps(sums)
        took = time.perf_counter() - started
        if (number + 1) % size.evaluate_every == 0:
            jax.device_get(
                [
                    predict(state.params, state.stats, batch)[0]
                    for batch in batches.batches(test_order)
                ]
            )
        return took

    memory = jax.local_devices()[0].memory_stats
    measured = _time_run(epoch, size, lambda: (memory() or {}).get("peak_bytes_in_use"))
    batch = gather(batches.arrays, jnp.arange(size.batch) % size.sites, jnp.ones(size.batch))
    text = jax.jit(step).lower(state, batch).compile().as_text()
    return measured._replace(moved=hlo.costs(text)["all"].moved)


def measure_torch(size: Size, setting: TorchSetting, device: str) -> Measured:
    """Train the original PyTorch network with one batch that is already on the device."""
    import torch

    from tests.reference.original import Classifier

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    network = Classifier(size.classes).to(device, memory_format=layout).train()
    recipe = size.recipe(setting.precision).optim
    forward = network if setting.compiled is None else torch.compile(network, **setting.compiled)
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=size.epochs * size.steps
    )
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    inputs = torch.rand(size.batch, 2, size.crop, size.crop, device=device).to(memory_format=layout)
    labels = torch.randint(size.classes, (size.batch,), device=device)

    def epoch(number: int) -> float:
        started = time.perf_counter()
        losses = []
        for step in range(size.steps):
            with torch.autocast(device, torch.bfloat16, enabled=setting.precision == "bf16"):
                loss = criterion(forward(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number * size.steps + step + 1 < size.epochs * size.steps:
                schedule.step()
            losses.append(loss.detach().clone())  # CUDA graphs overwrite their outputs
        torch.stack(losses).sum().item()
        return time.perf_counter() - started

    cuda = device == "cuda"
    return _time_run(epoch, size, lambda: torch.cuda.max_memory_allocated() if cuda else None)


def _time_run(
    epoch: Callable[[int], float], size: Size, peak_bytes: Callable[[], int | None]
) -> Measured:
    started = time.perf_counter()
    epochs = [epoch(0)]
    first = time.perf_counter() - started
    epochs += [epoch(number) for number in range(1, size.epochs)]
    whole = time.perf_counter() - started
    return Measured(whole, first, statistics.median(epochs[1:]) / size.steps, peak_bytes())


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))._asdict()))
