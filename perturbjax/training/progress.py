"""How far a run is: going on from where it was left, and leaving it where it is told to end.

SIGTERM, which Slurm and Kubernetes send some seconds before they kill, is noted while a network trains and obeyed
between two dispatches: within an epoch, where it takes many.
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

from perturbjax.core.errors import Terminated
from perturbjax.training.checkpoint import Checkpoints, tree_to_state
from perturbjax.training.devices import stack_steps
from perturbjax.training.processes import is_first_process
from perturbjax.training.run_directory import Run
from perturbjax.training.step import Sums, TrainState

#: Facts of a checkpoint within an epoch: sums of the epoch's steps that are taken, and the seconds they took.
SUMS, SECONDS = "sums", "seconds"


class Progress(NamedTuple):
    """Where a run is. A pytree whose shapes do not depend on how far it is."""

    state: TrainState
    epoch: int | np.ndarray
    """Epochs that are done with: trained, judged where it was time to, and in the metrics."""
    taken: int | np.ndarray
    """Steps of the epoch under way; all of them where only the end of the epoch is to come."""
    sums: Float32[np.ndarray, "4 steps"]
    """`Sums` of those steps, in its first columns."""
    seconds: float | np.ndarray
    """Time spent on them."""

    def parts(self) -> list[Sums]:
        """What the steps of the epoch under way add to its metrics; nothing at its beginning."""
        return [Sums(*self.sums[:, : int(self.taken)])] if self.taken else []


def resume(run: Run, checkpoints: Checkpoints, fresh: TrainState, steps_per_epoch: int) -> Progress:
    """What a run goes on from: its newest checkpoint, or the fresh state. Metrics of later epochs are dropped.

    Raises:
        InputError: the checkpoint cannot be read, or is of another run.
    """
    sums = np.zeros((len(Sums._fields), steps_per_epoch), np.float32)
    found = checkpoints.load_newest()
    if found is None:
        run.truncate_metrics(0)
        return Progress(fresh, 0, 0, sums, 0.0)
    tree, facts = found
    run.require_matching_files(facts, checkpoints.path)
    run.truncate_metrics(facts["epoch"])
    partial = np.asarray(facts.get(SUMS, np.zeros((len(sums), 0))), np.float32)
    sums[:, : partial.shape[1]] = partial
    state = tree_to_state(tree, fresh, checkpoints.path)
    return Progress(state, facts["epoch"], partial.shape[1], sums, facts.get(SECONDS, 0.0))


def leave(
    checkpoints: Checkpoints,
    state: TrainState,
    *,
    epoch: int,
    parts: Sequence[Sums],
    seconds: float,
    facts: dict[str, Any],
) -> Terminated:
    """Save within the epoch that follows `epoch`, and give what ends the command; of several processes one writes.

    Args:
        parts: sums of the steps taken of that epoch.
        seconds: time spent on them.
    """
    sums = stack_steps(parts)
    if is_first_process():
        partial = {SUMS: [part.tolist() for part in sums], SECONDS: seconds}
        checkpoints.save_within(
            state, epoch=epoch, step=int(state.step), facts={**facts, **partial}
        )
    return Terminated(
        f"saved after step {len(sums.loss)} of epoch {epoch + 1}; run the same command again to go on"
    )


@contextmanager
def watch_sigterm() -> Iterator[Callable[[int], bool]]:
    """Give `asked(step)`: whether SIGTERM came, to this process or, at the same step for all, to any of its job.

    Within the block the signal does nothing else.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # JAX notes the signal itself, once it knows of the job, and lets all processes agree on a step. What Python
        # says of the signal would hide it.
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # no other may say what a signal does
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
