"""Which records make up each step."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int, Int32


def epoch_order(
    seed: int, epoch: int, records: Int[np.ndarray, " n"], batch_size: int
) -> tuple[Int32[np.ndarray, "steps batch"], Float32[np.ndarray, "steps batch"]]:
    """The records of every step of an epoch, shuffled by (seed, epoch), and their weights.

    The last batch is filled up with records of the epoch's beginning, at weight 0.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return fixed_order(random.permutation(np.asarray(records)), batch_size)


def fixed_order(
    records: Int[np.ndarray, " n"], batch_size: int
) -> tuple[Int32[np.ndarray, "steps batch"], Float32[np.ndarray, "steps batch"]]:
    """As `epoch_order`, in the order given: for evaluation."""
    steps = -(-len(records) // batch_size)
    indices = np.resize(np.asarray(records, np.int32), (steps, batch_size))
    weight = (np.arange(steps * batch_size) < len(records)).astype(np.float32)
    return indices, weight.reshape(steps, batch_size)


def share(rows: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
    """The part of every batch that one of several processes feeds to its devices."""
    part, parts = shard
    return np.split(rows, parts, axis=1)[part]
