"""Training and prediction in several processes with `jax.distributed`.

All processes run the same program. Each reads its own part of every batch; JAX sums gradients over
all devices. Only process 0 writes files (run directory, checkpoints, tables) and prints messages.
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

#: Size in bytes of the buffer that carries an error message from process 0 to the others.
MESSAGE_BYTES = 1024
#: Seconds that finished processes wait for process 0, which may still evaluate and write.
END_TIMEOUT_S = 600


@dataclass(frozen=True)
class HostsConfig:
    """Compute

    Several processes that run one job.
    """

    distributed: bool = False
    """Join the other processes of the job (Slurm, Open MPI, TPU, Kubernetes, or
    JAX_COORDINATOR_ADDRESS).
    """

    def __post_init__(self) -> None:
        require_sound(self)


def connect(config: HostsConfig) -> None:
    """Join the other processes of a job. Call it before JAX looks for devices.

    Raises:
        InputError: no job is described, or the other processes were not reached.
    """
    if not config.distributed:
        return
    try:
        # JAX reads only the address from the environment; the two numbers are passed here.
        count, number = (
            _environment_number(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")
        )
        jax.distributed.initialize(
            num_processes=count, process_id=number, shutdown_timeout_seconds=END_TIMEOUT_S
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: could not join the other processes ({error}). Outside Slurm, Open "
            "MPI, TPU slices and "
            "Kubernetes, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    console.quiet = not is_first_process()


def _environment_number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name}={text}: must be a whole number")
    return int(text) if text else None


def is_first_process() -> bool:
    """Return whether this is the process that writes files."""
    return jax.process_index() == 0


def require_supported_job(feed: PipelineChoice, devices: str, batch_size: int) -> None:
    """Check that the flags are possible with the number of processes of this job.

    Raises:
        InputError: the message names the flag.
    """
    count = jax.process_count()
    if count == 1:
        return
    if feed == "resident":
        raise InputError(
            f"--feed resident: each of the {count} processes would load the whole dataset. Use "
            "--feed streamed."
        )
    if devices in ("1", "pmap"):
        raise InputError(
            f"--devices {devices}: works with one process only, this job has {count}. Use "
            "--devices sharded."
        )
    # Each process decodes an equal part of every batch.
    if batch_size % count:
        raise InputError(
            f"--batch-size {batch_size}: must be a multiple of the number of processes ({count})"
        )


def run_on_first_process(work: Callable[[], T], like: T) -> T:
    """Run `work` on process 0 and return its result on all processes.

    Args:
        work: function that reads or writes files.
        like: pytree with the structure, shapes and dtypes of the result; None if `work` returns
            None.

    Raises:
        InputError: `work` raised it; all processes raise the same error.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    # The other processes pass placeholders of the same shape to the broadcast below.
    result, error_text = like, ""
    if is_first_process():
        try:
            result = work()
        except InputError as error:
            error_text = error.message
    # All processes must send arrays of one size, so the text is padded with zero bytes.
    padded = error_text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    message = np.frombuffer(padded, np.uint8)
    result = jax.tree.map(
        lambda leaf, shape: np.asarray(leaf, np.asarray(shape).dtype), result, like
    )
    message, result = multihost_utils.broadcast_one_to_all((message, result))
    if error_text := bytes(message).rstrip(b"\0").decode(errors="replace"):
        raise InputError(error_text)
    return result
