"""What does it cost to spread a step over devices? Step time, efficiency and what devices tell each other, by count.

    python -m experiments.bench --only devices --out DIR

`attention`, streamed as sharded and pmapped steps of one global batch over 1, 2, 4 and 8 devices, interleaved. On
CPUs the devices are emulated and share the same cores, so efficiency (time on one device over time on n) shows the
overhead of spreading alone, less what one device's program leaves of the cores unused: with 2 cores it went up to 1.4
on 8 devices. On accelerators efficiency is time on one over n times the time on n, so 1 is
perfect. The volume is that of all-reduce operations in the compiled program: bytes of their results, a device and step.
It is to be seen beside the bytes of all parameters, whose gradients must be told in any case; the rest is BatchNorm.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.gpu import Size, simulated_plate
from experiments.bench.tables import CannotRun, Row

#: Small enough for one CPU: what is compared are counts of devices, not machines.
SIZE = Size(sites=64, train=64, stored=64, crop=64, batch=64, epochs=10, classes=10)
QUICK = Size(sites=16, train=16, stored=16, crop=16, batch=16, epochs=10, classes=3)
ON_ACCELERATORS = Size(sites=512, train=512, stored=128, batch=512, epochs=10)
EMULATED = 8
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


def run(quick: bool) -> list[Row]:
    """One row a way of spreading and count of devices.

    Raises:
        CannotRun: JAX has started with one device already.
    """
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", EMULATED)
    except RuntimeError as error:
        raise CannotRun(
            "needs a process of its own: run `python -m experiments.bench --only devices`"
        ) from error
    devices = jax.devices()
    emulated = devices[0].platform == "cpu"
    size = (QUICK if quick else SIZE) if emulated else ON_ACCELERATORS
    counts = [n for n in ((1, 2) if quick else (1, 2, 4, 8)) if n <= len(devices)]
    if len(counts) == 1:
        raise CannotRun("needs two devices or more, and there is one")
    steps = {
        (kind, n): _Step(kind, n, size)
        for kind in ("sharded", "pmap")
        for n in counts
        if (kind, n) != ("pmap", 1)
    }
    for _ in range(2 if quick else 5):
        for step in steps.values():
            step.time_once()
    alone = statistics.median(steps["sharded", 1].seconds)
    return [step.row(alone, ideal=1 if emulated else n) for (_, n), step in steps.items()]


class _Step:
    """One compiled step, and its times."""

    def __init__(self, kind: str, count: int, size: Size):
        import jax

        from perturbjax import models
        from perturbjax.data.batches import gather
        from perturbjax.training.devices import choose_placement
        from perturbjax.training.optimizer import make_optimizer
        from perturbjax.training.step import initial_state, make_train_step, split_model

        self.kind, self.count, self.size, self.seconds = kind, count, size, []
        recipe, placement = size.recipe("float32"), choose_placement(kind, count)
        network = models.create(
            "attention", classes=size.classes, channels=1, dropout=recipe.model.dropout, seed=0
        )
        graphdef, params, stats = split_model(network)
        optimizer = make_optimizer(recipe.optim, 100)
        step = make_train_step(
            graphdef, optimizer, recipe, steps_per_epoch=1, axis_name=placement.axis_name
        )
        self.parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self.state = placement.replicate(initial_state(params, stats, optimizer))
        rows = gather(
            simulated_plate(size),
            np.arange(size.batch, dtype=np.int32),
            np.ones(size.batch, np.float32),
        )
        self.batch = placement.place_rows(rows)
        before = _programs()
        self.step: Callable[..., Any] = placement.compile_step(step)
        self.time_once()
        self.seconds.clear()  # it compiled
        self.hlo = max(_programs() - before, key=len)

    def time_once(self) -> None:
        import jax

        started = time.perf_counter()
        self.state, sums = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, sums))
        self.seconds.append(time.perf_counter() - started)

    def row(self, alone: float, ideal: int) -> Row:
        median, (volume, operations) = statistics.median(self.seconds), all_reduced(self.hlo)
        return {
            "way": self.kind,
            "devices": self.count,
            "batch": self.size.batch,
            "crop": self.size.crop,
            "step ms": 1e3 * median,
            "spread ms": 1e3 * (max(self.seconds) - min(self.seconds)),
            "efficiency": alone / (ideal * median),
            "all-reduced KiB": volume / 2**10,
            "all-reduces": operations,
            "parameters KiB": self.parameter_bytes / 2**10,
        }


def _programs() -> set[str]:
    """The text of every compiled program of this process."""
    import jax

    return {
        m.to_string()
        for program in jax.devices()[0].client.live_executables()
        for m in program.hlo_modules()
    }


def all_reduced(hlo: str) -> tuple[int, int]:
    """Bytes of all all-reduces' results in a program's text, and how many there are."""
    results = re.findall(r" = (\S.*?) all-reduce(?:-start)?\(", hlo)
    values = [shape for result in results for shape in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return sum(BYTES[dtype] * _product(dimensions) for dtype, dimensions in values), len(results)


def _product(dimensions: str) -> int:
    product = 1
    for n in filter(None, dimensions.split(",")):
        product *= int(n)
    return product
