"""The oracle: the cellpose package, 3.1 or 4, with weights that are checked before they run.

The package warns and goes on with its default model where a name or a path is unknown, and version 4 ignores
`model_type`, `diam_mean` and `nchan`. Here the weights are found, identified and hashed first, and what the package
then loaded must be that very file. torch is imported in this process: run it in a worker.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest

#: A tensor that only that major version's networks have (the readout of the transformer; the last convolution).
_SIGNATURE = {3: "output.2.weight", 4: "W2"}
#: Largest share of a site that one object may fill. The package drops what fills more than 0.4, which on crops of
#: single cells takes the cell itself.
LARGEST = 1.0


class CellposeTorch:
    """A cellpose network and the two settings that matter, for one process."""

    def __init__(self, weights: str, diameter: float = 0.0):
        """
        Args:
            weights: name of a built-in model of the installed version (fetched by the package into its cache when
                first used), or path of a weights file made by that major version.
            diameter: typical diameter of an object in pixels; 0 takes the one the weights were trained with
                (version 3), or segments at the image's own scale (version 4).

        Raises:
            InputError: cellpose is not installed, the name is unknown, the file is not there, is not a weights file,
                or belongs to the other major version.
        """
        if diameter < 0:
            raise InputError(f"--diameter {diameter}: must not be negative")
        self.version = installed_version()
        self.major = int(self.version.split(".")[0])
        self.weights, self.diameter = weights, diameter
        self.path = find_weights(weights, self.major)
        check_weights(self.path, weights, self.major, self.version)
        self._model = _load(self.path, weights)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "cellpose-torch",
            "version": self.version,
            "weights": self.path.name,
            "sha256": file_digest(self.path),
            "parameters": {
                "diameter": self.diameter or "the weights' own",
                "max_size_fraction": LARGEST,
            },
        }

    def segment(self, image: UInt[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w"]:
        """One channel holds the objects; of two the second holds the nuclei of the first's cells.

        Raises:
            InputError: there are more channels than the version takes, or more objects than 16 bits can number.
        """
        channels = image.shape[-1]
        most = 2 if self.major == 3 else 3
        if channels > most:
            raise InputError(
                f"--segment-channels: cellpose {self.version} takes up to {most}, not {channels}"
            )
        options: dict[str, Any] = {"diameter": self.diameter or None, "max_size_fraction": LARGEST}
        if self.major == 3:
            options["channels"] = [0, 0] if channels == 1 else [1, 2]
        pixels = image[..., 0] if channels == 1 else image
        if channels > 1:
            options["channel_axis"] = -1
        mask = np.asarray(self._model.eval(pixels, **options)[0]).reshape(image.shape[:2])
        if mask.max(initial=0) > np.iinfo(np.uint16).max:
            raise InputError(
                f"cellpose found {mask.max()} objects in one site; a mask holds up to 65535"
            )
        return mask.astype(np.uint16)


def installed_version() -> str:
    """Version of the installed cellpose package, 3.1 or later.

    Raises:
        InputError: it is absent, or of a version this engine does not know.
    """
    try:
        found = version("cellpose")
    except PackageNotFoundError as error:
        raise InputError(
            "--segmenter cellpose-torch: is not installed; pip install 'perturbjax[cellpose]'"
        ) from error
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < (3, 1) or major > 4:
        raise InputError(
            f"--segmenter cellpose-torch: version {found} is installed; 3.1 and 4 are supported"
        )
    return found


def find_weights(weights: str, major: int) -> Path:
    """The file behind a name or a path.

    Raises:
        InputError: it is neither a known name nor a file, or a named model cannot be fetched.
    """
    if not weights:
        raise InputError(
            "--segmenter cellpose-torch: needs --weights NAME or PATH; nothing is chosen for you"
        )
    if Path(weights).is_file():
        return Path(weights).resolve()
    from cellpose import models

    # The transformers of version 3 need another backbone than CellposeModel builds by default.
    names = list(dict.fromkeys(name for name in models.MODEL_NAMES if "transformer" not in name))
    if weights not in names:
        raise InputError(
            f"--weights {weights}: no such file, and cellpose {major} has no model of that name; "
            f"it has {', '.join(names)}"
        )
    fetched = (
        getattr(models, "model_path", None) or models.cache_model_path
    )  # 3.1 and 4.0; 4.1 and later
    try:
        return Path(fetched(weights))
    except Exception as error:  # urllib, ssl and socket raise many kinds
        raise InputError(
            f"--weights {weights}: the model could not be fetched ({error}); give a PATH"
        ) from error


def check_weights(path: Path, weights: str, major: int, installed: str) -> None:
    """Refuse a file whose tensors are not those of this major version's network.

    Raises:
        InputError: see above; or the file is no weights file at all.
    """
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        names = {name.removeprefix("module.") for name in tensors}  # as DataParallel saves them
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        raise InputError(
            f"--weights {weights}: is not a cellpose weights file ({type(error).__name__})"
        ) from error
    if _SIGNATURE[major] in names:
        return
    for other, signature in _SIGNATURE.items():
        if signature in names:
            raise InputError(
                f"--weights {weights}: were made by cellpose {other}, and cellpose {installed} is installed; "
                f"pip install 'cellpose=={other}.*' or give weights of version {major}"
            )
    raise InputError(
        f"--weights {weights}: holds none of cellpose's layers; it is not a cellpose weights file"
    )


def _load(path: Path, weights: str) -> Any:
    import warnings

    import torch
    from cellpose import models

    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    # One thread a worker: the sum's order, and so the mask, must not depend on how many workers there are.
    torch.set_num_threads(1)
    model = models.CellposeModel(gpu=torch.cuda.is_available(), pretrained_model=str(path))
    if Path(str(model.pretrained_model)).resolve() != path.resolve():
        raise InputError(
            f"--weights {weights}: cellpose loaded {model.pretrained_model} instead; nothing was segmented"
        )
    return model
