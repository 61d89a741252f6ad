"""Step time, efficiency and communication of data-parallel training, by number of devices.

    python -m experiments.bench --only devices --out DIR

Steps of `attention` (sharded jit and pmap) with one global batch over 1, 2, 4 and 8 devices
alternate. On CPUs the devices are emulated and share the same cores. Efficiency is then the time on
one device divided by the time on n devices; it can exceed 1, because the program of one device does
not use all cores. On accelerators efficiency is the time on one device divided by n times the time
on n devices. `all-reduced KiB` are the results of all-reduce operations per device and step:
gradients of all parameters (compare `parameters KiB`) and statistics of BatchNorm.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.gpu import simulated_plate
from experiments.bench.hlo import BITS
from experiments.bench.sizes import Size
from experiments.bench.tables import CannotRun, Row

#: Small enough for one CPU, because the benchmark compares numbers of devices, not machines.
SIZE = Size(sites=64, train=64, stored=64, crop=64, batch=64, epochs=10, classes=10)
QUICK = Size(sites=16, train=16, stored=16, crop=16, batch=16, epochs=10, classes=3)
ON_ACCELERATORS = Size(sites=512, train=512, stored=128, batch=512, epochs=10)
EMULATED = 8


def run(quick: bool) -> list[Row]:
    """Measure sharded and pmapped steps on every number of devices.

    Raises:
        CannotRun: JAX was already initialized with one device.
    """
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", EMULATED)
    except RuntimeError as error:
        raise CannotRun(
            "needs a new process: run `python -m experiments.bench --only devices`"
        ) from error
    devices = jax.devices()
    emulated = devices[0].platform == "cpu"
    size = (QUICK if quick else SIZE) if emulated else ON_ACCELERATORS
    counts = [n for n in ((1, 2) if quick else (1, 2, 4, 8)) if n <= len(devices)]
    if len(counts) == 1:
        raise CannotRun("needs at least two devices")
    steps = {
        (kind, n): _Step(kind, n, size)
        for kind in ("sharded", "pmap")
        for n in counts
        if (kind, n) != ("pmap", 1)
    }
    for _ in range(2 if quick else 5):
        for step in steps.values():
            step.time_once()
    single = statistics.median(steps["sharded", 1].seconds)
    return [step.row(single, speedup=1 if emulated else n) for (_, n), step in steps.items()]


class _Step:
    """A compiled step and its times."""

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
        self.seconds.clear()  # the first call compiles
        self.hlo = max(_programs() - before, key=len)

    def time_once(self) -> None:
        import jax

        started = time.perf_counter()
        self.state, sums = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, sums))
        self.seconds.append(time.perf_counter() - started)

    def row(self, single: float, speedup: int) -> Row:
        """Make the row of the table.

        Args:
            single: seconds on one device.
            speedup: speedup that counts as efficiency 1.
        """
        median, (volume, operations) = statistics.median(self.seconds), all_reduced(self.hlo)
        return {
            "way": self.kind,
            "devices": self.count,
            "batch": self.size.batch,
            "crop": self.size.crop,
            "step ms": 1e3 * median,
            "spread ms": 1e3 * (max(self.seconds) - min(self.seconds)),
            "efficiency": single / (speedup * median),
            "all-reduced KiB": volume / 2**10,
            "all-reduces": operations,
            "parameters KiB": self.parameter_bytes / 2**10,
        }


def _programs() -> set[str]:
    """Return the text of every compiled program of this process."""
    import jax

    return {
        m.to_string()
        for program in jax.devices()[0].client.live_executables()
        for m in program.hlo_modules()
    }


def all_reduced(hlo: str) -> tuple[int, int]:
    """Return the bytes of the results of all all-reduce operations, and their number."""
    results = re.findall(r" = (\S.*?) all-reduce(?:-start)?\(", hlo)
    values = [shape for result in results for shape in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    sizes = [
        BITS[dtype] // 8 * math.prod(map(int, filter(None, dimensions.split(","))))
        for dtype, dimensions in values
    ]
    return sum(sizes), len(results)
