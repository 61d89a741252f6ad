"""Intensity normalization: shift and scale of each site, from the index alone, and their use inside
jit.

A normalization maps stored integers to network input: (x - shift) * scale, then optionally log(1 +
x). The methods are the records of `perturbjax.core.choices.NORMALIZATIONS`. Shift and scale come
from up to three sources:

- the run: statistics of the training data (background of each channel), fitted once and stored with
  the run;
- the image: mean and standard deviation of the site, from `index.parquet`;
- the plate: the same over all images of the plate.

A method can read only the sources that its record declares. A run therefore treats one site as it
treats a thousand, except with methods that use plates: these need complete plates and print a
warning otherwise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Float32, Float64

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import InputConfig
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.dataset import PLATE, SiteSource

#: Statistics stored with a run: `background` (channel -> stored units) and `plates` (plate ->
#: number of sites). Plain values, which JSON keeps exactly.
Statistics = dict[str, dict[str, float]]
#: A plate that is absent from training counts as complete with this fraction of the sites of the
#: median plate.
COMPLETE_PLATE = 0.5


class Intensities(NamedTuple):
    """Shift and scale of each site and channel, in stored units; `copies` blocks of channels."""

    shift: Float32[np.ndarray, "n copies*c"]
    scale: Float32[np.ndarray, "n copies*c"]


def fit_statistics(dataset: SiteSource, input: InputConfig) -> Statistics:
    """Compute the statistics that a run stores of its training dataset.

    Returns:
        The statistics; empty if the normalization needs none.

    Raises:
        InputError: the index has no statistics of a channel, or no plates.
    """
    method, statistics = NORMALIZATIONS[input.normalize], Statistics()
    if method.uses_background:
        # Background of a channel: median over sites of the 1st percentile, (c,). The minimum of 1
        # prevents division by 0.
        background = np.maximum(np.median(_site_values(dataset, "p01"), axis=0), 1)
        statistics["background"] = dict(
            zip(dataset.channel_names, background.tolist(), strict=True)
        )
    if method.uses_plates:
        statistics["plates"] = {plate: int(n) for plate, n in _plate_sizes(dataset).items()}
    return statistics


def site_intensities(
    dataset: SiteSource, input: InputConfig, statistics: Statistics | None = None
) -> Intensities:
    """Compute shift and scale of each site of a dataset; no pixels are read.

    Args:
        dataset: n sites with c channels.
        input: its `normalize` names the method.
        statistics: of the run that is applied; None fits them to this dataset.

    Raises:
        InputError: a statistic of a channel is missing in the index or in the run.
    """
    method = NORMALIZATIONS[input.normalize]
    fitted = fit_statistics(dataset, input) if statistics is None else statistics
    values = method.shift_scale(_SiteStatistics(dataset, fitted, method.depends_on))
    return Intensities(*(value.astype(np.float32) for value in values))


def normalize(
    image: Float[Array, "b h w c"],
    shift: Float[Array, "b kc"],
    scale: Float[Array, "b kc"],
    method: str,
) -> Float[Array, "b h w kc"]:
    """Normalize stored intensities. Pure function, for use inside jit.

    Args:
        image: (B, H, W, C) stored intensities.
        shift, scale: (B, copies * C) rows of `Intensities`.
        method: a name in `NORMALIZATIONS`.

    Returns:
        (B, H, W, copies * C) network input.
    """
    # Repeats all channels once for each copy: (b, h, w, copies * c).
    image = jnp.tile(image, shift.shape[1] // image.shape[-1])
    image = (image - shift[:, None, None]) * scale[:, None, None]
    return jnp.log1p(image) if NORMALIZATIONS[method].log else image


def count_input_channels(dataset: SiteSource, input: InputConfig) -> int:
    """Return the number of image channels of the network input: stored channels times copies."""
    return len(dataset.channel_names) * NORMALIZATIONS[input.normalize].copies


def choose_statistics(
    dataset: SiteSource,
    input: InputConfig,
    stored: Statistics | None,
    run: Any,
    *,
    is_training_data: bool,
) -> Statistics:
    """Return the statistics to normalize a dataset for a run, with a warning if they are
    unreliable.

    Imported networks, and runs of early versions, have no stored statistics. They are fitted to the
    dataset then.

    Args:
        dataset: the dataset that the run is applied to.
        input: input options of the run.
        stored: statistics of the run, or None.
        run: name of the run in messages.
        is_training_data: whether the run was trained on this dataset.
    """
    if stored is None:
        fitted = fit_statistics(dataset, input)
        if fitted and not is_training_data:
            console.print(
                f"warning: {run} has no stored statistics for --normalize {input.normalize}. They "
                "are computed "
                f"from {dataset.path}, so predictions depend on the sites in it."
            )
        return fitted
    if NORMALIZATIONS[input.normalize].uses_plates:
        _warn_incomplete_plates(dataset, input, stored.get("plates", {}))
    return stored


def _warn_incomplete_plates(
    dataset: SiteSource, input: InputConfig, trained: dict[str, float]
) -> None:
    """Warn of plates with fewer sites than in training (new plates: than half as many)."""
    # Number of sites of a typical training plate.
    usual = float(np.median(list(trained.values()))) if trained else 0.0
    incomplete = {
        plate: n
        for plate, n in _plate_sizes(dataset).items()
        if n < trained.get(str(plate), COMPLETE_PLATE * usual)
    }
    if incomplete:
        plate, n = next(iter(incomplete.items()))
        before = (
            f"{trained[plate]:g} sites in training"
            if plate in trained
            else f"about {usual:g} sites of each training plate"
        )
        more = f" ({len(incomplete) - 1} more plates are incomplete)" if len(incomplete) > 1 else ""
        console.print(
            f"warning: plate {plate} has {n} sites, compared with {before}{more}. --normalize "
            f"{input.normalize} "
            "uses statistics of complete plates, so predictions depend on the sites in the dataset."
        )


def _plate_sizes(dataset: SiteSource) -> pd.Series:
    return dataset.column(PLATE).astype(str).value_counts(sort=False)


def _site_values(dataset: SiteSource, statistic: str) -> Float64[np.ndarray, "n c"]:
    columns = [dataset.column(f"{statistic}_{channel}") for channel in dataset.channel_names]
    return np.stack(columns, axis=1).astype(np.float64)


class _SiteStatistics:
    """`core.choices.IntensityStatistics` of a dataset, limited to the declared sources."""

    def __init__(self, dataset: SiteSource, fitted: Statistics, depends_on: str):
        self._dataset, self._fitted, self._depends_on = dataset, fitted, depends_on
        self.dtype_maximum = np.iinfo(dataset.image_dtype).max
        self.zeros = np.zeros((len(dataset), len(dataset.channel_names)))

    @property
    def background(self) -> Float64[np.ndarray, " c"]:
        fitted = self._fitted.get("background", {})
        names = self._dataset.channel_names
        if missing := [name for name in names if name not in fitted]:
            raise InputError(
                f"{self._dataset.path}: channel {missing[0]} has no background value in the run "
                "(available: "
                f"{', '.join(fitted) or 'none'}). Apply the run to data with the channels of its "
                "training data."
            )
        return np.array([fitted[name] for name in names], np.float64)

    @property
    def site_mean(self) -> Float64[np.ndarray, "n c"]:
        return self._read("image", "mean")

    @property
    def site_std(self) -> Float64[np.ndarray, "n c"]:
        return self._read("image", "std")

    @functools.cached_property
    def plate_mean(self) -> Float64[np.ndarray, "n c"]:
        return self._average_over_plates(self._read("plate", "mean"))

    @property
    def plate_std(self) -> Float64[np.ndarray, "n c"]:
        # Law of total variance: mean of the variances of sites (of equal size) plus variance of
        # their means.
        mean, std = self._read("plate", "mean"), self._read("plate", "std")
        return np.sqrt(self._average_over_plates(std**2 + (mean - self.plate_mean) ** 2))

    def _read(self, source: str, statistic: str) -> Float64[np.ndarray, "n c"]:
        # Undeclared statistics are an error: export would store those of a blank image as
        # constants.
        if source not in ("image", self._depends_on) or self._depends_on == "run":
            raise TypeError(f"normalization depends on the {source}, its record does not say so")
        return _site_values(self._dataset, statistic)

    def _average_over_plates(self, values: np.ndarray) -> Float64[np.ndarray, "n c"]:
        plates = self._dataset.column(PLATE).to_numpy()
        # `transform` repeats the mean of a plate for each of its sites, (n, c).
        return pd.DataFrame(values).groupby(plates).transform("mean").to_numpy()
