"""Sites decoded by grain while the device computes."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int, Int32

from perturbjax.augment import RawBatch
from perturbjax.config import AugmentConfig, InputConfig
from perturbjax.console import InputError
from perturbjax.dataset import SiteDataset
from perturbjax.feed.decode import Decoder
from perturbjax.feed.order import epoch_order, share
from perturbjax.feed.sites import Sites

#: Batches kept ready on the device ahead of the step.
AHEAD = 2
#: Threads that decode where no worker processes do; each holds a batch, and more of them wait for each other.
MOST_THREADS = 4


Order = tuple[Int32[np.ndarray, "steps b"], Float32[np.ndarray, "steps b"]]


class _Steps:
    """The positions and weights of every step of an order, as grain's random-access source."""

    def __init__(self, order: Order):
        self.order = order

    def __len__(self) -> int:
        return len(self.order[0])

    def __getitem__(self, step: int) -> tuple[Int32[np.ndarray, " b"], Float32[np.ndarray, " b"]]:
        indices, weight = self.order
        return indices[step], weight[step]


class _AllSteps:
    """As `_Steps`, for every epoch from (epoch, step) on, so that workers live through them all."""

    def __init__(self, order_of: Callable[[int], Order], epoch: int, step: int):
        self.order_of, self.epoch, self.step = order_of, epoch, step
        self.steps = len(order_of(epoch)[0])
        self.recent: dict[int, _Steps] = {}

    def __len__(self) -> int:
        return 2**40  # grain wants an end; no training reaches this one

    def __getitem__(self, at: int) -> tuple[Int32[np.ndarray, " b"], Float32[np.ndarray, " b"]]:
        passed, step = divmod(at + self.step, self.steps)
        known = self.recent.get(passed)
        if known is None:
            known = _Steps(self.order_of(self.epoch + passed))
            # Readers on both sides of an epoch's end need two orders; older ones may go.
            self.recent = {e: steps for e, steps in self.recent.items() if e >= passed - 1} | {passed: known}
        return known[step]


class StreamedFeed:
    """Sites decoded while the device computes. To be closed when done with, or used in a `with` block."""

    def __init__(
        self,
        dataset: SiteDataset,
        sites: Sites,
        input: InputConfig,
        *,
        records: Int[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        augment: AugmentConfig | None = None,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        place: Callable[[RawBatch], Any] = jax.device_put,
    ):
        """Nothing is read yet.

        Args:
            records: positions in the dataset that an epoch visits.
            augment: as for `ResidentFeed`.
            workers: processes that decode for `epoch`; 0 decodes in threads of this one.
            shard: (i, n): yield the i-th of n equal parts of every batch, for process i of n.
            place: puts a batch of host arrays on the device.

        Raises:
            InputError: the batch cannot be dealt to that many processes.
        """
        if batch_size % shard[1]:
            raise InputError(f"--batch-size {batch_size}: is not a multiple of the {shard[1]} processes")
        self._decoder = Decoder(dataset, sites, input, augment)
        self._order = functools.partial(
            _epoch_share, seed=seed, records=np.asarray(records), batch_size=batch_size, shard=shard
        )
        self._shard, self._workers, self._place = shard, workers, place
        self._running: Any = None
        self._next: tuple[int, int] | None = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """The batches of an epoch, from a step on: those, and in that order, that a resident feed would give.

        Reading goes on into the next epoch, and asking for that one finds it under way.
        """
        steps = len(self._order(epoch)[0])
        if self._next != (epoch, start_step):
            self.close()
            self._running = self._read(_AllSteps(self._order, epoch, start_step), self._workers)
        for step in range(start_step, steps):
            batch = next(self._running)
            self._next = (epoch, step + 1) if step + 1 < steps else (epoch + 1, 0)
            yield batch

    def batches(
        self, indices: Int32[np.ndarray, "steps batch"], weight: Float32[np.ndarray, "steps batch"]
    ) -> Iterator[RawBatch]:
        """The batches of any order, decoded in threads: starting processes takes longer than most evaluations."""
        order = share(indices, self._shard), share(weight, self._shard)
        yield from self._read(_Steps(order), workers=0)

    def close(self) -> None:
        """End the workers."""
        if self._running is not None:
            self._running.close()
        self._running = self._next = None

    def __enter__(self) -> StreamedFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, steps: _Steps | _AllSteps, workers: int) -> Iterator[RawBatch]:
        """Decode and place on the device, `AHEAD` batches before they are asked for."""
        import grain
        from absl import flags

        # Every element is a whole batch already: prefetched record by record, each worker would leave a tail.
        batches = grain.MapDataset.source(steps).map(self._decoder)
        threads = 1 if workers else min(os.cpu_count() or 1, MOST_THREADS)
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if workers:
            if not flags.FLAGS.is_parsed():  # grain's workers take their options from absl's flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, AHEAD))
        reader = iter(stream)
        ready: collections.deque[RawBatch] = collections.deque()
        try:
            for batch in reader:
                ready.append(self._place(batch))
                if len(ready) > AHEAD:
                    yield ready.popleft()
            yield from ready
        finally:
            reader.close()


def _epoch_share(epoch: int, *, seed: int, records: np.ndarray, batch_size: int, shard: tuple[int, int]) -> Order:
    indices, weight = epoch_order(seed, epoch, records, batch_size)
    return share(indices, shard), share(weight, shard)
