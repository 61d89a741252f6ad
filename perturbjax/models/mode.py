"""How a forward pass is run, and what it returns."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a forward pass is run. The default is evaluation.

    Attributes:
        train: batch statistics and dropout instead of running statistics and none.
        weight: (B,) float, 1 for a site and 0 for padding; None counts all.
        keys: (B,) PRNG keys, one a record, for dropout: the mask then depends on the record, not on its place.
        axis_name: the mapped axis over which batch statistics are averaged, under `pmap`.
        dtype: what activations are computed in.
    """

    train: bool = False
    weight: Float[Array, " b"] | None = None
    keys: Array | None = None
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    def frozen(self) -> Mode:
        """The same pass with running statistics and no dropout: for a backbone whose statistics are to stay."""
        return dataclasses.replace(self, train=False)


class Outputs(NamedTuple):
    """What every network returns."""

    logits: Float[Array, "b classes"]
    features: Float[Array, "b d"]
    attention: Float[Array, "b h w"] | None = None
    """By how much the mask let each place of the last feature map through, in (0, 1); None where there is no attention.
    A place is a square of the input: its side over h high."""
