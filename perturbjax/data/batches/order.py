"""Records of each training or inference step.

Training shuffles the records of an epoch with a random generator that is seeded by (seed, epoch).
An order is therefore a function of the step number: it needs no state, and can start at any step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32


class BatchRecords(NamedTuple):
    """Records of one step, shape (b,), or of consecutive steps, shape (steps, b)."""

    positions: Int32[np.ndarray, "*steps b"]
    """Positions in the dataset."""
    weight: Float32[np.ndarray, "*steps b"]
    """1 for a site, 0 for padding."""


def shuffle_epoch(
    seed: int, epoch: int, records: Int[np.ndarray, " n"], batch_size: int, steps: int = 0
) -> BatchRecords:
    """Shuffle the records of one epoch into batches.

    Args:
        seed, epoch: seed of the random generator.
        records: (n,) positions in the dataset.
        batch_size: sites in each step.
        steps: number of steps. The records are shuffled repeatedly if one pass has fewer steps, and
            the rest of the last pass is dropped, so that no batch is padded. 0 takes one pass; the
            last batch is padded with records of the first batch at weight 0.

    Returns:
        Positions and weights, (steps, batch_size).
    """
    # SeedSequence mixes both numbers, so that consecutive epochs and seeds are independent.
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    # One pass over the records, with a padded last batch.
    if not steps:
        return split_into_batches(random.permutation(np.asarray(records)), batch_size)
    # Rounded up.
    passes = -(-steps * batch_size // len(records))
    shuffled = np.concatenate([random.permutation(np.asarray(records)) for _ in range(passes)])
    return split_into_batches(shuffled[: steps * batch_size], batch_size)


def split_into_batches(records: Int[np.ndarray, " n"], batch_size: int) -> BatchRecords:
    """Split records into batches in their order; the last batch is padded with the first records at
    weight 0.
    """
    steps = -(-len(records) // batch_size)
    # `np.resize` fills the last batch with records from the start of the list.
    positions = np.resize(np.asarray(records, np.int32), (steps, batch_size))
    weight = (np.arange(steps * batch_size) < len(records)).astype(np.float32)
    return BatchRecords(positions, weight.reshape(steps, batch_size))


class BatchOrder:
    """A range of steps, over one or more epochs; an epoch is shuffled when its first step is read.

    `len(order)` is the number of steps and `order[i]` gives the records of the i-th. Steps are
    numbered from the first step of epoch 0. An order can be pickled, for worker processes.
    """

    def __init__(
        self,
        epoch_records: Callable[[int], BatchRecords],
        steps_per_epoch: int,
        start: int,
        stop: int,
    ):
        """
        Args:
            epoch_records: epoch -> records of its steps, (steps, b).
            steps_per_epoch: number of steps of each epoch.
            start, stop: first step, and the step after the last.
        """
        self.epoch_records, self.steps_per_epoch = epoch_records, steps_per_epoch
        self.start, self.stop = start, stop
        self._cache: dict[int, BatchRecords] = {}

    @classmethod
    def shuffled_epochs(
        cls, seed: int, records: Int[np.ndarray, " n"], batch_size: int, epochs: int, steps: int = 0
    ) -> BatchOrder:
        """Create the order of training: `shuffle_epoch` for each epoch."""
        records = np.asarray(records)
        shuffle = functools.partial(
            _shuffle, seed=seed, records=records, batch_size=batch_size, steps=steps
        )
        steps_per_epoch = steps or -(-len(records) // batch_size)
        return cls(shuffle, steps_per_epoch, 0, epochs * steps_per_epoch)

    @classmethod
    def single_pass(cls, records: Int[np.ndarray, " n"], batch_size: int) -> BatchOrder:
        """Create the order of evaluation: each record once, in the given order."""
        batches = split_into_batches(records, batch_size)
        steps = len(batches.weight)
        return cls(functools.partial(_constant, batches=batches), steps, 0, steps)

    def select_steps(self, start: int, stop: int) -> BatchOrder:
        """Return the order of the steps from `start` to before `stop`, numbered from epoch 0."""
        return BatchOrder(self.epoch_records, self.steps_per_epoch, start, stop)

    def for_process(self, index: int, count: int) -> BatchOrder:
        """Return the order of one of `count` processes, which each load an equal part of every
        batch.
        """
        if count == 1:
            return self
        part = functools.partial(
            _partition, epoch_records=self.epoch_records, index=index, count=count
        )
        return BatchOrder(part, self.steps_per_epoch, self.start, self.stop)

    def steps_by_epoch(self) -> list[range]:
        """Return the step numbers of each epoch; the first and last epoch can be incomplete."""
        n = self.steps_per_epoch
        if self.start >= self.stop:
            return []
        # The first step of the range, then the first step of each following epoch.
        starts = [self.start, *range((self.start // n + 1) * n, self.stop, n)]
        return [range(start, min((start // n + 1) * n, self.stop)) for start in starts]

    def records_of(self, steps: range) -> BatchRecords:
        """Return the records of consecutive steps of one epoch, (steps, b)."""
        epoch = steps.start // self.steps_per_epoch
        # Global number of the first step of the epoch.
        first = epoch * self.steps_per_epoch
        return BatchRecords(
            *(part[steps.start - first : steps.stop - first] for part in self._epoch(epoch))
        )

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> BatchRecords:
        epoch, step = divmod(self.start + i, self.steps_per_epoch)
        return BatchRecords(*(part[step] for part in self._epoch(epoch)))

    def _epoch(self, epoch: int) -> BatchRecords:
        records = self._cache.get(epoch)
        if records is None:
            records = self.epoch_records(epoch)
            # Threads that read ahead need two epochs at a time; earlier ones are dropped.
            recent = {e: batches for e, batches in self._cache.items() if e >= epoch - 1}
            self._cache = recent | {epoch: records}
        return records


# Module-level functions, since orders are pickled.


def _shuffle(
    epoch: int, *, seed: int, records: np.ndarray, batch_size: int, steps: int
) -> BatchRecords:
    return shuffle_epoch(seed, epoch, records, batch_size, steps)


def _constant(epoch: int, *, batches: BatchRecords) -> BatchRecords:
    return batches


def _partition(
    epoch: int, *, epoch_records: Callable[[int], BatchRecords], index: int, count: int
) -> BatchRecords:
    # (steps, b) is split along the batch axis.
    return BatchRecords(*(np.split(part, count, axis=1)[index] for part in epoch_records(epoch)))
