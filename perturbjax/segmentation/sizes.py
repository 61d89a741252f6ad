"""Whether objects have the size that the weights expect: what does not is cut up or missed, and nothing else tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perturbjax.segmentation.dynamics import Objects

#: Share of the objects found whose flow disagrees with their shape, from which the size is in doubt. With weights and
#: diameter that fit, 3 to 12 % are dropped so; on nuclei of three times the size, half.
DROPPED = 0.3
#: Typical diameters this many times larger or smaller than expected are told of.
FACTOR = 1.6
#: Objects below which nothing is said of their typical size.
ENOUGH = 8


def diameters(labels: np.ndarray) -> np.ndarray:
    """Of each object that of the disk of the same area, in pixels."""
    areas = np.bincount(labels.ravel())[1:]
    return 2 * np.sqrt(areas[areas > 0] / np.pi)


def doubt(found: Sequence[Objects], expected: float, flow_threshold: float = 0.4) -> str:
    """One line where objects do not seem to have the expected diameter, with what to try; else nothing."""
    errors = np.concatenate([objects.errors for objects in found]) if found else np.zeros(0)
    if not len(errors):
        return ""
    kept = [diameters(objects.labels) for objects in found]
    sizes = np.concatenate(kept)
    dropped = float((errors > flow_threshold).mean())
    typical = float(np.median(sizes)) if len(sizes) else 0.0
    fits = not typical or expected / FACTOR <= typical <= expected * FACTOR
    if len(errors) >= ENOUGH and dropped > DROPPED:
        suggested = round(typical if typical > expected * FACTOR else 2 * expected)
        return (
            f"{dropped:.0%} of the {len(errors)} objects found were dropped, for the network contradicts their shape: "
            f"they may be larger than {expected:.0f} pixels; try --diameter {suggested}"
        )
    if len(sizes) >= ENOUGH and not fits:
        return (
            f"the typical object is {typical:.0f} pixels wide, and the network was shown it as {expected:.0f}; "
            f"try --diameter {round(typical)}"
        )
    return ""
