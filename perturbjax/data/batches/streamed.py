"""Sites decoded by grain while the device computes."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import jax

from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.order import Order
from perturbjax.data.batches.protocol import Devices

#: Batches kept ready on the device ahead of the step.
AHEAD = 2
#: Threads that decode where no worker processes do; each holds a batch, and more of them wait for each other.
MOST_THREADS = 4


class StreamedFeed:
    """Sites decoded while the device computes."""

    arrays = None

    def __init__(self, decoder: Decoder, placement: Devices, *, workers: int = 0):
        """Nothing is read yet.

        Args:
            workers: processes that decode an order of several epochs, and live through them all. A single pass is
                decoded in threads of this process, as with 0: starting processes takes longer than most of those.
        """
        self._decoder, self._placement, self._workers = decoder, placement, workers
        self._readers: list[Any] = []

    def batches(self, order: Order) -> Iterator[RawBatch]:
        """The batches of an order: those, and in that order, that a resident feed would give.

        They are placed on the device `AHEAD` batches before they are asked for, over the ends of epochs too.
        """
        order = order.share(jax.process_index(), self._placement.processes)
        reader = self._read(order)
        self._readers.append(reader)
        ready: collections.deque[RawBatch] = collections.deque()
        try:
            for batch in reader:
                ready.append(self._placement.place_rows(batch))
                if len(ready) > AHEAD:
                    yield ready.popleft()
            yield from ready
        finally:
            self._end(reader)

    def close(self) -> None:
        """End the workers of every order that was not read to its end."""
        for reader in tuple(self._readers):
            self._end(reader)

    def __enter__(self) -> StreamedFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, order: Order) -> Any:
        import grain
        from absl import flags

        workers = self._workers if len(order.epochs()) > 1 else 0
        # Every element is a whole batch already: prefetched record by record, each worker would leave a tail.
        batches = grain.MapDataset.source(order).map(self._decoder)
        threads = 1 if workers else min(os.cpu_count() or 1, MOST_THREADS)
        stream = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # grain's workers take their options from absl's flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, AHEAD))
        return iter(stream)

    def _end(self, reader: Any) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            reader.close()
