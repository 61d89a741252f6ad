"""Every way intensities are normalised: what it must know, where it learns that, and what it does inside jit.

A way is a function from stored integers to what the network sees: (x - shift) × scale, then perhaps a logarithm. What
`shift` and `scale` follow from has two owners. *Statistics* are fitted once, on the dataset that a run is trained on,
and belong to the run: they are stored with it and used as they are on whatever it is applied to. The rest is read off
the site itself, or off its plate. So one site gives what a thousand give, but for ways that look at whole plates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Float32, Float64

from perturbjax.core.config import InputConfig, Normalization
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.dataset import PLATE, SiteSource

#: What a run keeps: name of a statistic → its value of each channel; and `plates`: name of a plate → its sites. Plain
#: values, so that they survive JSON to the bit.
Statistics = dict[str, dict[str, float]]
#: A plate that training did not see counts as whole from this share of the median plate's sites on.
WHOLE = 0.5


class Intensities(NamedTuple):
    """Of every site and channel, all channels in each of k ways; both in stored units."""

    shift: Float32[np.ndarray, "n k*c"]
    scale: Float32[np.ndarray, "n k*c"]


@dataclass(frozen=True)
class Method:
    """One way of normalising.

    Attributes:
        intensities: (dataset, statistics) → shift and scale of its sites; reads no pixels, only the index.
        fit: dataset → the statistics that belong to a run trained on it.
        bend: what follows (x - shift) × scale; pure.
        ways: how many times the network sees every channel.
        whole_plates: whether a site's input depends on the other sites of its plate.
    """

    intensities: Callable[[SiteSource, Statistics], Intensities]
    fit: Callable[[SiteSource], Statistics] = lambda dataset: {}
    bend: Callable[[Array], Array] = lambda x: x
    ways: int = 1
    whole_plates: bool = False


def fit(dataset: SiteSource, input: InputConfig) -> Statistics:
    """The statistics of a dataset that a run trained on it keeps; empty where the way needs none.

    Raises:
        InputError: a channel's statistics, or the plates, are not in the index.
    """
    method = METHODS[input.normalize]
    plates = (
        dataset.column(PLATE).astype(str).value_counts(sort=False) if method.whole_plates else {}
    )
    sites: dict[str, Any] = (
        {"plates": {plate: int(count) for plate, count in plates.items()}}
        if method.whole_plates
        else {}
    )
    return {**method.fit(dataset), **sites}


def intensities(
    dataset: SiteSource, input: InputConfig, statistics: Statistics | None = None
) -> Intensities:
    """Shift and scale of every site of a dataset, by the statistics of a run; None fits them to this dataset.

    Raises:
        InputError: a channel's statistics are neither in the index nor in the run.
    """
    return METHODS[input.normalize].intensities(
        dataset, fit(dataset, input) if statistics is None else statistics
    )


def apply(
    image: Float[Array, "b h w c"],
    shift: Float[Array, "b kc"],
    scale: Float[Array, "b kc"],
    name: Normalization,
) -> Float[Array, "b h w kc"]:
    """What the network sees of stored intensities; pure, for use inside jit."""
    image = jnp.tile(image, shift.shape[1] // image.shape[-1])
    return METHODS[name].bend((image - shift[:, None, None]) * scale[:, None, None])


def count_input_channels(dataset: SiteSource, input: InputConfig) -> int:
    """How many image channels the network sees: those stored, in each way they are normalised."""
    return len(dataset.channel_names) * METHODS[input.normalize].ways


def statistics_for(
    dataset: SiteSource, input: InputConfig, kept: Statistics | None, run: Any, *, own: bool
) -> Statistics:
    """The statistics by which a run's network is applied to a dataset, with a line where they are not enough.

    Args:
        kept: what the run keeps; None where it keeps nothing.
        run: named in messages.
        own: whether this is the dataset that the run was trained on.

    A run that keeps nothing (an imported network, or one trained before runs kept statistics) takes them from the
    dataset at hand.
    """
    if kept is None:
        fitted = fit(dataset, input)
        if fitted and not own:
            console.print(
                f"note: {run} keeps no statistics for --normalize {input.normalize}; they are taken from "
                f"{dataset.path}, so answers depend on which sites are in it"
            )
        return fitted
    if METHODS[input.normalize].whole_plates:
        _say_broken_plates(dataset, input, kept.get("plates", {}))
    return kept


def _say_broken_plates(dataset: SiteSource, input: InputConfig, trained: dict[str, float]) -> None:
    """A line where plates have fewer sites than in training or, new ones, than half of what plates had there."""
    usual = WHOLE * float(np.median(list(trained.values()))) if trained else 0.0
    here = dataset.column(PLATE).astype(str).value_counts(sort=False)
    broken = {plate: count for plate, count in here.items() if count < trained.get(plate, usual)}
    if broken:
        plate, count = next(iter(broken.items()))
        known = (
            f"of {trained[plate]:g}" if plate in trained else f"where plates had {usual / WHOLE:g}"
        )
        more = f", and {len(broken) - 1} more plates" if len(broken) > 1 else ""
        console.print(
            f"note: plate {plate} has {count} sites {known} in training{more}; --normalize {input.normalize} takes "
            "statistics from whole plates, so these answers depend on which sites are there"
        )


def _by_dtype(dataset: SiteSource, statistics: Statistics) -> Intensities:
    shape = (len(dataset), len(dataset.channel_names))
    largest = np.iinfo(dataset.image_dtype).max
    return Intensities(np.zeros(shape, np.float32), np.full(shape, 1 / largest, np.float32))


def _backgrounds(dataset: SiteSource) -> Statistics:
    """Each channel's background: the median over the sites of their 1st percentile, at least 1."""
    background = np.maximum(np.median(_of_sites(dataset, "p01"), axis=0), 1)
    return {"background": dict(zip(dataset.channel_names, background.tolist(), strict=True))}


def _over_background(dataset: SiteSource, statistics: Statistics) -> Intensities:
    return _relative_to([np.zeros((len(dataset), len(dataset.channel_names)))], dataset, statistics)


def _over_background_and_plate(dataset: SiteSource, statistics: Statistics) -> Intensities:
    # log(1 + (x - mean) / (mean + background)) = log((x + background) / (mean + background))
    plate_mean, _ = _of_plates(dataset)
    return _relative_to([np.zeros(plate_mean.shape), plate_mean], dataset, statistics)


def _relative_to(
    centers: list[np.ndarray], dataset: SiteSource, statistics: Statistics
) -> Intensities:
    kept = statistics.get("background", {})
    if lacking := [name for name in dataset.channel_names if name not in kept]:
        raise InputError(
            f"{dataset.path}: channel {lacking[0]} has no background among the run's ({', '.join(kept) or 'none'})"
        )
    background = np.array([kept[name] for name in dataset.channel_names], np.float64)
    shift = np.concatenate(centers, axis=1).astype(np.float32)
    return Intensities(shift, (1 / (shift + np.tile(background, len(centers)))).astype(np.float32))


def _by_site(dataset: SiteSource, statistics: Statistics) -> Intensities:
    return _standardised(_of_sites(dataset, "mean"), _of_sites(dataset, "std"))


def _by_plate(dataset: SiteSource, statistics: Statistics) -> Intensities:
    return _standardised(*_of_plates(dataset))


def _standardised(mean: np.ndarray, std: np.ndarray) -> Intensities:
    # A channel without any contrast (all one value) is only shifted.
    return Intensities(mean.astype(np.float32), (1 / np.where(std > 0, std, 1)).astype(np.float32))


def _of_sites(dataset: SiteSource, name: str) -> Float64[np.ndarray, "n c"]:
    columns = [dataset.column(f"{name}_{channel}") for channel in dataset.channel_names]
    return np.stack(columns, axis=1).astype(np.float64)


def _of_plates(
    dataset: SiteSource,
) -> tuple[Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"]]:
    """Mean and deviation of all pixels of a record's plate, from those of its sites (which are equal in size).

    The variance of a plate is the mean of its sites' variances plus the variance of their means.
    """
    mean, std = _of_sites(dataset, "mean"), _of_sites(dataset, "std")
    plates = dataset.column(PLATE).to_numpy()
    plate_mean = pd.DataFrame(mean).groupby(plates).transform("mean").to_numpy()
    spread = std**2 + (mean - plate_mean) ** 2
    return plate_mean, np.sqrt(pd.DataFrame(spread).groupby(plates).transform("mean").to_numpy())


METHODS: dict[Normalization, Method] = {
    "dtype": Method(_by_dtype),
    "log": Method(_over_background, _backgrounds, jnp.log1p),
    "log_plate": Method(
        _over_background_and_plate, _backgrounds, jnp.log1p, ways=2, whole_plates=True
    ),
    "site": Method(_by_site),
    "plate": Method(_by_plate, whole_plates=True),
}
