"""Applying a network to sites: never augmented, no tail dropped, order kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Shaped

from perturbjax.data.batches import BatchOrder, RawBatch
from perturbjax.training.devices import limit_pending_steps, prepare_step
from perturbjax.training.step import AttentionStep, PredictStep


class Predictions(NamedTuple):
    """A network's answers, in the order of the positions asked for."""

    probabilities: Float32[np.ndarray, "n classes"]
    features: Float32[np.ndarray, "n d"]


def apply_to_sites(
    step: PredictStep | AttentionStep,
    params: Any,
    stats: Any,
    batches: Callable[[BatchOrder], Iterable[RawBatch]],
    positions: Int[np.ndarray, " n"],
    batch_size: int,
    *,
    multiple: int = 1,
) -> tuple[Shaped[np.ndarray, "n *_"], ...]:
    """What a step answers of the records at `positions`: an array a part of its answer.

    Batches are rounded up to a `multiple`, so that each of several processes has an equal share. Every batch has that
    size, the last padded, so that one compiled step serves and an answer does not depend on how many are asked for;
    what answers the padding is dropped.

    Args:
        batches: a feed's.
    """
    size = batch_size + -batch_size % multiple
    answers: list[tuple[Any, ...]] = []
    for batch in batches(BatchOrder.single_pass(positions, size)):
        limit_pending_steps(answers)
        prepare_step(len(answers), step, params, stats, batch)
        answers.append(step(params, stats, batch))
    return tuple(
        np.concatenate([np.asarray(part)[:size] for part in parts])[: len(positions)]
        for parts in zip(*answers, strict=True)
    )


def accuracy_and_loss(
    probabilities: Float32[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Share of sites whose most probable class is the true one, and their mean cross-entropy (natural, unsmoothed)."""
    of_truth = probabilities[np.arange(len(labels)), labels]
    return float((probabilities.argmax(1) == labels).mean()), float(
        -np.log(np.maximum(of_truth, 1e-30)).mean()
    )
