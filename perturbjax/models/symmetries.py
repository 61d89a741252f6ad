"""The symmetries of the square: views of an image that show the same cells."""

from __future__ import annotations

from jaxtyping import Array, Num


def dihedral(x: Num[Array, "b h w c"], element: int) -> Num[Array, "b h2 w2 c"]:
    """One of the eight symmetries of the square, by number: 0 none, 1 to 3 turn or mirror, 4 to 7 transpose too."""
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in (element & 1, element & 2))
    x = x[:, rows, columns]
    return x.swapaxes(1, 2) if element & 4 else x
