"""Running the one step body on one device, on many with `pmap`, or on many with `jit` over a mesh.

The three give the same numbers up to float32 rounding. Batches are padded to a multiple of the devices with rows of
weight 0, which count neither in the loss nor in BatchNorm's statistics. With several processes (`hosts.py`) the mesh
spans all their devices, and each process brings its own rows of a batch.
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
from perturbjax.core.memory import give_back_freed_memory
from perturbjax.core.messages import console
from perturbjax.core.options import python_only, require, require_sound
from perturbjax.data.batches import BatchOrder, BatchPipeline, BatchRecords, ResidentArrays, gather
from perturbjax.training.step import Sums, TrainState, TrainStep

T = TypeVar("T")

DeviceKind = Literal["auto", "1", "pmap", "sharded"]
AXIS = "batch"

#: Dispatches that are under way at a time where the device is another than the host: it never waits for the host.
AHEAD = 3

#: Dispatches before each of which free memory is given back. The first batches split what a step has freed, so that the
#: next step's block comes anew; then they find room in what was left, and it stays so.
SETTLING = 4

#: (state, order) → after every dispatch the state, and the sums of its steps, with or without an axis of steps. The
#: state that is given, and every one that is yielded, is given away to the next dispatch.
Dispatches = Callable[[TrainState, BatchOrder], Iterator[tuple[TrainState, Sums]]]


@dataclass(frozen=True)
class ComputeConfig:
    """Compute"""

    devices: DeviceKind = "auto"
    """1: one device. sharded: all devices, jit over a mesh. pmap: all devices, replicated. auto: sharded."""
    device_count: int = python_only(0)
    """Maximum number of devices; 0 uses all."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("device-count", self.device_count, self.device_count >= 0, "0 (all) or more")


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
            lambda leaf: jax.make_array_from_process_local_data(self.replicated, np.asarray(leaf)),
            tree,
        )

    def compile_training(self, train_step: TrainStep, feed: BatchPipeline) -> Dispatches:
        """Training over a feed's batches: one dispatch a step, or one an epoch with `scans` and all records resident.

        Nothing crosses between host and device in a dispatch but what was put there by name.
        """
        if self.scans and feed.arrays is not None:
            run_epoch, arrays = self.compile_epoch(train_step), feed.arrays

            def by_epoch(state: TrainState, order: BatchOrder) -> Iterator[tuple[TrainState, Sums]]:
                for steps in order.steps_by_epoch():
                    rows = self._place_epoch(order.records_of(steps))
                    with jax.transfer_guard("disallow"):
                        state, sums = run_epoch(state, arrays, rows)
                    yield state, sums

            return by_epoch
        step = self.compile_step(train_step)

        def by_step(state: TrainState, order: BatchOrder) -> Iterator[tuple[TrainState, Sums]]:
            dispatched = collections.deque[Sums](maxlen=AHEAD)
            for taken, batch in enumerate(feed.batches(order)):
                limit_pending_steps(dispatched)
                prepare_step(taken, step, state, batch)
                with jax.transfer_guard("disallow"):
                    state, sums = step(state, batch)
                dispatched.append(sums)
                yield state, sums

        return by_step

    def compile_epoch(
        self, train_step: TrainStep
    ) -> Callable[[TrainState, ResidentArrays, BatchRecords], Any]:
        """Consecutive steps over resident arrays, every batch gathered inside jit."""

        def gathered_step(
            state: TrainState, arrays: ResidentArrays, rows: BatchRecords
        ) -> tuple[TrainState, Sums]:
            batch = gather(arrays, jnp.asarray(rows.positions), jnp.asarray(rows.weight))
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
                run_steps, AXIS, in_axes=(None, None, 1), out_axes=None, devices=devices
            )
        return jax.jit(run_steps, donate_argnums=0, out_shardings=self.replicated)

    def compile_step(self, train_step: TrainStep) -> TrainStep:
        """One step on a batch that `place_rows` has placed."""
        if not self.mapped:
            return jax.jit(train_step, donate_argnums=0, out_shardings=self.replicated)
        compiled = jax.pmap(
            train_step, AXIS, in_axes=(None, 0), out_axes=None, devices=list(self.mesh.devices.flat)
        )
        return lambda state, batch: compiled(state, jax.tree.map(self._by_device, batch))

    def _place_epoch(self, rows: BatchRecords) -> BatchRecords:
        """The rows of an epoch on every device, each batch padded; for `pmap`, dealt to them."""
        deal = self._by_device if self.mapped else functools.partial(pad_rows, multiple=self.count)
        where = NamedSharding(self.mesh, P(None, AXIS)) if self.mapped else self.replicated
        return jax.device_put(jax.tree.map(functools.partial(deal, axis=1), rows), where)

    def compile_predict(self, predict_step: Callable[..., Any]) -> Callable[..., Any]:
        """Evaluation of batches that are placed, sharded over the devices; the caller drops the padded rows."""
        return jax.jit(predict_step, out_shardings=self.replicated)

    def place_rows(self, batch: T) -> T:
        """Shard every array of a batch by rows, padded to a multiple of the devices.

        Of several processes each gives its own rows, the same number, and they stand in the order of the processes.
        """
        if self.processes == 1:
            padded = jax.tree.map(lambda rows: pad_rows(rows, self.count), batch)
            return jax.device_put(padded, self.by_row)
        local = self.count // self.processes
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self.by_row, pad_rows(rows, local)),
            batch,
        )

    def _by_device(self, rows: np.ndarray | jax.Array, axis: int = 0) -> np.ndarray | jax.Array:
        """Split the padded axis into (devices, rows a device)."""
        padded = pad_rows(rows, self.count, axis)
        shape = padded.shape
        return padded.reshape(
            *shape[:axis], self.count, shape[axis] // self.count, *shape[axis + 1 :]
        )


def pad_rows(rows: np.ndarray | jax.Array, multiple: int, axis: int = 0) -> np.ndarray | jax.Array:
    """Pad an axis with zeros to a multiple: a padded row is record 0 with weight 0."""
    missing = -rows.shape[axis] % multiple
    if not missing:
        return rows
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (0, missing)
    return np.pad(rows, widths) if isinstance(rows, np.ndarray) else jnp.pad(rows, widths)


def open_devices(compute: ComputeConfig, *, own: bool = False) -> Placement:
    """The devices of a command, with compiled programs kept as it says; with `own` those of this process alone.

    Raises:
        InputError: fewer devices are there than asked for, or several processes are to leave some out.
    """
    use_compilation_cache("default")
    return choose_placement(compute.devices, compute.device_count, own=own)


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs between processes, in `folder`: "default" is the user's cache directory, "none" no cache.

    Where the folder cannot be had, a line says so: compiling again is slower, and no reason to stop.
    """
    if folder == "none":
        return
    try:
        kept = make_folder(Path(folder if folder != "default" else _default_cache()).absolute())
    except (
        InputError,
        RuntimeError,
    ) as error:  # pathlib raises RuntimeError where there is no home
        reason = str(error).split("; ")[0]
        console.print(
            f"note: compiled programs are not kept ({reason}); set JAX_COMPILATION_CACHE_DIR to another folder"
        )
        jax.config.update(
            "jax_compilation_cache_dir", None
        )  # or JAX would say so again for every program
        return
    jax.config.update("jax_compilation_cache_dir", str(kept))
    # Dozens of small programs take as long as a large one: kept too, they halve the start of every command.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _default_cache() -> str:
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return given
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(home) / "perturbjax" / "compiled")


def prepare_step(number: int, step: Callable[..., Any], *arguments: Any) -> None:
    """Before the dispatch of this number: give memory back, and before the first compile what is about to be called.

    A compiler leaves hundreds of megabytes, which would else be held beside those of the first call. The call finds
    the program made; what is no jitted function is left to compile itself.
    """
    if not number and isinstance(step, jax.stages.Wrapped):
        step.lower(*arguments).compile()
    if number < SETTLING:
        give_back_freed_memory()


def limit_pending_steps(dispatched: Sequence[Any]) -> None:
    """Wait until as few of what was dispatched are under way that another may be: `AHEAD`, on a CPU one alone.

    On a CPU a program's temporaries are allocated when it is dispatched, so each that waits its turn holds its own.
    """
    ahead = 1 if jax.default_backend() == "cpu" else AHEAD
    if len(dispatched) >= ahead:
        jax.block_until_ready(dispatched[-ahead])


def stack_steps(sums: Sequence[Sums]) -> Sums:
    """The sums of consecutive dispatches, fetched to the host, with one leading axis of steps."""
    return jax.tree.map(
        lambda *parts: np.concatenate([np.atleast_1d(part) for part in parts]),
        *jax.device_get(sums),
    )


def choose_placement(kind: DeviceKind, count: int = 0, *, own: bool = False) -> Placement:
    """The devices of a run: `auto` shards over all there are.

    Args:
        kind: "1", "pmap", "sharded" or "auto".
        count: how many devices at most; 0 takes all.
        own: only those of this process, which computes apart from the others of its job.

    Raises:
        InputError: fewer devices are there than asked for, or several processes are to leave some out.
    """
    there = jax.local_devices() if own else jax.devices()
    devices = sorted(there, key=lambda device: (device.process_index, device.id))
    if count > len(devices):
        raise InputError(
            f"--device-count {count}: only {len(devices)} {devices[0].platform} devices are there"
        )
    if count and not own and jax.process_count() > 1:
        raise InputError(
            f"--device-count {count}: several processes use all the devices they have; leave it out"
        )
    taken = devices[:1] if kind == "1" else devices[: count or len(devices)]
    mesh = Mesh(np.array(taken), (AXIS,))
    return Placement(mapped=kind == "pmap", mesh=mesh, scans=devices[0].platform != "cpu")
