"""Applying a network to sites: never augmented, no tail dropped, order kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from perturbjax.feed import ResidentFeed, StreamedFeed, fixed_order
from perturbjax.training.step import PredictStep


class Predictions(NamedTuple):
    """A network's answers, in the order of the positions asked for."""

    probabilities: Float32[np.ndarray, "n classes"]
    features: Float32[np.ndarray, "n d"]


def predict_sites(
    predict_step: PredictStep,
    params: Any,
    stats: Any,
    feed: ResidentFeed | StreamedFeed,
    positions: Int[np.ndarray, " n"],
    batch_size: int,
    *,
    multiple: int = 1,
) -> Predictions:
    """Probabilities and features of the records at `positions`.

    Batches are rounded up to a `multiple`, so that each of several processes has an equal share. The last batch is
    padded to the size of the others, so that one compiled step serves, and the padding dropped.
    """
    size = min(batch_size, len(positions))
    order, weight = fixed_order(np.asarray(positions), size + -size % multiple)
    # Answers are fetched when all batches are under way: the device never waits for the host.
    answers = [predict_step(params, stats, batch) for batch in feed.batches(order, weight)]
    probabilities, features = (
        np.concatenate([np.asarray(answer[part])[: order.shape[1]] for answer in answers])[: len(positions)]
        for part in (0, 1)
    )
    return Predictions(probabilities, features)


def accuracy_and_loss(
    probabilities: Float32[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Share of sites whose most probable class is the true one, and their mean cross-entropy (natural, unsmoothed)."""
    of_truth = probabilities[np.arange(len(labels)), labels]
    return float((probabilities.argmax(1) == labels).mean()), float(-np.log(np.maximum(of_truth, 1e-30)).mean())
