"""Batches that grain decodes in threads or processes while the device computes."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import jax

from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.order import BatchOrder
from perturbjax.data.batches.protocol import Devices

#: Number of batches that are copied to the device in advance.
PREFETCHED_BATCHES = 2
#: Maximum number of decoding threads. Each holds one batch in memory, and more threads block each
#: other.
MAX_THREADS = 4


class StreamedBatches:
    """A `BatchPipeline` that decodes each batch when it is needed."""

    arrays = None

    def __init__(self, decoder: Decoder, placement: Devices, *, workers: int = 0):
        """
        Args:
            decoder: reads records.
            placement: devices that receive the batches.
            workers: number of decoding processes for orders over several epochs; they live through
                all epochs. 0, and all orders within one epoch, decode in threads, because starting
                processes takes longer.
        """
        self._decoder, self._placement, self._workers = decoder, placement, workers
        self._readers: list[Any] = []

    def batches(self, order: BatchOrder) -> Iterator[RawBatch]:
        """Yield the batches of an order.

        `PREFETCHED_BATCHES` are copied to the device in advance.
        """
        # Each process decodes only its part of every batch.
        order = order.for_process(jax.process_index(), self._placement.processes)
        reader = self._start_reader(order)
        self._readers.append(reader)
        prefetched: collections.deque[RawBatch] = collections.deque()
        try:
            for batch in reader:
                # The copy is asynchronous and overlaps with the computation of earlier batches.
                prefetched.append(self._placement.place_rows(batch))
                if len(prefetched) > PREFETCHED_BATCHES:
                    yield prefetched.popleft()
            yield from prefetched
        finally:
            # Also reached if the caller stops before the end of the order.
            self._stop_reader(reader)

    def close(self) -> None:
        """Stop the workers of all orders that were not read to their end."""
        for reader in tuple(self._readers):
            self._stop_reader(reader)

    def __enter__(self) -> StreamedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_reader(self, order: BatchOrder) -> Any:
        import grain
        from absl import flags

        workers = self._workers if len(order.steps_by_epoch()) > 1 else 0
        # Each element is a whole batch: with single records, each worker would end with an
        # incomplete batch.
        batches = grain.MapDataset.source(order).map(self._decoder)
        # With worker processes, parallel decoding comes from the processes instead of threads.
        threads = 1 if workers else min(os.cpu_count() or 1, MAX_THREADS)
        stream = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # grain workers read absl flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, PREFETCHED_BATCHES))
        return iter(stream)

    def _stop_reader(self, reader: Any) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            reader.close()
