"""Resident where the dataset fits, streamed where it does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import jax

from perturbjax.data import mask_encodings as masks
from perturbjax.data.batches.decoder import Decoder
from perturbjax.data.batches.protocol import Devices, Feed
from perturbjax.data.batches.resident import ResidentFeed
from perturbjax.data.batches.streamed import StreamedFeed

FeedChoice = Literal["auto", "resident", "streamed"]

#: Share of a device's memory (of the machine's free memory, on a CPU) that resident sites may take.
DEVICE_SHARE, HOST_SHARE = 0.5, 0.4


def open_feed(
    decoder: Decoder, placement: Devices, *, choice: FeedChoice = "auto", workers: int = 0
) -> Feed:
    """The feed of a dataset, to be used in a `with` block; both kinds give the same batches.

    Args:
        decoder: what is fed of each record.
        placement: the devices that are fed.
        choice: auto is resident where the decoded dataset fits (see `DEVICE_SHARE`). Several processes always stream:
            each reads its share.
        workers: processes that decode for the streamed feed; 0 decodes in threads.
    """
    fits = choice == "resident" or (choice == "auto" and resident_bytes(decoder) <= _room())
    if placement.processes == 1 and fits:
        return ResidentFeed.load(decoder, placement)
    return StreamedFeed(decoder, placement, workers=workers)


def resident_bytes(decoder: Decoder) -> int:
    """Bytes that a `ResidentFeed` holds on each device."""
    dataset = decoder.dataset
    height, width = decoder.stored_size
    pixel = len(dataset.channel_names) * dataset.image_dtype.itemsize
    return (
        len(dataset)
        * height
        * width
        * (pixel + masks.storage_dtype(decoder.input.mask_encoding).itemsize)
    )


def _room() -> float:
    device = jax.local_devices()[0]
    if device.platform != "cpu" and (statistics := device.memory_stats()):
        return DEVICE_SHARE * statistics["bytes_limit"]
    return HOST_SHARE * _free_memory()


def _free_memory() -> float:
    """Bytes that can be allocated without swapping; where the system does not tell, half of what is installed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
