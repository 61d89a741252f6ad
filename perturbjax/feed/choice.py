"""Resident where the dataset fits, streamed where it does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import jax

from perturbjax import masks
from perturbjax.config import AugmentConfig, InputConfig
from perturbjax.dataset import SiteDataset
from perturbjax.feed.decode import halvings, stored_size

FeedChoice = Literal["auto", "resident", "streamed"]

#: Share of a device's memory (of the machine's free memory, on a CPU) that resident sites may take.
DEVICE_SHARE, HOST_SHARE = 0.5, 0.4


def choose_feed(
    dataset: SiteDataset, input: InputConfig, choice: FeedChoice = "auto", *, augment: AugmentConfig | None = None
) -> FeedChoice:
    """`resident` if the decoded dataset fits the device's memory (see `DEVICE_SHARE`), else `streamed`."""
    if choice != "auto":
        return choice
    return "resident" if resident_bytes(dataset, input, augment) <= _room() else "streamed"


def resident_bytes(dataset: SiteDataset, input: InputConfig, augment: AugmentConfig | None = None) -> int:
    """Bytes that a `ResidentFeed` holds on each device."""
    height, width = stored_size(dataset, halvings(dataset, augment))
    pixel = len(dataset.channel_names) * dataset.image_dtype.itemsize
    return len(dataset) * height * width * (pixel + masks.storage_dtype(input.mask_encoding).itemsize)


def _room() -> float:
    device = jax.local_devices()[0]
    if device.platform != "cpu" and (statistics := device.memory_stats()):
        return DEVICE_SHARE * statistics["bytes_limit"]
    return HOST_SHARE * _free_memory()


def _free_memory() -> float:
    """Bytes that can be allocated without swapping; where the system does not tell, half of what is installed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
