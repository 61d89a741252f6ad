"""Speed of the batch pipelines, from disk or memory to an augmented batch on the device.

    python -m experiments.bench --only feed --out runs/bench [--quick]

Sites of 128, 270 and 1080 pixels (8 bit, one channel, instance masks) become batches of 128 crops
of 128 pixels by flips, rotation and a random resized crop. Variants: the resident pipeline, the
streamed pipeline (decoding in threads or in two processes), and for comparison PNG files, PIL
transforms and a PyTorch DataLoader with two workers. Epochs of all variants alternate. `sites/s` is
the median, with minimum and maximum; `x PIL` is the median ratio to the PIL epoch of the same
round. `CPU ms` is the CPU time per site of all processes, which other jobs hardly affect.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import psutil
from PIL import Image
from scipy import ndimage

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data.augmentation import RawBatch, prepare
from perturbjax.data.batches import (
    BatchOrder,
    Decoder,
    ResidentBatches,
    StreamedBatches,
    describe_sites,
)
from perturbjax.dataset import PLATE, SITE, WELL, Dataset, SitePixels, open_dataset, write_dataset
from perturbjax.training.devices import choose_placement

AUGMENT, INPUT = AugmentConfig(crop=128), InputConfig()
BATCH, WORKERS = 128, 2
#: Height and width of the stored sites in pixels -> number of sites.
SITES = {128: 512, 270: 512, 1080: 256}
PIL = "PIL, DataLoader, 2 workers"


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure every stored size and variant."""
    rows = []
    for size, n in SITES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows += _measure(Path(folder), size, 256 if quick else n, rounds=1 if quick else 3)
        if quick:
            break
    return rows


def _measure(folder: Path, size: int, n: int, rounds: int) -> list[dict[str, Any]]:
    dataset = _write_sites(folder, size, n)
    decoder, placement = (
        Decoder(dataset, describe_sites(dataset, INPUT), INPUT, AUGMENT),
        choose_placement("1"),
    )
    order = BatchOrder.shuffled_epochs(0, np.arange(n), BATCH, epochs=2 * (rounds + 1))
    steps = order.steps_per_epoch
    resident = ResidentBatches.load(decoder, placement)
    step = jax.jit(functools.partial(prepare, seed=0, augment=AUGMENT, input=INPUT, train=True))

    def augmented(batches: Iterator[RawBatch], epoch: int) -> None:
        for batch in batches:
            jax.block_until_ready(step(batch, epoch=epoch))

    def pil(epoch: int) -> tuple[float, float]:
        return _timed(lambda: [None for _ in loader])

    def from_memory(epoch: int) -> tuple[float, float]:
        one = order.select_steps(epoch * steps, (epoch + 1) * steps)
        return _timed(lambda: augmented(resident.batches(one), epoch))

    def streamed(workers: int, epoch: int) -> tuple[float, float]:
        with StreamedBatches(decoder, placement, workers=workers) as feed:
            batches = feed.batches(order.select_steps(2 * epoch * steps, (2 * epoch + 2) * steps))
            for _ in itertools.islice(batches, steps):  # start the threads that read ahead
                pass
            return _timed(lambda: augmented(batches, epoch))

    loader = _pil_loader(folder, n)
    ways = {
        PIL: pil,
        "resident": from_memory,
        "streamed, threads": functools.partial(streamed, 0),
        "streamed, 2 workers": functools.partial(streamed, WORKERS),
    }
    # The first round compiles programs and starts processes, so it is not counted.
    measured = [{way: turn(epoch) for way, turn in ways.items()} for epoch in range(rounds + 1)][1:]
    return [_row(size, n, way, measured) for way in ways]


def _timed(run_epoch: Callable[[], object]) -> tuple[float, float]:
    """Return seconds of wall time, and of CPU time of all processes."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run_epoch()
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def _row(
    size: int, n: int, way: str, measured: list[dict[str, tuple[float, float]]]
) -> dict[str, Any]:
    walls = [epoch[way][0] for epoch in measured]
    return {
        "stored": f"{size}²",
        "pipeline": way,
        "sites/s": n / statistics.median(walls),
        "minimum": n / max(walls),
        "maximum": n / min(walls),
        "x PIL": statistics.median(epoch[PIL][0] / epoch[way][0] for epoch in measured),
        "CPU ms": 1000 * statistics.median(epoch[way][1] for epoch in measured) / n,
        "x CPU of PIL": statistics.median(epoch[PIL][1] / epoch[way][1] for epoch in measured),
    }


def _write_sites(folder: Path, size: int, n: int) -> Dataset:
    """Write the same sites as a dataset and as PNG files.

    Sites are windows of one field of blurred noise; its peaks are the cells.
    """
    random = np.random.default_rng(0)
    field = ndimage.gaussian_filter(random.normal(size=(size + 256, size + 256)), 6)
    cells = ndimage.label(field > np.quantile(field, 0.7))[0].astype(np.uint16)
    field = 100 + 40 * field / field.std() + random.normal(0, 4, field.shape)
    field = field.clip(0, 255).astype(np.uint8)
    corners = random.integers(0, 256, (n, 2))
    (folder / "png").mkdir()

    def sites() -> Iterator[SitePixels]:
        for number, (top, left) in enumerate(corners):
            window = slice(top, top + size), slice(left, left + size)
            Image.fromarray(field[window]).save(folder / "png" / f"{number}_image.png")
            Image.fromarray(cells[window]).save(folder / "png" / f"{number}_mask.png")
            yield SitePixels(field[window][..., None], cells[window])

    names = [str(number) for number in range(n)]
    table = pd.DataFrame(
        {"site_id": names, PLATE: "P", WELL: "A01", SITE: names, "Metadata_pert_iname": "x"}
    )
    path = write_dataset(
        folder / "dataset",
        table,
        sites(),
        channel_names=["x"],
        image_dtype=np.uint8,
        label_column="Metadata_pert_iname",
        pixel_bytes=3 * n * size**2,
    )
    return open_dataset(path)


class _PilSites:
    """Image and mask from PNG files, transformed one by one on the host."""

    def __init__(self, folder: Path, n: int):
        self.folder, self.n = folder, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> tuple[Any, int]:
        import torch

        image, mask = (
            Image.open(self.folder / "png" / f"{number}_{kind}.png") for kind in ("image", "mask")
        )
        random = np.random.default_rng()
        for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
            if random.random() < 0.5:
                image, mask = image.transpose(flip), mask.transpose(flip)
        angle = random.uniform(-AUGMENT.rotate, AUGMENT.rotate)
        image = image.rotate(angle, Image.Resampling.BILINEAR)
        mask = mask.rotate(angle, Image.Resampling.NEAREST)
        box = _random_box(random, *image.size)
        side = (AUGMENT.crop, AUGMENT.crop)
        image = image.resize(side, Image.Resampling.BILINEAR, box=box)
        mask = mask.resize(side, Image.Resampling.NEAREST, box=box)
        pixels = np.stack([np.asarray(mask) > 0, np.asarray(image, np.float32) / 255]).astype(
            np.float32
        )
        return torch.from_numpy(pixels), 0


def _random_box(
    random: np.random.Generator, width: int, height: int
) -> tuple[float, float, float, float]:
    area = width * height * random.uniform(*AUGMENT.crop_scale)
    ratio = math.exp(random.uniform(*map(math.log, AUGMENT.crop_ratio)))
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    return left, top, left + w, top + h


def _pil_loader(folder: Path, n: int) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        _PilSites(folder, n),
        batch_size=BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="spawn",  # JAX starts threads, so forking is not safe
    )
