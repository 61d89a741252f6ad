"""The cellpose package (3.1 or 4) as an engine, with weights that are verified before they run.

For an unknown name or path the package only warns and uses its default model, and version 4 ignores
`model_type`, `diam_mean` and `nchan`. Here the weights file is found, identified and hashed first,
and the package must have loaded that file. torch is imported in this process, so this runs in a
worker."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from data_prep.segment import SegmenterConfig, to_uint16
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.segmentation.foreground import analyze_foreground, remove_implausible_objects

#: A tensor that only networks of that major version have (last convolution; readout of the
#: transformer).
_SIGNATURE = {3: "output.2.weight", 4: "W2"}
#: Largest fraction of a site that one object may fill. The package's 0.4 drops the cell of a
#: single-cell crop.
MAX_SIZE_FRACTION = 1.0


class CellposeTorch:
    """A network of the cellpose package in this process."""

    def __init__(self, config: SegmenterConfig):
        """
        Args:
            config: `weights` is the name of a built-in model of the installed version (downloaded
                by the package on first use), or the path of a weights file of that major version.
                `diameter` in pixels; by default that of the training images (version 3) or the
                image's own scale (version 4).

        Raises:
            InputError: cellpose is not installed, the weights cannot be found or read or belong to
                the other major version, or the diameter should be estimated.
        """
        if config.diameter_mode in ("per-plate", "per-site"):
            raise InputError(
                f"--diameter {config.diameter}: --segmenter cellpose-torch does not estimate "
                "diameters; "
                "pass a number of pixels, or choose --segmenter cellpose"
            )
        self.config = config
        self.version = installed_version()
        self.major = int(self.version.split(".")[0])
        self.path = find_weights(config.weights, self.major)
        check_weights(self.path, config.weights, self.major, self.version)
        self._model = _load(self.path, config.weights)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "cellpose-torch",
            "version": self.version,
            "weights": self.path.name,
            "sha256": file_digest(self.path),
            "parameters": {
                "diameter": self.config.pixels or "trained",
                "max_size_fraction": MAX_SIZE_FRACTION,
            },
        }

    def estimate_diameter(self, images: Sequence[UInt[np.ndarray, "_h _w _c"]]) -> float:
        return self.config.pixels

    def segment(
        self, image: UInt[np.ndarray, "h w c"], diameter: float = 0.0
    ) -> UInt16[np.ndarray, "h w"]:
        """Segment one site. Of two channels, the first shows cells and the second their nuclei.

        Raises:
            InputError: there are more channels than this version takes, or too many objects.
        """
        # Version 3 takes cells and nuclei, version 4 up to three channels.
        channels, limit = image.shape[-1], 2 if self.major == 3 else 3
        if channels > limit:
            raise InputError(
                f"--segment-channels: cellpose {self.version} takes up to {limit} channels, not "
                f"{channels}"
            )
        foreground = analyze_foreground(image)
        if not foreground.present:
            return np.zeros(image.shape[:2], np.uint16)
        diameter = self.config.pixels or diameter
        options: dict[str, Any] = {
            "diameter": diameter or None,
            "max_size_fraction": MAX_SIZE_FRACTION,
            "normalize": False,
        }
        if self.major == 3:
            # In version 3, 0 is a gray image; 1 and 2 are the first and the second channel.
            options["channels"] = [0, 0] if channels == 1 else [1, 2]
        # Normalized here: the package's percentiles amplify the noise of sparse fields.
        low, span = np.moveaxis(foreground.ranges, -1, 0)
        pixels = (image.astype(np.float32) - low) / span
        if channels > 1:
            options["channel_axis"] = -1
        pixels = pixels[..., 0] if channels == 1 else pixels
        mask = np.asarray(self._model.eval(pixels, **options)[0]).reshape(image.shape[:2])
        mask = remove_implausible_objects(
            to_uint16(mask), image, foreground.noise, self.config.pixels
        )
        return mask


def installed_version() -> str:
    """Return the version of the installed cellpose package.

    Raises:
        InputError: it is not installed, or its version is not supported.
    """
    try:
        installed = version("cellpose")
    except PackageNotFoundError as error:
        raise InputError(
            "--segmenter cellpose-torch: the cellpose package is not installed; pip install "
            "'perturbjax[cellpose]'"
        ) from error
    major, minor = (int(part) for part in installed.split(".")[:2])
    if (major, minor) < (3, 1) or major > 4:
        raise InputError(
            f"--segmenter cellpose-torch: cellpose {installed} is installed; 3.1 and 4 are "
            "supported"
        )
    return installed


def find_weights(weights: str, major: int) -> Path:
    """Return the file of a model name or a path.

    Raises:
        InputError: it is neither a known name nor a file, or the model cannot be downloaded.
    """
    if not weights:
        raise InputError(
            "--segmenter cellpose-torch: needs --weights NAME or PATH; there is no default model"
        )
    if Path(weights).is_file():
        return Path(weights).resolve()
    from cellpose import models

    # Transformer models of version 3 need another backbone than CellposeModel builds by default.
    names = list(dict.fromkeys(name for name in models.MODEL_NAMES if "transformer" not in name))
    if weights not in names:
        raise InputError(
            f"--weights {weights}: no such file, and cellpose {major} has no model of that name "
            f"(available: {', '.join(names)})"
        )
    # Named model_path in 3.1 and 4.0, cache_model_path from 4.1 on.
    download = getattr(models, "model_path", None) or models.cache_model_path
    try:
        return Path(download(weights))
    except Exception as error:  # urllib, ssl and socket raise many kinds
        raise InputError(
            f"--weights {weights}: the model cannot be downloaded ({error}); pass the path of a "
            "file"
        ) from error


def check_weights(path: Path, weights: str, major: int, installed: str) -> None:
    """Check that a file has the tensors of this major version's network.

    Raises:
        InputError: it has not, or is not a weights file.
    """
    import torch

    try:
        # `weights_only` refuses files that contain code.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        names = {name.removeprefix("module.") for name in tensors}  # DataParallel adds it
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        raise InputError(
            f"--weights {weights}: is not a cellpose weights file ({type(error).__name__})"
        ) from error
    if _SIGNATURE[major] in names:
        return
    # Naming the other version makes the message more useful.
    for other, signature in _SIGNATURE.items():
        if signature in names:
            raise InputError(
                f"--weights {weights}: belong to cellpose {other}, but cellpose {installed} is "
                "installed; "
                f"pip install 'cellpose=={other}.*' or pass weights of version {major}"
            )
    raise InputError(
        f"--weights {weights}: contains no layer of Cellpose; it is not a cellpose weights file"
    )


def _load(path: Path, weights: str) -> Any:
    import warnings

    import torch
    from cellpose import models

    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    # One thread per worker: the order of sums, and so the mask, must not depend on the number of
    # workers.
    torch.set_num_threads(1)
    model = models.CellposeModel(gpu=torch.cuda.is_available(), pretrained_model=str(path))
    # The package falls back to its default model without an error, so its choice is verified.
    if Path(str(model.pretrained_model)).resolve() != path.resolve():
        raise InputError(
            f"--weights {weights}: cellpose loaded {model.pretrained_model} instead, so nothing "
            "was segmented"
        )
    return model
