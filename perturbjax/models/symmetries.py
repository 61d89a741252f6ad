"""Symmetries of the square: flips and rotations by multiples of 90 degrees."""

from __future__ import annotations

from jaxtyping import Array, Num


def dihedral(x: Num[Array, "b h w c"], element: int) -> Num[Array, "b h2 w2 c"]:
    """Apply one of the eight symmetries of the square.

    Args:
        x: images.
        element: bit 0 flips rows, bit 1 flips columns, bit 2 transposes; 0 is the identity.
    """
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in (element & 1, element & 2))
    x = x[:, rows, columns]
    return x.swapaxes(1, 2) if element & 4 else x
