"""Instance segmentation with Cellpose networks in JAX: networks, tiles, flow dynamics, training.

Names are imported on first use: worker processes need `foreground`, which does without JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbjax.segmentation.api import Segmenter, segment

__all__ = ["Segmenter", "segment"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from perturbjax.segmentation import api

    return getattr(api, name)
