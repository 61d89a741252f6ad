"""Whether objects have the size that the weights expect: what does not is cut up or missed, and nothing else tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Integer

#: Share of the objects found whose flow disagrees with their shape, from which the size is in doubt. With weights and
#: diameter that fit few are dropped so; of nuclei of three times the size, half.
DROPPED = 0.3
#: Typical diameters this many times larger or smaller than expected are told of.
FACTOR = 1.6
#: Objects below which nothing is said of their typical size.
ENOUGH = 8


def diameters(labels: Integer[np.ndarray, "h w"]) -> Float[np.ndarray, " objects"]:
    """Of each object that of the disk of the same area, in pixels."""
    areas = np.bincount(labels.ravel())[1:]
    return 2 * np.sqrt(areas[areas > 0] / np.pi)


def doubt_of(
    found: Iterable[tuple[np.ndarray, np.ndarray]], expected: float, flow_threshold: float = 0.4
) -> str:
    """One line where objects do not seem to have the expected diameter, with what to try; else nothing.

    Args:
        found: of each image the flow errors of the objects found, and the diameters of those kept.
        expected: pixels.
        flow_threshold: the error above which objects were dropped.
    """
    found = list(found)
    if not found:
        return ""
    errors, sizes = (np.concatenate(part) for part in zip(*found, strict=True))
    if len(errors) < ENOUGH:
        return ""
    dropped = float((errors > flow_threshold).mean()) if flow_threshold > 0 else 0.0
    typical = float(np.median(sizes)) if len(sizes) else expected
    if dropped > DROPPED:
        suggested = typical if typical > expected * FACTOR else 2 * expected
        return (
            f"{dropped:.0%} of {len(errors)} objects were dropped, for the network contradicts their shape: they may "
            f"be larger than the {expected:.0f} pixels it was told; try --diameter {suggested:.0f}, and look at masks"
        )
    if not expected / FACTOR <= typical <= expected * FACTOR:
        return (
            f"the typical object is {typical:.0f} pixels wide, and the network was told {expected:.0f}; "
            f"try --diameter {max(typical, 2):.0f}, and look at masks"
        )
    return ""


def doubt(
    found: Sequence[tuple[np.ndarray, np.ndarray]], expected: float, flow_threshold: float = 0.4
) -> str:
    """`doubt_of` for pairs of (labels, flow errors)."""
    return doubt_of(
        [(errors, diameters(labels)) for labels, errors in found], expected, flow_threshold
    )
