"""Two feeds that give the same batches: sites resident on the device, or streamed from disk with grain.

The order of an epoch follows from (seed, epoch) alone, so a feed's whole state is (epoch, step): going on from there
needs nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Array, Float32, Int, Int32, UInt

from perturbjax import masks
from perturbjax.augment import RawBatch
from perturbjax.config import InputConfig
from perturbjax.console import InputError, track
from perturbjax.dataset import PLATE, SiteDataset

FeedChoice = Literal["auto", "resident", "streamed"]

#: Share of a device's memory (of the machine's free memory, on a CPU) that resident sites may take.
DEVICE_SHARE, HOST_SHARE = 0.5, 0.4
#: Batches kept ready on the device ahead of the step.
AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Sites:
    """All that training needs of a dataset's n records beside their pixels, in record order."""

    class_names: tuple[str, ...]
    """Names in logit order."""
    labels: Int32[np.ndarray, " n"]
    """Index into `class_names`, -1 where the record's class is not among them."""
    shift: Float32[np.ndarray, "n c"]
    """Model input is (image - shift) * scale; both in stored units."""
    scale: Float32[np.ndarray, "n c"]
    mask_of: Int32[np.ndarray, " n"]
    """The record whose mask goes with each image: its own, unless masks are shuffled."""


def describe_sites(
    dataset: SiteDataset, input: InputConfig, class_names: Sequence[str] | None = None, *, seed: int = 0
) -> Sites:
    """Labels and normalisation of every record, from the index alone: no image is decoded.

    `class_names` gives the logit order; None takes the sorted values of the label column. `seed` decides which mask
    each image gets under `mask_use="shuffle"`: one fixed cycle through all records, so that none keeps its own.

    Raises:
        InputError: the label column, or a channel's statistics, are not in the index.
    """
    values = dataset.column(input.label_column or dataset.label_column).astype(str)
    names = tuple(sorted(values.unique())) if class_names is None else tuple(class_names)
    labels = pd.Index(names).get_indexer(values).astype(np.int32)
    shift, scale = _normalization(dataset, input)
    mask_of = np.arange(len(dataset), dtype=np.int32)
    if input.mask_use == "shuffle":
        cycle = np.random.Generator(np.random.Philox(seed)).permutation(mask_of)
        mask_of[cycle] = np.roll(cycle, 1)
    return Sites(names, labels, shift, scale, mask_of)


def _normalization(
    dataset: SiteDataset, input: InputConfig
) -> tuple[Float32[np.ndarray, "n c"], Float32[np.ndarray, "n c"]]:
    shape = (len(dataset), len(dataset.channel_names))
    if input.normalize == "dtype":
        largest = np.iinfo(dataset.image_dtype).max
        return np.zeros(shape, np.float32), np.full(shape, 1 / largest, np.float32)
    mean, std = (
        np.stack([dataset.column(f"{name}_{channel}") for channel in dataset.channel_names], axis=1).astype(float)
        for name in ("mean", "std")
    )
    if input.normalize == "plate":
        mean, std = _pool(mean, std, dataset.column(PLATE))
    # A channel without any contrast (all one value) is only shifted.
    return mean.astype(np.float32), (1 / np.where(std > 0, std, 1)).astype(np.float32)


def _pool(mean: np.ndarray, std: np.ndarray, plate: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of all pixels of a record's plate, from those of its sites (which are equal in size).

    The variance of a plate is the mean of its sites' variances plus the variance of their means.
    """
    plates = plate.to_numpy()
    plate_mean = pd.DataFrame(mean).groupby(plates).transform("mean").to_numpy()
    spread = std**2 + (mean - plate_mean) ** 2
    return plate_mean, np.sqrt(pd.DataFrame(spread).groupby(plates).transform("mean").to_numpy())


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


class ResidentArrays(NamedTuple):
    """Every record of a dataset, on the device. A pytree, to be passed to the jitted epoch."""

    image: UInt[Array, "n h w c"]
    mask: UInt[Array, "n h w"]
    label: Int32[Array, " n"]
    shift: Float32[Array, "n c"]
    scale: Float32[Array, "n c"]


def gather(arrays: ResidentArrays, indices: Int32[Array, " b"], weight: Float32[Array, " b"]) -> RawBatch:
    """A batch of resident sites; pure, for use inside jit. `indices` are positions in the dataset."""
    image, mask, label, shift, scale = (array[indices] for array in arrays)
    return RawBatch(image, mask, label, indices, weight, shift, scale)


class ResidentFeed:
    """The whole dataset on the device, decoded once.

    Attributes:
        arrays: what `gather` takes batches from.
    """

    def __init__(
        self,
        dataset: SiteDataset,
        sites: Sites,
        input: InputConfig,
        *,
        place: Callable[[ResidentArrays], ResidentArrays] = jax.device_put,
    ):
        """Decode everything and hand it to `place`, which puts it on the device (or replicates it over several)."""
        image, mask = _load_all(dataset, sites, input)
        self.arrays: ResidentArrays = place(ResidentArrays(image, mask, sites.labels, sites.shift, sites.scale))

    gather = staticmethod(gather)

    def batches(
        self, indices: Int32[np.ndarray, "steps batch"], weight: Float32[np.ndarray, "steps batch"]
    ) -> Iterator[RawBatch]:
        """The batches of an order, one dispatch each; a whole epoch in one is the training loop's own affair."""
        take = jax.jit(gather)
        for row, row_weight in zip(indices, weight, strict=True):
            yield take(self.arrays, row, row_weight)


def _load_all(
    dataset: SiteDataset, sites: Sites, input: InputConfig
) -> tuple[UInt[np.ndarray, "n h w c"], UInt[np.ndarray, "n h w"]]:
    height, width = dataset.image_size
    n = len(dataset)
    images = np.empty((n, height, width, len(dataset.channel_names)), dataset.image_dtype)
    encoded = np.empty((n, height, width), masks.storage_dtype(input.mask_encoding))

    def load(position: int) -> None:
        record = dataset.record(position)
        images[position] = record["image"]
        encoded[position] = masks.encode(record["mask"], input.mask_encoding)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in track(threads.map(load, range(n)), total=n, label="load", unit="sites"):
            pass
    if input.mask_use == "shuffle":
        encoded = encoded[sites.mask_of]
    return images, encoded


class _Loader:
    """Decodes one place of an order into an unbatched `RawBatch`; what grain's workers are given."""

    def __init__(self, dataset: SiteDataset, sites: Sites, input: InputConfig):
        self.dataset, self.sites, self.input = dataset, sites, input

    def __call__(self, place: tuple[np.int32, np.float32]) -> RawBatch:
        position, weight = place
        record = self.dataset.record(position)
        other = self.sites.mask_of[position]
        mask = record["mask"] if other == position else self.dataset.record(other)["mask"]
        return RawBatch(
            image=record["image"],
            mask=masks.encode(mask, self.input.mask_encoding),
            label=self.sites.labels[position],
            record=np.int32(position),
            weight=weight,
            shift=self.sites.shift[position],
            scale=self.sites.scale[position],
        )


class _Places:
    """The places of an order as grain's random-access source."""

    def __init__(self, indices: np.ndarray, weight: np.ndarray):
        self.indices, self.weight = indices.ravel(), weight.ravel()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> tuple[np.int32, np.float32]:
        return self.indices[at], self.weight[at]


class StreamedFeed:
    """Sites decoded while the device computes."""

    def __init__(
        self,
        dataset: SiteDataset,
        sites: Sites,
        input: InputConfig,
        *,
        records: Int[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        place: Callable[[RawBatch], Any] = jax.device_put,
    ):
        """Nothing is read yet.

        Args:
            records: positions in the dataset that an epoch visits.
            workers: processes that decode; 0 decodes in threads of this one.
            shard: (i, n): yield the i-th of n equal parts of every batch, for process i of n.
            place: puts a batch of host arrays on the device.

        Raises:
            InputError: the batch cannot be dealt to that many processes.
        """
        if batch_size % shard[1]:
            raise InputError(f"--batch-size {batch_size}: is not a multiple of the {shard[1]} processes")
        self._loader = _Loader(dataset, sites, input)
        self._records, self._batch_size, self._seed = records, batch_size, seed
        self._workers, self._shard, self._place = workers, shard, place

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """The batches of an epoch, from a step on: those, and in that order, that a resident feed would give."""
        indices, weight = epoch_order(self._seed, epoch, self._records, self._batch_size)
        return self.batches(indices[start_step:], weight[start_step:])

    def batches(
        self, indices: Int32[np.ndarray, "steps batch"], weight: Float32[np.ndarray, "steps batch"]
    ) -> Iterator[RawBatch]:
        """The batches of any order, on the device, `AHEAD` of them before they are asked for."""
        import grain
        from absl import flags

        part, parts = self._shard
        size = indices.shape[1] // parts
        mine = slice(part * size, (part + 1) * size)
        batches = (
            grain.MapDataset.source(_Places(indices[:, mine], weight[:, mine]))
            .map(self._loader)
            .batch(size)
            .to_iter_dataset(grain.ReadOptions(num_threads=os.cpu_count(), prefetch_buffer_size=2 * AHEAD))
        )
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read their options from absl's flags
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._workers, AHEAD))
        return _ahead(batches, self._place)


def _ahead(batches: Iterable[RawBatch], place: Callable[[RawBatch], Any]) -> Iterator[Any]:
    """Place batches on the device `AHEAD` of their use, so that copying and computing overlap."""
    ready: collections.deque[Any] = collections.deque()
    for batch in batches:
        ready.append(place(batch))
        if len(ready) > AHEAD:
            yield ready.popleft()
    yield from ready


def choose_feed(dataset: SiteDataset, input: InputConfig, choice: FeedChoice = "auto") -> FeedChoice:
    """`resident` if the decoded dataset fits the device's memory (see `DEVICE_SHARE`), else `streamed`."""
    if choice != "auto":
        return choice
    return "resident" if resident_bytes(dataset, input) <= _room() else "streamed"


def resident_bytes(dataset: SiteDataset, input: InputConfig) -> int:
    """Bytes that a `ResidentFeed` holds on each device."""
    height, width = dataset.image_size
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
