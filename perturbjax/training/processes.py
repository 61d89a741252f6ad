"""Work shared by several processes, one a host (or one an accelerator): each reads its share, the first alone writes.

All run the same program and agree on everything but their share of a batch. What only one may do (the run directory,
checkpoints) is done by process 0, which tells the others how it went.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.options import require, require_sound
from perturbjax.data.batches import PipelineChoice

T = TypeVar("T")

#: Bytes of a refusal that reach the other processes.
MESSAGE_BYTES = 1024
#: How long processes that are done wait for the first, which may still be judging and writing.
END_TIMEOUT_S = 600


@dataclass(frozen=True)
class HostsConfig:
    """Several processes that do one job."""

    distributed: bool = False
    """Join the other processes of this job, as Slurm, Open MPI, a TPU slice or Kubernetes describes it."""
    coordinator: str = ""
    """HOST:PORT of the first process, where nothing describes the job."""
    processes: int = 0
    """With --coordinator: how many processes there are."""
    process: int = -1
    """With --coordinator: which of them this one is, from 0."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("processes", self.processes, self.processes >= 0, "0 or more")
        require("process", self.process, self.process >= -1, "0 or more")


def connect(config: HostsConfig) -> None:
    """Join the job, before JAX looks for devices; of several processes only the first goes on speaking.

    Raises:
        InputError: the flags do not describe a job, nothing else does, or the others were not found.
    """
    if not (config.distributed or config.coordinator):
        if config.processes or config.process >= 0:
            raise InputError(
                "--processes, --process: need --coordinator HOST:PORT of the first process"
            )
        return
    if config.coordinator and not 0 <= config.process < config.processes:
        raise InputError(
            f"--process {config.process}: with --coordinator, give --processes N and --process from 0 to N - 1"
        )
    explicit: list[Any] = (
        [config.coordinator, config.processes, config.process] if config.coordinator else []
    )
    try:
        jax.distributed.initialize(*explicit, shutdown_timeout_seconds=END_TIMEOUT_S)  # type: ignore[misc]
    except (ValueError, RuntimeError) as error:
        where = f"--coordinator {config.coordinator}" if explicit else "--distributed"
        raise InputError(
            f"{where}: could not join the other processes ({error}); outside Slurm, Open MPI, TPU slices and "
            "Kubernetes give --coordinator HOST:PORT --processes N --process I"
        ) from error
    console.quiet = not is_first_process()


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def require_supported_job(feed: PipelineChoice, devices: str, batch_size: int) -> None:
    """Refuse what several processes cannot do.

    Raises:
        InputError: names the flag.
    """
    count = jax.process_count()
    if count == 1:
        return
    if feed == "resident":
        raise InputError(
            f"--feed resident: would have each of {count} processes read the whole dataset; use --feed streamed"
        )
    if devices in ("1", "pmap"):
        raise InputError(
            f"--devices {devices}: is for one process, and {count} are here; use --devices sharded"
        )
    if batch_size % count:
        raise InputError(f"--batch-size {batch_size}: is not a multiple of the {count} processes")


def run_on_first_process(work: Callable[[], T], like: T) -> T:
    """What process 0 alone gets from `work`, on every process; a refusal reaches all of them too.

    Args:
        work: reads or writes what the other processes may not see.
        like: a pytree of arrays and numbers of the structure, shapes and dtypes of the answer; None for no answer.

    Raises:
        InputError: `work` raised one.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    answer, refusal = like, ""
    if is_first_process():
        try:
            answer = work()
        except InputError as error:
            refusal = str(error)
    message = np.frombuffer(refusal.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    answer = jax.tree.map(
        lambda leaf, shape: np.asarray(leaf, np.asarray(shape).dtype), answer, like
    )
    message, answer = multihost_utils.broadcast_one_to_all((message, answer))
    if said := bytes(message).rstrip(b"\0").decode(errors="replace"):
        raise InputError(said)
    return answer
