"""Running the one step body on one device, on many with `pmap`, or on many with `jit` over a mesh.

The three give the same numbers up to float32 rounding. Batches are padded to a multiple of the devices with rows of
weight 0, which count neither in the loss nor in BatchNorm's statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from perturbjax.augment import RawBatch
from perturbjax.console import InputError
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
    """

    mapped: bool
    mesh: Mesh

    @property
    def count(self) -> int:
        return self.mesh.size

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
        """Put a copy of every array on every device."""
        return jax.device_put(tree, self.replicated)

    def compile_epoch(self, train_step: TrainStep, gather: Gather) -> Epoch:
        """One dispatch an epoch: scan the step over the epoch's order, its batches gathered from resident arrays."""

        def run_epoch(state: TrainState, arrays: Any, order: Array, weight: Array) -> tuple[TrainState, Sums]:
            def body(state: TrainState, row: tuple[Array, Array]) -> tuple[TrainState, Sums]:
                batch = gather(arrays, *row)
                if not self.mapped:
                    batch = jax.lax.with_sharding_constraint(batch, self.by_row)
                return train_step(state, batch)

            return jax.lax.scan(body, state, (order, weight))

        if not self.mapped:
            compiled = jax.jit(run_epoch, donate_argnums=0, out_shardings=self.replicated)
            return lambda state, arrays, *rows: compiled(
                state, arrays, *(pad_rows(r, self.count, axis=1) for r in rows)
            )
        compiled = jax.pmap(
            run_epoch, AXIS, in_axes=(None, None, 1, 1), out_axes=None, devices=list(self.mesh.devices.flat)
        )
        return lambda state, arrays, *rows: compiled(state, arrays, *(self._by_device(r, axis=1) for r in rows))

    def compile_step(self, train_step: TrainStep) -> TrainStep:
        """One dispatch a step, for batches that are streamed (and placed by `place_rows`)."""
        if not self.mapped:
            return jax.jit(train_step, donate_argnums=0, out_shardings=self.replicated)
        compiled = jax.pmap(train_step, AXIS, in_axes=(None, 0), out_axes=None, devices=list(self.mesh.devices.flat))
        return lambda state, batch: compiled(state, jax.tree.map(self._by_device, batch))

    def compile_predict(self, predict_step: PredictStep) -> PredictStep:
        """Evaluation, its batch sharded over the devices; the caller drops the padded rows."""
        compiled = jax.jit(predict_step, out_shardings=self.replicated)
        return lambda params, stats, batch: compiled(params, stats, self.place_rows(batch))

    def place_rows(self, batch: RawBatch) -> RawBatch:
        """Shard a batch by rows, padded to a multiple of the devices."""
        padded = jax.tree.map(lambda rows: pad_rows(rows, self.count), batch)
        return jax.device_put(padded, self.by_row)

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


def choose_placement(kind: DeviceKind, count: int = 0) -> Placement:
    """The devices of a run: `auto` shards over all there are.

    Args:
        kind: "1", "pmap", "sharded" or "auto".
        count: how many devices at most; 0 takes all.

    Raises:
        InputError: fewer devices are there than asked for.
    """
    devices = jax.devices()
    if count > len(devices):
        raise InputError(f"--device-count {count}: only {len(devices)} {devices[0].platform} devices are there")
    taken = devices[:1] if kind == "1" else devices[: count or len(devices)]
    return Placement(mapped=kind == "pmap", mesh=Mesh(np.array(taken), (AXIS,)))
