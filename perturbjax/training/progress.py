"""Resume a training from its newest checkpoint, and save it when it is terminated.

SIGTERM, which Slurm and Kubernetes send some seconds before they kill a process, is recorded during
training. The training checks for it after every step, saves the state within the epoch, and ends.
The run then resumes with bit-identical numbers, because the checkpoint also contains the metric
sums of the incomplete epoch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from perturbjax.core.errors import InputError, Terminated
from perturbjax.training.checkpoint import INTERRUPTED, Checkpoints
from perturbjax.training.checkpoint_arrays import tree_to_state
from perturbjax.training.devices import stack_steps
from perturbjax.training.processes import is_first_process
from perturbjax.training.run_directory import Run
from perturbjax.training.step import Sums, TrainState

#: Facts of a checkpoint within an epoch: sums of its completed steps, and their duration in
#: seconds.
SUMS, SECONDS = "sums", "seconds"


class Progress(NamedTuple):
    """Position within a training. A pytree whose shapes do not depend on the position."""

    state: TrainState
    epoch: int | np.ndarray
    """Number of completed epochs (trained, scored and written to the metrics)."""
    taken: int | np.ndarray
    """Number of completed steps of the next epoch."""
    sums: Float32[np.ndarray, "4 steps"]
    """`Sums` of these steps, in the first columns."""
    seconds: float | np.ndarray
    """Duration of these steps in seconds."""

    @property
    def step(self) -> int:
        """Number of completed steps since the start of training."""
        return int(self.epoch) * self.sums.shape[1] + int(self.taken)

    def partial_sums(self) -> list[Sums]:
        """Return the sums of the completed steps of an incomplete epoch; empty between epochs."""
        return [Sums(*self.sums[:, : int(self.taken)])] if self.taken else []


def first_progress(state: TrainState, steps_per_epoch: int) -> Progress:
    """Return the progress before the first step."""
    return Progress(state, 0, 0, np.zeros((len(Sums._fields), steps_per_epoch), np.float32), 0.0)


def resume(run: Run, checkpoints: Checkpoints, start: Progress) -> Progress:
    """Return the progress of the newest checkpoint, or `start` if there is none.

    Metrics of later epochs are removed from `metrics.jsonl`.

    Raises:
        InputError: the checkpoint is not readable, or belongs to another run.
    """
    newest = checkpoints.load_newest()
    if newest is None:
        run.truncate_metrics(0)
        return start
    tree, facts = newest
    run.require_matching_files(facts, checkpoints.path)
    run.truncate_metrics(facts["epoch"])
    sums = start.sums.copy()
    try:
        partial = np.asarray(facts.get(SUMS, sums[:, :0]), np.float32)
        # Padded to the steps of an epoch: process 0 sends this array to all processes, which need
        # its shape in advance.
        sums[:, : partial.shape[1]] = partial
        seconds = float(facts.get(SECONDS, 0.0))
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoints.path}: the sums of the interrupted epoch are damaged ({error}). Remove "
            f"the folder {INTERRUPTED} to repeat the epoch."
        ) from error
    state = tree_to_state(tree, start.state, checkpoints.path)
    return Progress(state, facts["epoch"], partial.shape[1], sums, seconds)


def save_interrupted(
    checkpoints: Checkpoints,
    state: TrainState,
    *,
    epoch: int,
    partial_sums: Sequence[Sums],
    seconds: float,
    facts: dict[str, Any],
) -> Terminated:
    """Save the state within an epoch. With several processes, process 0 saves.

    Args:
        checkpoints: checkpoints of the run.
        state: state after the last completed step.
        epoch: number of completed epochs.
        partial_sums: sums of the completed steps of the next epoch.
        seconds: duration of these steps.
        facts: identity of the run.

    Returns:
        The exception that ends the command.
    """
    sums = stack_steps(partial_sums)
    if is_first_process():
        # JSON stores the sums as float64 text, which represents float32 values exactly.
        partial = {SUMS: [part.tolist() for part in sums], SECONDS: seconds}
        checkpoints.save_within(
            state, epoch=epoch, step=int(state.step), facts={**facts, **partial}
        )
    return Terminated(
        f"saved after step {len(sums.loss)} of epoch {epoch + 1}; run the same command again to "
        "resume"
    )


@contextmanager
def watch_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yield a function `stop_requested(step)` that returns whether SIGTERM was received.

    With several processes, it is true for all of them at the same step, after any of them received
    the signal. Within the block the signal has no other effect.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # JAX handles the signal itself in a distributed job and makes all processes agree on a
        # step. A Python handler would hide the signal from it.
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python allows signal handlers in the main thread only
        return
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
