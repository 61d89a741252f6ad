"""Running the one step body on one device, on many with `pmap`, or on many with `jit` over a mesh.

The three give the same numbers up to float32 rounding. Batches are padded to a multiple of the devices with rows of
weight 0, which count neither in the loss nor in BatchNorm's statistics. With several processes (`hosts.py`) the mesh
spans all their devices, and each process brings its own rows of a batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from perturbjax.augment import RawBatch
from perturbjax.console import InputError
from perturbjax.files import make_folder
from perturbjax.training.step import PredictStep, Sums, TrainState, TrainStep

DeviceKind = Literal["auto", "1", "pmap", "sharded"]
AXIS = "batch"

Gather = Callable[[Any, Int[Array, " b"], Float[Array, " b"]], RawBatch]
#: (state, resident arrays, record positions (steps, b), weights (steps, b)) → (state, sums with a leading steps axis)
Epoch = Callable[[TrainState, Any, Int[np.ndarray, "steps b"], Float[np.ndarray, "steps b"]], tuple[TrainState, Sums]]


@dataclass(frozen=True)
class Placement:
    """Which devices take part, and how.

    Attributes:
        mapped: `pmap` instead of `jit` over a mesh.
        mesh: the devices, along the one axis `AXIS`.
        scans: one dispatch an epoch instead of one a step. XLA compiles a loop's body for one CPU thread and without
            its fast convolutions, many times slower, so CPUs do without.
    """

    mapped: bool
    mesh: Mesh
    scans: bool

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def processes(self) -> int:
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def axis_name(self) -> str | None:
        """What the step body reduces over: only `pmap` needs to be told."""
        return AXIS if self.mapped else None

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def by_row(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(AXIS))

    def replicate(self, tree: Any) -> Any:
        """Put a copy of every array on every device; of several processes each has the same arrays."""
        if self.processes == 1:
            return jax.device_put(tree, self.replicated)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self.replicated, np.asarray(leaf)), tree
        )

    def compile_epoch(self, train_step: TrainStep, gather: Gather) -> Epoch:
        """An epoch over resident arrays, every batch gathered inside jit.

        With `scans` the whole epoch is one dispatch; without, one a step.
        """

        def gathered_step(state: TrainState, arrays: Any, row: Array, weight: Array) -> tuple[TrainState, Sums]:
            batch = gather(arrays, row, weight)
            if not self.mapped:
                batch = jax.lax.with_sharding_constraint(batch, self.by_row)
            return train_step(state, batch)

        def run_epoch(state: TrainState, arrays: Any, order: Array, weights: Array) -> tuple[TrainState, Sums]:
            return jax.lax.scan(lambda state, row: gathered_step(state, arrays, *row), state, (order, weights))

        body, axis = (run_epoch, 1) if self.scans else (gathered_step, 0)
        if self.mapped:
            devices = list(self.mesh.devices.flat)
            compiled = jax.pmap(body, AXIS, in_axes=(None, None, axis, axis), out_axes=None, devices=devices)
            deal = self._by_device
        else:
            compiled = jax.jit(body, donate_argnums=0, out_shardings=self.replicated)
            deal = functools.partial(pad_rows, multiple=self.count)
        if self.scans:
            return lambda state, arrays, *rows: compiled(state, arrays, *(deal(part, axis=1) for part in rows))

        def step_by_step(
            state: TrainState, arrays: Any, order: np.ndarray, weights: np.ndarray
        ) -> tuple[TrainState, Sums]:
            sums = []
            for row, weight in zip(order, weights, strict=True):
                state, step_sums = compiled(state, arrays, deal(row), deal(weight))
                sums.append(step_sums)
            return state, stack_steps(sums)

        return step_by_step

    def compile_step(self, train_step: TrainStep) -> TrainStep:
        """One dispatch a step, for batches that are streamed (and placed by `place_rows`)."""
        if not self.mapped:
            return jax.jit(train_step, donate_argnums=0, out_shardings=self.replicated)
        compiled = jax.pmap(train_step, AXIS, in_axes=(None, 0), out_axes=None, devices=list(self.mesh.devices.flat))
        return lambda state, batch: compiled(state, jax.tree.map(self._by_device, batch))

    def compile_predict(self, predict_step: PredictStep) -> PredictStep:
        """Evaluation, its batch sharded over the devices; the caller drops the padded rows."""
        compiled = jax.jit(predict_step, out_shardings=self.replicated)
        if self.processes > 1:  # their streamed batches are placed already
            return compiled
        return lambda params, stats, batch: compiled(params, stats, self.place_rows(batch))

    def place_rows(self, batch: RawBatch) -> RawBatch:
        """Shard a batch by rows, padded to a multiple of the devices.

        Of several processes each gives its own rows, the same number, and they stand in the order of the processes.
        """
        if self.processes == 1:
            padded = jax.tree.map(lambda rows: pad_rows(rows, self.count), batch)
            return jax.device_put(padded, self.by_row)
        local = self.count // self.processes
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self.by_row, pad_rows(rows, local)), batch
        )

    def _by_device(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Split the padded axis into (devices, rows a device)."""
        padded = pad_rows(rows, self.count, axis)
        shape = padded.shape
        return padded.reshape(*shape[:axis], self.count, shape[axis] // self.count, *shape[axis + 1 :])


def pad_rows(rows: np.ndarray, multiple: int, axis: int = 0) -> np.ndarray:
    """Pad an axis with zeros to a multiple: a padded row is record 0 with weight 0."""
    missing = -rows.shape[axis] % multiple
    if not missing:
        return rows
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (0, missing)
    return np.pad(rows, widths) if isinstance(rows, np.ndarray) else jnp.pad(rows, widths)


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs between processes, in `folder`: "default" is the user's cache directory, "none" no cache.

    Raises:
        InputError: the folder cannot be written to.
    """
    if folder == "none":
        return
    if folder == "default":
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(home) / "perturbjax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(make_folder(Path(folder)).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def stack_steps(sums: Sequence[Sums]) -> Sums:
    """The sums of an epoch's steps, fetched to the host, with a leading steps axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(list(sums)))


def choose_placement(kind: DeviceKind, count: int = 0) -> Placement:
    """The devices of a run: `auto` shards over all there are.

    Args:
        kind: "1", "pmap", "sharded" or "auto".
        count: how many devices at most; 0 takes all.

    Raises:
        InputError: fewer devices are there than asked for, or several processes are to leave some out.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if count > len(devices):
        raise InputError(f"--device-count {count}: only {len(devices)} {devices[0].platform} devices are there")
    if count and jax.process_count() > 1:
        raise InputError(f"--device-count {count}: several processes use all the devices they have; leave it out")
    taken = devices[:1] if kind == "1" else devices[: count or len(devices)]
    mesh = Mesh(np.array(taken), (AXIS,))
    return Placement(mapped=kind == "pmap", mesh=mesh, scans=devices[0].platform != "cpu")
