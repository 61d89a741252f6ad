"""Options of a forward pass, and its outputs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Mode:
    """Options of a forward pass. The default is evaluation.

    Attributes:
        train: use batch statistics and dropout instead of running statistics and no dropout.
        weight: (B,) float, 1 for a site and 0 for padding; None counts all rows.
        keys: (B,) PRNG keys for dropout, one per record. The dropout mask of a record thus does
            not depend on its position in the batch.
        axis_name: mapped axis over which batch statistics are averaged, under `pmap`.
        dtype: dtype of activations.
        use_onednn: compute a frozen EfficientNet with oneDNN on CPUs, if it is installed. There are
            no gradients then, the program cannot be exported, and results differ by rounding.
    """

    train: bool = False
    weight: Float[Array, " b"] | None = None
    keys: Array | None = None
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32
    use_onednn: bool = False

    def frozen(self) -> Mode:
        """Return a copy with running statistics and without dropout, for a frozen backbone."""
        # Evaluation mode uses the running statistics, does not update them, and has no dropout.
        return dataclasses.replace(self, train=False)


class Outputs(NamedTuple):
    """Outputs of every network."""

    logits: Float[Array, "b classes"]
    features: Float[Array, "b d"]
    attention: Float[Array, "b h w"] | None = None
    """Attention map in (0, 1) at the positions of the last feature map, None without attention.
    A position covers a square of input height / h pixels."""
    cell_attention: Float[Array, "b n"] | None = None
    """Weight of each cell of a bag, see `models.bags`; None for networks on whole sites."""
