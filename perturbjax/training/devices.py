"""Run the training step on one device, with `pmap`, or with `jit` over a mesh of devices.

All three give the same numbers up to float32 rounding. Batches are padded to a multiple of the
number of devices with rows of weight 0, which change neither the loss nor the BatchNorm statistics.
With several processes (`processes.py`) the mesh contains the devices of all processes, and each
process supplies its own rows of a batch.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder
from perturbjax.core.memory import release_freed_memory
from perturbjax.core.messages import console
from perturbjax.core.options import python_only, require, require_sound
from perturbjax.core.progress import announce
from perturbjax.data.batches import BatchOrder, BatchPipeline, BatchRecords, ResidentArrays, gather
from perturbjax.training.step import Sums, TrainState, TrainStep

T = TypeVar("T")

DeviceKind = Literal["auto", "1", "pmap", "sharded"]
AXIS = "batch"

#: Steps queued on an accelerator, so that it does not wait for the host.
MAX_QUEUED_STEPS = 3

#: Number of first steps before which free memory is returned to the system. These first steps
#: fragment the memory pool; later steps reuse the same blocks.
FREE_MEMORY_STEPS = 4

#: Function (state, order) -> iterator over the state and the sums after each device call. The sums
#: have an axis of steps if a call runs a whole epoch. The buffers of each state are donated to the
#: next call.
EpochRunner = Callable[[TrainState, BatchOrder], Iterator[tuple[TrainState, Sums]]]


@dataclass(frozen=True)
class ComputeConfig:
    """Compute"""

    devices: DeviceKind = "auto"
    """1: one device. sharded: all devices, jit over a mesh. pmap: all devices, replicated. auto:
    sharded.
    """
    device_count: int = python_only(0)
    """Maximum number of devices; 0 uses all."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("device-count", self.device_count, self.device_count >= 0, "0 (all) or more")


@dataclass(frozen=True)
class Placement:
    """Devices of a command and the way to run a step on them.

    Attributes:
        mapped: use `pmap` instead of `jit` over a mesh.
        mesh: the devices, along the single axis `AXIS`.
        scans: run a whole epoch in one device call. False on CPUs: XLA compiles the body of a loop
            for one CPU thread and without its fast convolutions, which is many times slower.
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
        """Axis that the step sums over: needed with `pmap` only."""
        return AXIS if self.mapped else None

    @property
    def batch_multiple(self) -> int:
        """Multiple of evaluation batch sizes, so that all processes have equal parts."""
        return self.count if self.processes > 1 else 1

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def by_row(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(AXIS))

    def replicate(self, tree: Any) -> Any:
        """Copy arrays to all devices. With several processes, all must pass the same arrays."""
        # With several processes, each one can write to its local devices only.
        if self.processes == 1:
            return jax.device_put(tree, self.replicated)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self.replicated, np.asarray(leaf)),
            tree,
        )

    def compile_training(self, train_step: TrainStep, feed: BatchPipeline) -> EpochRunner:
        """Return a function that trains over the batches of an order.

        A device call runs one epoch if `scans` is set and all records are on the device, otherwise
        one step. The transfer guard makes implicit copies between host and device an error.
        """
        if self.scans and feed.arrays is not None:
            run_epoch, arrays = self.compile_epoch(train_step), feed.arrays

            def train_by_epoch(
                state: TrainState, order: BatchOrder
            ) -> Iterator[tuple[TrainState, Sums]]:
                for steps in order.steps_by_epoch():
                    # Only record numbers and weights are copied, (steps, rows) each.
                    rows = self._place_epoch(order.records_of(steps))
                    with jax.transfer_guard("disallow"):
                        state, sums = run_epoch(state, arrays, rows)
                    yield state, sums

            return train_by_epoch
        step = self.compile_step(train_step)

        def train_by_step(
            state: TrainState, order: BatchOrder
        ) -> Iterator[tuple[TrainState, Sums]]:
            queued = collections.deque[Sums](maxlen=MAX_QUEUED_STEPS)
            for number, batch in enumerate(feed.batches(order)):
                limit_pending_steps(queued)
                prepare_step(number, step, state, batch)
                with jax.transfer_guard("disallow"):
                    state, sums = step(state, batch)
                # The sums are queued, not the state: the next step donates the buffers of the
                # state.
                queued.append(sums)
                yield state, sums

        return train_by_step

    def compile_epoch(
        self, train_step: TrainStep
    ) -> Callable[[TrainState, ResidentArrays, BatchRecords], Any]:
        """Compile consecutive steps over resident arrays; each batch is gathered inside jit."""

        def gathered_step(
            state: TrainState, arrays: ResidentArrays, rows: BatchRecords
        ) -> tuple[TrainState, Sums]:
            batch = gather(arrays, jnp.asarray(rows.positions), jnp.asarray(rows.weight))
            # The arrays are replicated. The constraint makes each device gather and process only
            # its rows of the batch.
            if not self.mapped:
                batch = jax.lax.with_sharding_constraint(batch, self.by_row)
            return train_step(state, batch)

        def run_steps(
            state: TrainState, arrays: ResidentArrays, rows: BatchRecords
        ) -> tuple[TrainState, Sums]:
            return jax.lax.scan(lambda state, row: gathered_step(state, arrays, row), state, rows)

        if self.mapped:
            devices = list(self.mesh.devices.flat)
            return jax.pmap(
                # Rows are (steps, devices, rows per device): axis 1 is mapped. All devices compute
                # the same state, of which one copy is returned.
                run_steps,
                AXIS,
                in_axes=(None, None, 1),
                out_axes=None,
                devices=devices,
            )
        # Donated buffers of the old state are reused for the new one.
        return jax.jit(run_steps, donate_argnums=0, out_shardings=self.replicated)

    def compile_step(self, train_step: TrainStep) -> TrainStep:
        """Compile one step on a batch from `place_rows`."""
        if not self.mapped:
            return jax.jit(train_step, donate_argnums=0, out_shardings=self.replicated)
        devices = list(self.mesh.devices.flat)
        compiled = jax.pmap(train_step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
        return lambda state, batch: compiled(state, jax.tree.map(self._split_rows, batch))

    def compile_predict(self, predict_step: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a prediction step on batches from `place_rows`; the caller drops padded rows."""
        # Replicated, so that every process can read all rows.
        return jax.jit(predict_step, out_shardings=self.replicated)

    def place_rows(self, batch: T) -> T:
        """Shard every array of a batch by rows, padded to a multiple of the devices.

        With several processes each passes its own rows, the same number, in the order of the
        processes.
        """
        if self.processes == 1:
            padded = jax.tree.map(lambda rows: pad_rows(rows, self.count), batch)
            return jax.device_put(padded, self.by_row)
        # Number of devices of each process.
        local = self.count // self.processes
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self.by_row, pad_rows(rows, local)),
            batch,
        )

    def _place_epoch(self, rows: BatchRecords) -> BatchRecords:
        """Put the rows of an epoch on every device, each batch padded; split them for `pmap`."""
        # Without `pmap` every device gets all record numbers; the gathered batch is sharded later.
        pad = self._split_rows if self.mapped else functools.partial(pad_rows, multiple=self.count)
        sharding = NamedSharding(self.mesh, P(None, AXIS)) if self.mapped else self.replicated
        return jax.device_put(jax.tree.map(functools.partial(pad, axis=1), rows), sharding)

    def _split_rows(self, rows: np.ndarray | jax.Array, axis: int = 0) -> np.ndarray | jax.Array:
        """Reshape the padded axis to (devices, rows per device)."""
        padded = pad_rows(rows, self.count, axis)
        shape = padded.shape
        return padded.reshape(
            *shape[:axis], self.count, shape[axis] // self.count, *shape[axis + 1 :]
        )


def pad_rows(rows: np.ndarray | jax.Array, multiple: int, axis: int = 0) -> np.ndarray | jax.Array:
    """Pad an axis with zeros to a multiple. A padded row is record 0 with weight 0."""
    # Rows up to the next multiple.
    missing = -rows.shape[axis] % multiple
    if not missing:
        return rows
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (0, missing)
    return np.pad(rows, widths) if isinstance(rows, np.ndarray) else jnp.pad(rows, widths)


def open_devices(compute: ComputeConfig, *, local: bool = False) -> Placement:
    """Choose the devices of a command and set up its compilation cache, see `choose_placement`."""
    use_compilation_cache()
    return choose_placement(compute.devices, compute.device_count, local=local)


def use_compilation_cache(folder: str | Path | None = None) -> None:
    """Store compiled programs on disk for later commands.

    A directory that is not usable causes a warning: the command then compiles its programs itself.

    Args:
        folder: cache directory; by default JAX_COMPILATION_CACHE_DIR or the cache directory of the
            user.
    """
    try:
        cache = make_folder(Path(folder or _default_cache()).absolute())
    except (InputError, RuntimeError) as error:  # RuntimeError: pathlib found no home directory
        reason = str(error).split("; ")[0]
        console.print(
            f"warning: compiled programs are not cached ({reason}). Set JAX_COMPILATION_CACHE_DIR "
            "to another folder."
        )
        # Otherwise JAX repeats the warning for every program.
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # Dozens of small programs take as long as a large one; caching them halves the start-up time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _default_cache() -> str:
    # Cache folder of the XDG Base Directory specification.
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(home) / "perturbjax/compiled")


def prepare_step(number: int, step: Callable[..., Any], *arguments: Any) -> None:
    """Compile a jitted step before its first call, and free memory before the first few calls.

    The compiler leaves hundreds of megabytes of free memory in the process. They are returned to
    the system here, before the first call allocates its own.
    """
    # A `pmap` step is a plain function here; its first call compiles it.
    if not number and isinstance(step, jax.stages.Wrapped):
        with announce("info: compiling the network; later commands reuse the program"):
            step.lower(*arguments).compile()
    if number < FREE_MEMORY_STEPS:
        release_freed_memory()


def limit_pending_steps(queued: Sequence[Any]) -> None:
    """Wait until fewer than `MAX_QUEUED_STEPS` (one on a CPU) of the queued steps are running.

    On a CPU, the temporary memory of a step is allocated when the step is queued, so waiting steps
    would each hold it.
    """
    limit = 1 if jax.default_backend() == "cpu" else MAX_QUEUED_STEPS
    # Once this step is complete, at most `limit - 1` later steps are running.
    if len(queued) >= limit:
        jax.block_until_ready(queued[-limit])


def stack_steps(sums: Sequence[Sums]) -> Sums:
    """Copy the sums of consecutive device calls to the host, concatenated over steps."""
    return jax.tree.map(
        # One step gives scalars; a call of a whole epoch gives arrays of shape (steps,).
        lambda *parts: np.concatenate([np.atleast_1d(part) for part in parts]),
        *jax.device_get(sums),
    )


def choose_placement(kind: DeviceKind, count: int = 0, *, local: bool = False) -> Placement:
    """Choose the devices of a command.

    Args:
        kind: "1", "pmap", "sharded", or "auto" (sharded over all devices).
        count: maximum number of devices; 0 uses all.
        local: use the devices of this process only, for work that is not shared with other
            processes.

    Raises:
        InputError: fewer than `count` devices exist, or `count` is set with several processes.
    """
    available = jax.local_devices() if local else jax.devices()
    # The same order in all processes, grouped by process: rows are assigned in this order.
    devices = sorted(available, key=lambda device: (device.process_index, device.id))
    if count > len(devices):
        raise InputError(
            f"device_count {count}: only {len(devices)} {devices[0].platform} devices are "
            "available. "
            "Use 0 for all devices."
        )
    if count and not local and jax.process_count() > 1:
        raise InputError(
            f"device_count {count}: several processes always use all their devices. Use 0."
        )
    used = devices[:1] if kind == "1" else devices[: count or len(devices)]
    mesh = Mesh(np.array(used), (AXIS,))
    return Placement(mapped=kind == "pmap", mesh=mesh, scans=devices[0].platform != "cpu")
