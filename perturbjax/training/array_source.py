"""Input of a run's network: images and masks in memory, and checks of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, UInt, UInt16

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, Dataset
from perturbjax.training.run_directory import Run


class ArraySource:
    """Images and masks in memory, with the interface of a dataset (`SiteSource`)."""

    def __init__(
        self, run: Run, images: np.ndarray, masks: np.ndarray, plates: Sequence[str] | None
    ):
        """Check that the arrays fit the run.

        Raises:
            InputError: the message names the array, its shape or dtype, and the expected one.
        """
        images, masks = np.asarray(images), np.asarray(masks)
        names = list(run.facts["channels"] or [])
        dtypes = run.facts["image_dtype"] or "uint8 or uint16"
        if images.ndim != 4 or not len(images) or (names and images.shape[3] != len(names)):
            channels = f"{len(names)} ({', '.join(names)})" if names else "channels"
            raise InputError(
                f"images: have shape {images.shape}; {run.path} requires (n, height, width, "
                f"{channels})"
            )
        if str(images.dtype) not in dtypes.split(" or "):
            raise InputError(
                f"images: are {images.dtype}; {run.path} requires {dtypes}, the type of its "
                "training data"
            )
        if masks.shape != images.shape[:3]:
            raise InputError(f"masks: have shape {masks.shape}; images require {images.shape[:3]}")
        highest = np.iinfo(np.uint16).max
        # Kinds of numpy: boolean, signed and unsigned integers.
        if masks.dtype.kind not in "biu" or masks.min() < 0 or masks.max() > highest:
            raise InputError(
                f"masks: must be whole numbers from 0 (background) to {highest}, one for each cell"
            )
        if plates is not None and len(plates) != len(images):
            raise InputError(f"plates: {len(plates)} names for {len(images)} images; pass one each")
        if plates is None and NORMALIZATIONS[run.recipe.input.normalize].uses_plates:
            raise InputError(
                f"plates: {run.path} normalizes by plate; pass the plate name of each image"
            )
        self.path, self.label_column = run.path, run.label_column
        self.channel_names = names or [str(number) for number in range(images.shape[3])]
        self.image_dtype, self.image_size = images.dtype, (images.shape[1], images.shape[2])
        self._images, self._masks, self._plates = images, masks.astype(np.uint16), plates

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        return self._images[position], self._masks[position]

    def column(self, name: str) -> pd.Series:
        """Return the plates, the numbers of the images as `site_id`, or the mean or standard
        deviation of a channel (`mean_DNA`, `std_DNA`).

        Raises:
            InputError: only a dataset has this column.
        """
        if name == "site_id":
            return pd.Series([str(number) for number in range(len(self))])
        if name == PLATE:
            return pd.Series(self._plates, dtype=str)
        # Index columns are named STATISTIC_CHANNEL. Percentiles are not computed for arrays.
        statistic, _, channel = name.partition("_")
        if statistic not in ("mean", "std") or channel not in self.channel_names:
            raise InputError(
                f"{self.path}: has no stored statistics to normalize arrays; apply it to a dataset"
            )
        return pd.Series(self._statistics(statistic)[:, self.channel_names.index(channel)])

    def _statistics(self, name: str) -> Float64[np.ndarray, "n c"]:
        # The same order of summation as in data_prep/site_tasks.py, so that the results are
        # bit-identical.
        pixels = (
            np.ascontiguousarray(image).reshape(-1, image.shape[-1]) for image in self._images
        )
        return np.stack([getattr(image, name)(0) for image in pixels])


def require_fitting(run: Run, dataset: Dataset) -> None:
    """Check that channels and pixel type of a dataset are those of the training data.

    Raises:
        InputError: they differ.
    """
    properties = {
        "channels": dataset.channel_names,
        "image_dtype": str(dataset.image_dtype),
    }
    for name, value in properties.items():
        trained = run.facts[name]
        if trained is not None and trained != value:  # None: an imported network without dataset
            raise InputError(
                f"{dataset.path}: {name} is {value}, {run.path} was trained on {trained}. Build "
                "the dataset with the "
                "same settings."
            )
