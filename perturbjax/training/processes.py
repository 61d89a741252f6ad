"""Work shared by several processes, one a host (or one an accelerator): each reads its share, the first alone writes.

All run the same program and agree on everything but their share of a batch. What only one may do (the run directory,
checkpoints) is done by process 0, which tells the others how it went.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.options import require_sound
from perturbjax.data.batches import PipelineChoice

T = TypeVar("T")

#: Bytes of a refusal that reach the other processes.
MESSAGE_BYTES = 1024
#: How long processes that are done wait for the first, which may still be judging and writing.
END_TIMEOUT_S = 600


@dataclass(frozen=True)
class HostsConfig:
    """Compute

    Several processes that run one job.
    """

    distributed: bool = False
    """Join the other processes of the job (Slurm, Open MPI, TPU, Kubernetes, or JAX_COORDINATOR_ADDRESS)."""

    def __post_init__(self) -> None:
        require_sound(self)


def connect(config: HostsConfig) -> None:
    """Join the job, before JAX looks for devices; of several processes only the first goes on speaking.

    Raises:
        InputError: the flags do not describe a job, nothing else does, or the others were not found.
    """
    if not config.distributed:
        return
    try:
        # jax reads only the address from the environment; the two numbers are passed here.
        count, number = (
            _environment_number(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")
        )
        jax.distributed.initialize(
            num_processes=count, process_id=number, shutdown_timeout_seconds=END_TIMEOUT_S
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: could not join the other processes ({error}). Outside Slurm, Open MPI, TPU slices and "
            "Kubernetes, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    console.quiet = not is_first_process()


def _environment_number(name: str) -> int | None:
    """A whole number of the environment, or None."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name}={text}: must be a whole number")
    return int(text) if text else None


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
