"""How long does the paper's whole recipe take on one GPU, and how near is its step to what the GPU can do?

    pip install -e . "jax[cuda13]==0.10.2" torch==2.13.0 && python -m experiments.bench --only gpu --out DIR

Made for ten minutes on a rented card: JAX and what is likely PyTorch's best come first, rows are written as they come,
no part takes longer than `LIMIT_S`, and none starts after `BUDGET_S`. Both libraries must see the card before anything
runs.

A simulated plate of 2,867 sites of 270² pixels (16 bit, one channel, noise with a square for a cell) lies on the GPU;
`attention` trains for 200 epochs of 18 steps of 128 crops of 128², augmentation and dropout included, metrics fetched
after every epoch and the 573 held-out sites judged after every tenth, as `perturbjax train` does. PyTorch runs the same
network, optimizer and schedule on the same GPU in the same session. It is given batches that are ready: no gathering,
no augmentation, no evaluation. Every measurement runs in a process of its own, since both libraries take the GPU's
memory for themselves. The step time is the median over epochs, compilation apart; `× PyTorch` is the ratio of step
times to PyTorch's best of that precision. `compile s` is what the first epoch takes longer than the median: JAX runs
once with an empty cache of compiled programs and once more with the one it has filled.

Floors. FLOPs are those of the convolutions (`convolutions`; all else is under 1 %): forward once, backward twice, but
once for the first layers, whose input needs no gradient. `of floor, by hand` counts the bytes that pass between kernels
when every convolution writes its output and one kernel then takes statistics and maxima from it (`VALUES_MOVED`); `of
floor, compiled` those of the step that XLA compiled here (`hlo.py`). A floor is the greater of FLOPs over the GPU's
peak and bytes over its bandwidth (NVIDIA's data sheets, dense; float32 products run on TF32, as both libraries do by
default in convolutions), and what is given is its share of the measured step.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.bench import hlo
from experiments.bench.tables import CannotRun, Row, _accelerators
from perturbjax.core.config import AugmentConfig, ModelConfig, OptimConfig, Recipe

PRECISIONS = ("bf16", "float32")
#: Part of a GPU's name → (peak TFLOP/s in bf16, in TF32, memory TB/s), dense. The first that fits.
PEAKS = {
    "H200": (989.0, 495.0, 4.8),
    "H100 NVL": (835.0, 418.0, 3.9),
    "H100 PCIe": (756.0, 378.0, 2.0),
    "H100": (989.0, 495.0, 3.35),
    "A100": (312.0, 156.0, 2.04),
}
#: How often the values of a convolution's output, of what pooling leaves of it (a quarter) and of its input are moved
#: in a step. Output: written; read for statistics and maxima; in the backward pass read for its gradient, which is
#: written and read for the kernel's gradient, and for the input's where that is wanted (not for the image itself).
#: Pooled: written and read to be normalised; in the backward pass read with its gradient for BatchNorm's two sums, and
#: the gradient past the activation is written and read. Input: read forward and for the kernel; its gradient written.
VALUES_MOVED = {"output": 5, "turned": 1, "pooled": 6, "input": 3}
#: Seconds that a part may take, and after which no other starts.
LIMIT_S, BUDGET_S = 150, 600


@dataclass(frozen=True)
class Size:
    """What is trained. The default is the paper's."""

    sites: int = 2867
    train: int = 2294
    stored: int = 270
    crop: int = 128
    batch: int = 128
    epochs: int = 200
    classes: int = 302
    evaluate_every: int = 10

    @property
    def steps(self) -> int:
        return -(-self.train // self.batch)

    def recipe(self, precision: str) -> Recipe:
        return Recipe(
            model=ModelConfig(precision=precision),
            augment=AugmentConfig(crop=self.crop),
            optim=OptimConfig(epochs=self.epochs, batch_size=self.batch),
        )


QUICK = Size(epochs=20)
SEES_A_CARD = {
    "jax": "import jax; assert jax.default_backend() == 'gpu', 'its backend is ' + jax.default_backend()",
    "torch": "import torch; torch.zeros(1, device='cuda')",
}


class Measured(NamedTuple):
    """A whole run: seconds altogether, to the end of the first epoch, and a step; the GPU's peak memory in bytes; the
    bytes that the compiled step moves, where that is known."""

    whole: float
    first: float
    step: float
    peak_bytes: int | None
    moved: float | None = None


@dataclass(frozen=True)
class TorchSetting:
    """One way of running PyTorch. `compiled` are the options of `torch.compile`, None for eager."""

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

#: What is measured, in this order: what matters most first, and JAX again, with its programs compiled.
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
    """One row a way of training, all there are so far after each. `quick` trains a tenth of the epochs.

    Raises:
        CannotRun: there is no NVIDIA GPU here, or a library does not see it.
    """
    gpus = _accelerators()
    if not gpus:
        raise CannotRun(
            "needs an NVIDIA GPU (H100 or H200); run `python -m experiments.bench --only gpu` on one"
        )
    for library in ("jax", "torch"):
        require_card(library)
    size, started, results = QUICK if quick else Size(), time.monotonic(), []
    with tempfile.TemporaryDirectory() as cache:
        for library, which in PARTS:
            spent = time.monotonic() - started
            result = (
                _apart(library, which, size, cache)
                if spent < BUDGET_S
                else f"not begun after {spent:.0f} s"
            )
            results.append((library, which, result))
            yield table(results, size, gpus[0])


def require_card(library: str) -> None:
    """Ask a library, in a process of its own, whether it sees a GPU.

    Raises:
        CannotRun: it does not.
    """
    code = SEES_A_CARD[library]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no GPU"])[-1][:200]
        raise CannotRun(
            f"{library} does not see the GPU ({said}); install as the docstring of gpu.py says"
        )


def table(results: list[tuple[str, Any, Measured | str]], size: Size, gpu: str) -> list[Row]:
    """Rows from what was measured: (library, precision or number of PyTorch's setting, result or why there is none)."""
    done = [result for result in results if isinstance(result[2], Measured)]
    best = {
        p: min(
            (m.step for lib, i, m in done if lib == "torch" and TORCH_SETTINGS[i].precision == p),
            default=None,
        )
        for p in PRECISIONS
    }
    rows, seen = [], set()
    for library, which, measured in results:
        setting = TorchSetting("perturbjax", which) if library == "jax" else TORCH_SETTINGS[which]
        again = (library, which) in seen
        seen.add((library, which))
        row: Row = {"library": library, "way": setting.name + ", compiled before" * again}
        row["precision"] = setting.precision
        if isinstance(measured, Measured):
            row |= _measured_row(measured, setting.precision, size, gpu)
            theirs = best[setting.precision]
            row["× PyTorch"] = None if theirs is None else theirs / measured.step
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
            f"of floor, {name}": None if least is None else least / measured.step
            for name, least in floors.items()
        },
    }


def convolutions(size: Size) -> list[tuple[int, int, int]]:
    """(side, inputs, outputs) of every 3×3 convolution of `attention` with a one-channel image: two branches of
    three, each followed by a pool that halves the side, and the attention's own."""
    branch = [(size.crop, 1, 32), (size.crop // 2, 32, 64), (size.crop // 4, 64, 128)]
    return [*branch, *branch, (size.crop // 8, 128, 128)]


def flops_per_image(size: Size) -> float:
    """Of a training step: multiplications and additions."""
    return sum(
        2 * 9 * inputs * outputs * side**2 * (2 if side == size.crop else 3)
        for side, inputs, outputs in convolutions(size)
    )


def bytes_per_image(size: Size, precision: str) -> float:
    """Of a training step, see `VALUES_MOVED`."""
    times, values = VALUES_MOVED, 0.0
    for side, inputs, outputs in convolutions(size):
        first = side == size.crop
        values += (
            side**2
            * outputs
            * (times["output"] + times["pooled"] / 4 + times["turned"] * (not first))
        )
        values += side**2 * inputs * (times["input"] - first)
    return (2 if precision == "bf16" else 4) * values


def roofline_seconds(gpu: str, precision: str, flops: float, moved: float) -> float | None:
    """The least time of a step on a known GPU."""
    peaks = next((peaks for part, peaks in PEAKS.items() if part in gpu), None)
    if peaks is None:
        return None
    bf16, tf32, bandwidth = peaks
    return max(flops / (1e12 * (bf16 if precision == "bf16" else tf32)), moved / (1e12 * bandwidth))


def _apart(library: str, which: Any, size: Size, cache: str) -> Measured | str:
    """Measure in a process of its own, for `LIMIT_S` at most; where that fails, the last line it said."""
    order = json.dumps(
        {"library": library, "which": which, "size": dataclasses.asdict(size), "cache": cache}
    )
    folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch", "TRITON_CACHE_DIR": f"{cache}/triton"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, order],
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
        return measure_torch(size, TORCH_SETTINGS[order["which"]], "cuda")
    import jax

    if jax.default_backend() != "gpu":
        raise CannotRun("JAX sees no GPU: install jax[cuda13]")
    from perturbjax.training.devices import use_compilation_cache

    use_compilation_cache(f"{order['cache']}/jax")
    return measure_jax(size, order["which"])


def simulated_plate(size: Size) -> Any:
    """`ResidentArrays` of noise, on the host."""
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
    """Train as `perturbjax train` does, without reading a dataset or writing checkpoints."""
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
    feed = ResidentBatches(simulated_plate(size), placement)
    network = models.create(
        "attention", classes=size.classes, channels=1, dropout=recipe.model.dropout, seed=0
    )
    graphdef, params, stats = split_model(network)
    optimizer = make_optimizer(recipe.optim, size.epochs * size.steps)
    state = placement.replicate(initial_state(params, stats, optimizer))
    step = make_train_step(graphdef, optimizer, recipe, steps_per_epoch=size.steps)
    run = placement.compile_training(step, feed)
    predict = placement.compile_predict(make_predict_step(graphdef, recipe))
    records = np.arange(size.sites, dtype=np.int32)
    order = BatchOrder.shuffled_epochs(recipe.seed, records[: size.train], size.batch, size.epochs)
    judged = BatchOrder.single_pass(records[size.train :], size.batch)

    def epoch(number: int) -> float:
        """Train one epoch, and judge where it is time to; the seconds of training."""
        nonlocal state
        started = time.perf_counter()
        sums = []
        for after, part in run(
            state, order.select_steps(number * size.steps, (number + 1) * size.steps)
        ):
            state = after
            sums.append(part)
        stack_steps(sums)
        took = time.perf_counter() - started
        if (number + 1) % size.evaluate_every == 0:
            jax.device_get(
                [predict(state.params, state.stats, batch)[0] for batch in feed.batches(judged)]
            )
        return took

    memory = jax.local_devices()[0].memory_stats
    measured = _time_run(epoch, size, lambda: (memory() or {}).get("peak_bytes_in_use"))
    batch = gather(feed.arrays, jnp.arange(size.batch) % size.sites, jnp.ones(size.batch))
    text = jax.jit(step).lower(state, batch).compile().as_text()
    return measured._replace(moved=hlo.costs(text)["all"].moved)


def measure_torch(size: Size, setting: TorchSetting, device: str) -> Measured:
    """Train the original's network, on batches that are ready on the device."""
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
