"""Apply a network to sites: without augmentation, all sites, in the requested order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Shaped

from perturbjax.core.progress import QUIET_S, track
from perturbjax.data.batches import BatchOrder, RawBatch
from perturbjax.training.devices import limit_pending_steps, prepare_step
from perturbjax.training.step import EvaluationStep


class Predictions(NamedTuple):
    """Predictions of a network, in the order of the requested positions."""

    probabilities: Float32[np.ndarray, "n classes"]
    features: Float32[np.ndarray, "n d"]


def apply_to_sites(
    step: EvaluationStep,
    params: Any,
    stats: Any,
    batches: Callable[[BatchOrder], Iterable[RawBatch]],
    positions: Int[np.ndarray, " n"],
    batch_size: int,
    *,
    multiple: int = 1,
    quiet: bool = True,
) -> tuple[Shaped[np.ndarray, " n *_"], ...]:
    """Run a compiled step on the records at `positions`.

    All batches have the same size; the last one is padded. One compiled program serves all of them,
    and the result of a record does not depend on the number of records.

    Args:
        step: compiled prediction, attention or features step.
        params: parameters of the network.
        stats: statistics of the network.
        batches: batch pipeline, a function from an order to placed batches.
        positions: (n,) positions in the dataset.
        batch_size: number of sites in a step.
        multiple: round the batch size up to this multiple (`Placement.batch_multiple`).
        quiet: show no progress.

    Returns:
        One array of n rows for each output of the step.
    """
    # Round up to a multiple.
    size = batch_size + -batch_size % multiple
    outputs: list[tuple[Any, ...]] = []
    order = BatchOrder.single_pass(positions, size)
    steps = batches(order)
    if not quiet:
        unit = f"batches of {batch_size} sites"
        steps = track(steps, total=len(order), label="Predicting", unit=unit, quiet_s=QUIET_S)
    for batch in steps:
        limit_pending_steps(outputs)
        prepare_step(len(outputs), step, params, stats, batch)
        outputs.append(step(params, stats, batch))
    return tuple(
        # The first slice removes rows that pad a batch for the devices, the second those that pad
        # the last batch of the order.
        np.concatenate([np.asarray(part)[:size] for part in parts])[: len(positions)]
        for parts in zip(*outputs, strict=True)
    )


class SiteScores(NamedTuple):
    """Scores of predictions on some sites."""

    loss: float
    """Mean cross-entropy (natural logarithm, without label smoothing)."""
    accuracy: float
    """Fraction of sites whose most probable class is the true one."""
    balanced_accuracy: float
    """Mean recall over the classes that have sites."""


def score_sites(
    probabilities: Float32[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> SiteScores:
    """Compute loss, accuracy and balanced accuracy of predicted probabilities."""
    true_class = probabilities[np.arange(len(labels)), labels]
    correct = probabilities.argmax(1) == labels
    counts = np.bincount(labels)
    # Correct sites of each class divided by its sites; classes without sites are left out.
    recall = np.bincount(labels, correct)[counts > 0] / counts[counts > 0]
    # 1e-30 keeps the loss finite if a float32 probability underflows to 0.
    loss = -np.log(np.maximum(true_class, 1e-30)).mean()
    return SiteScores(float(loss), float(correct.mean()), float(recall.mean()))


def feature_names(groups: Sequence[str], count: int) -> list[str]:
    """Return the names of features in tables, `GROUP_0001` and so on, for groups of equal size."""
    # Numbers restart in each group. The module of a user's network is left out.
    numbers = range(1, count // len(groups) + 1)
    return [f"{group.rpartition(':')[2]}_{number:04d}" for group in groups for number in numbers]
