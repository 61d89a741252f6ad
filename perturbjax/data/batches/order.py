"""Which records make up each step, of one epoch or of many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32


class Rows(NamedTuple):
    """The records of one step (b,), or of consecutive steps (steps, b)."""

    positions: Int32[np.ndarray, "*steps b"]
    """In the dataset."""
    weight: Float32[np.ndarray, "*steps b"]
    """1 for a site, 0 for padding."""


def epoch_order(
    seed: int, epoch: int, records: Int[np.ndarray, " n"], batch_size: int, steps: int = 0
) -> Rows:
    """The records of every step of an epoch, shuffled by (seed, epoch), and their weights.

    The last batch is filled up with records of the epoch's beginning, at weight 0. With `steps` there are so many
    steps and no padding: records are shuffled again for as long as it takes, and the rest of the last pass is left out.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    if not steps:
        return fixed_order(random.permutation(np.asarray(records)), batch_size)
    passes = -(-steps * batch_size // len(records))
    shuffled = np.concatenate([random.permutation(np.asarray(records)) for _ in range(passes)])
    return fixed_order(shuffled[: steps * batch_size], batch_size)


def fixed_order(records: Int[np.ndarray, " n"], batch_size: int) -> Rows:
    """As `epoch_order`, in the order given: for evaluation."""
    steps = -(-len(records) // batch_size)
    indices = np.resize(np.asarray(records, np.int32), (steps, batch_size))
    weight = (np.arange(steps * batch_size) < len(records)).astype(np.float32)
    return Rows(indices, weight.reshape(steps, batch_size))


class Order:
    """A stretch of steps, possibly over many epochs, of which each is dealt when it is reached.

    Steps are counted from the first epoch's first; `len(order)` of them are in the stretch, and `order[i]` is its
    i-th. It is what a feed is given, and it can be pickled for a feed's workers.
    """

    def __init__(self, rows_of: Callable[[int], Rows], steps_per_epoch: int, first: int, stop: int):
        """`rows_of(epoch)` gives an epoch's rows (steps, b); the stretch goes from step `first` to before `stop`."""
        self.rows_of, self.steps_per_epoch, self.first, self.stop = (
            rows_of,
            steps_per_epoch,
            first,
            stop,
        )
        self._recent: dict[int, Rows] = {}

    @classmethod
    def of_epochs(
        cls, seed: int, records: Int[np.ndarray, " n"], batch_size: int, epochs: int, steps: int = 0
    ) -> Order:
        """Training's order: every epoch shuffled by (seed, epoch), see `epoch_order`."""
        deal = functools.partial(
            _shuffled, seed=seed, records=np.asarray(records), batch_size=batch_size, steps=steps
        )
        in_epoch = steps or -(-len(records) // batch_size)
        return cls(deal, in_epoch, 0, epochs * in_epoch)

    @classmethod
    def once(cls, records: Int[np.ndarray, " n"], batch_size: int) -> Order:
        """Evaluation's order: every record once, as given, see `fixed_order`."""
        rows = fixed_order(records, batch_size)
        return cls(functools.partial(_always, rows=rows), len(rows.weight), 0, len(rows.weight))

    def between(self, first: int, stop: int) -> Order:
        """The steps from `first` to before `stop`, both counted from the first epoch's first."""
        return Order(self.rows_of, self.steps_per_epoch, first, stop)

    def share(self, part: int, parts: int) -> Order:
        """The part of every batch that one of several processes feeds to its devices."""
        if parts == 1:
            return self
        rows_of = functools.partial(_share, rows_of=self.rows_of, part=part, parts=parts)
        return Order(rows_of, self.steps_per_epoch, self.first, self.stop)

    def epochs(self) -> list[range]:
        """The steps of the stretch, epoch by epoch; the first and the last may be parts of epochs."""
        n = self.steps_per_epoch
        starts = (
            [self.first, *range((self.first // n + 1) * n, self.stop, n)]
            if self.first < self.stop
            else []
        )
        return [range(start, min((start // n + 1) * n, self.stop)) for start in starts]

    def rows(self, steps: range) -> Rows:
        """The rows of consecutive steps of one epoch."""
        begin = steps.start - steps.start % self.steps_per_epoch
        rows = self._epoch(steps.start // self.steps_per_epoch)
        return Rows(*(part[steps.start - begin : steps.stop - begin] for part in rows))

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, at: int) -> Rows:
        epoch, step = divmod(self.first + at, self.steps_per_epoch)
        return Rows(*(part[step] for part in self._epoch(epoch)))

    def _epoch(self, epoch: int) -> Rows:
        known = self._recent.get(epoch)
        if known is None:
            known = self.rows_of(epoch)
            # Readers on both sides of an epoch's end need two epochs; older ones may go.
            self._recent = {e: rows for e, rows in self._recent.items() if e >= epoch - 1} | {
                epoch: known
            }
        return known


def _shuffled(epoch: int, *, seed: int, records: np.ndarray, batch_size: int, steps: int) -> Rows:
    return epoch_order(seed, epoch, records, batch_size, steps)


def _always(epoch: int, *, rows: Rows) -> Rows:
    return rows


def _share(epoch: int, *, rows_of: Callable[[int], Rows], part: int, parts: int) -> Rows:
    return Rows(*(np.split(rows, parts, axis=1)[part] for rows in rows_of(epoch)))
