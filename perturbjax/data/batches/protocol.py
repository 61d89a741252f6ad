"""What every feed is, and what it must know of the devices it feeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from jax.sharding import Sharding
from jaxtyping import Array, Float32, Int32, UInt

from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.order import Order

T = TypeVar("T")


class ResidentArrays(NamedTuple):
    """Every record of a dataset, on the device. A pytree, to be passed to the jitted epoch."""

    image: UInt[Array, "n h w c"]
    mask: UInt[Array, "n h w"]
    label: Int32[Array, " n"]
    shift: Float32[Array, "n kc"]
    scale: Float32[Array, "n kc"]


@runtime_checkable
class Feed(Protocol):
    """Batches of any order of a dataset's records, on the devices. To be used in a `with` block.

    Attributes:
        arrays: all records, for whoever gathers them inside jit; None where they are not held.
    """

    @property
    def arrays(self) -> ResidentArrays | None: ...

    def batches(self, order: Order) -> Iterator[RawBatch]:
        """The batches of an order, a step each, placed on the devices and padded to a multiple of them."""

    def close(self) -> None:
        """Free what the feed holds; what it gave out cannot be read on."""

    def __enter__(self: T) -> T: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class Devices(Protocol):
    """Which devices a feed's batches are for, and how they are put there (see `training.devices.Placement`)."""

    @property
    def processes(self) -> int: ...

    @property
    def by_row(self) -> Sharding: ...

    def replicate(self, tree: T) -> T:
        """A copy of every array on every device."""

    def place_rows(self, batch: T) -> T:
        """Every array sharded by rows, padded to a multiple of the devices."""
