"""Choice of the batch pipeline: resident if the dataset fits in memory, else streamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import jax

from perturbjax.data import mask_encodings as masks
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.protocol import BatchPipeline, Devices
from perturbjax.data.batches.resident import ResidentBatches
from perturbjax.data.batches.streamed import StreamedBatches

PipelineChoice = Literal["auto", "resident", "streamed"]

#: Maximum fraction of device memory (on CPUs: of free memory) for resident sites.
DEVICE_FRACTION, HOST_FRACTION = 0.5, 0.4


def open_batches(
    decoder: Decoder, placement: Devices, *, choice: PipelineChoice = "auto", workers: int = 0
) -> BatchPipeline:
    """Open the batch pipeline of a dataset, for use in a `with` block. Both kinds give the same
    batches.

    Args:
        decoder: reads records.
        placement: devices that receive the batches.
        choice: "resident", "streamed" or "auto": resident if the decoded dataset fits in
            `DEVICE_FRACTION` of the device memory. Several processes always stream, and each reads
            its part of every batch.
        workers: number of decoding processes if streamed; 0 decodes in threads.
    """
    resident = choice == "resident" or (
        choice == "auto" and resident_bytes(decoder) <= _memory_limit()
    )
    if placement.processes == 1 and resident:
        return ResidentBatches.load(decoder, placement)
    return StreamedBatches(decoder, placement, workers=workers)


def resident_bytes(decoder: Decoder) -> int:
    """Return the bytes of device memory that `ResidentBatches` needs."""
    dataset = decoder.dataset
    height, width = decoder.stored_size
    # Bytes of one pixel: all channels and the encoded mask.
    pixel = len(dataset.channel_names) * dataset.image_dtype.itemsize
    pixel += masks.storage_dtype(decoder.input.mask_encoding).itemsize
    return len(dataset) * height * width * pixel


def _memory_limit() -> float:
    device = jax.local_devices()[0]
    # On a CPU, resident sites share the memory of the system with the network and other programs.
    if device.platform != "cpu" and (statistics := device.memory_stats()):
        return DEVICE_FRACTION * statistics["bytes_limit"]
    return HOST_FRACTION * _free_memory()


def _free_memory() -> float:
    """Return the bytes available without swapping, or half of the installed memory if that is
    unknown.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            # The file gives kibibytes.
            1024.0 * int(line.split()[1])
            for line in lines
            if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
