"""Image-based profiling with JAX: predict treatments of cells, and measure the reliability.

    import perturbjax

    run = perturbjax.load("run")
    run.predict(images, masks)

Importing the package starts no device; names are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbjax.api import TrainedRun, differences, doses, fit, hits, load, similar
    from perturbjax.core.config import Recipe, preset
    from perturbjax.core.errors import InputError
    from perturbjax.dataset import Dataset, SitePixels, open_dataset, write_dataset
    from perturbjax.models import Mode, Outputs, create
    from perturbjax.segmentation import Segmenter, segment

__version__ = "0.1.0"

#: Public name -> its module.
_MODULES = {
    "load": "perturbjax.api",
    "fit": "perturbjax.api",
    "TrainedRun": "perturbjax.api",
    "hits": "perturbjax.api",
    "doses": "perturbjax.api",
    "similar": "perturbjax.api",
    "differences": "perturbjax.api",
    "open_dataset": "perturbjax.dataset",
    "write_dataset": "perturbjax.dataset",
    "Dataset": "perturbjax.dataset",
    "SitePixels": "perturbjax.dataset",
    "segment": "perturbjax.segmentation",
    "Segmenter": "perturbjax.segmentation",
    "create": "perturbjax.models",
    "Mode": "perturbjax.models",
    "Outputs": "perturbjax.models",
    "Recipe": "perturbjax.core.config",
    "preset": "perturbjax.core.config",
    "InputError": "perturbjax.core.errors",
}

__all__ = [
    "Dataset",
    "InputError",
    "Mode",
    "Outputs",
    "Recipe",
    "Segmenter",
    "SitePixels",
    "TrainedRun",
    "__version__",
    "create",
    "differences",
    "doses",
    "fit",
    "hits",
    "load",
    "open_dataset",
    "preset",
    "segment",
    "similar",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'perturbjax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
