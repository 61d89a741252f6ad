"""Interfaces between batch pipelines, their users, and the devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from jax.sharding import Sharding
from jaxtyping import Array, Float32, Int32, UInt

from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.order import BatchOrder

T = TypeVar("T")


class ResidentArrays(NamedTuple):
    """All n records of a dataset on the device: a pytree, passed to the jitted epoch."""

    image: UInt[Array, "n h w c"]
    mask: UInt[Array, "n h w"]
    label: Int32[Array, " n"]
    shift: Float32[Array, "n kc"]
    scale: Float32[Array, "n kc"]


@runtime_checkable
class BatchPipeline(Protocol):
    """Batches of a dataset on the devices, for any `BatchOrder`. Use it in a `with` block.

    Attributes:
        arrays: all records on the device, for gathering inside jit; None if the pipeline streams.
    """

    @property
    def arrays(self) -> ResidentArrays | None: ...

    def batches(self, order: BatchOrder) -> Iterator[RawBatch]:
        """Yield one batch for each step, on the devices, padded to a multiple of the number of
        devices.
        """

    def close(self) -> None:
        """Release memory and workers. Batches cannot be read afterwards."""

    def __enter__(self: T) -> T: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class Devices(Protocol):
    """Devices that receive batches (see `training.devices.Placement`)."""

    @property
    def processes(self) -> int: ...

    @property
    def by_row(self) -> Sharding: ...

    def replicate(self, tree: T) -> T:
        """Copy all arrays to all devices."""

    def place_rows(self, batch: T) -> T:
        """Shard all arrays by rows, padded to a multiple of the number of devices."""
