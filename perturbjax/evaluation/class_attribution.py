"""Attribution of the predictions of a class to compartments and channels.

The pixels of one channel in one compartment are replaced by their typical value: the median over
sites of the same plate of their mean. Values of the background would be unlike any cell, so that
hiding any channel of the cells would change the prediction. The loss is the decrease of the
predicted class's probability. It is averaged over correctly predicted sites of a class, and divided
by the sum over all parts.

Source of hiding parts: Zeiler and Fergus 2014, arXiv 1311.2901.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float32, Int

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.files import write_csv
from perturbjax.core.plates import PLATE
from perturbjax.data.augmentation import RawBatch
from perturbjax.dataset import Dataset
from perturbjax.inference import Network
from perturbjax.models.ensemble_head import feature_channels

CLASS_ATTRIBUTION = "class_attribution.csv"
#: Names of the parts of a site: with nuclei in the dataset, and without.
WITH_NUCLEI, WITHOUT_NUCLEI = ("nucleus", "cytoplasm", "background"), ("mask", "background")
#: Maximum number of classes, those with most correct sites first, and of sites of a class. A site
#: needs one prediction for each channel of each compartment.
CLASSES, SITES_PER_CLASS = 24, 8
#: Minimum sum of the losses of a class; fractions of smaller sums are noise.
SMALLEST_LOSS = 0.01


def write_class_attribution(
    network: Network,
    dataset: Dataset,
    positions: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float32[np.ndarray, "n classes"],
    out: Path,
) -> None:
    """Write `class_attribution.csv`; nothing without correctly predicted sites.

    Args:
        network: trained network whose input is a whole site.
        dataset: dataset of the test sites.
        positions: test sites in the dataset.
        labels: their classes.
        probabilities: their predictions.
        out: folder.
    """
    chosen = choose_sites(labels, probabilities)
    if not len(chosen):
        return
    losses = part_losses(network, dataset, positions[chosen], probabilities[chosen])
    names = network.run.class_names
    write_csv(out / CLASS_ATTRIBUTION, summarize(losses, labels[chosen], names, dataset))


def choose_sites(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"]
) -> Int[np.ndarray, " m"]:
    """Select correctly predicted sites, evenly spaced in each class; return their rows."""
    right = np.flatnonzero(probabilities.argmax(axis=1) == labels)
    counts = pd.Series(labels[right]).value_counts().sort_index()
    classes = counts.sort_values(ascending=False, kind="stable").index[:CLASSES]
    rows = []
    for label in classes:
        own = right[labels[right] == label]
        spaced = np.linspace(0, len(own) - 1, min(SITES_PER_CLASS, len(own))).round().astype(int)
        rows.append(own[np.unique(spaced)])
    return np.sort(np.concatenate(rows)) if rows else np.zeros(0, int)


def compartments(
    dataset: Dataset, position: int, shape: tuple[int, int]
) -> list[Bool[np.ndarray, "h w"]]:
    """Return the compartments of a site at the resolution of the network input.

    Args:
        dataset: the sites.
        position: the site.
        shape: height and width of the network input.
    """
    cells = _resize(dataset.pixels(position)[1] > 0, shape)
    if not dataset.has_nuclei:
        return [cells, ~cells]
    nuclei = _resize(dataset.nuclei(position) > 0, shape)
    return [nuclei, cells & ~nuclei, ~(cells | nuclei)]


def _resize(
    mask: Bool[np.ndarray, "h w"], shape: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Resize by nearest neighbor."""
    rows, columns = (
        ((np.arange(size) + 0.5) * length / size).astype(int)
        for size, length in zip(shape, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def typical_values(
    dataset: Dataset, positions: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n k c"]:
    """Return the median over the sites of a plate of the mean of each part, for each site."""
    means = []
    for position in positions.tolist():
        image, mask = dataset.pixels(position)
        parts = compartments(dataset, position, (mask.shape[0], mask.shape[1]))
        # A site without this compartment has the mean of the whole site.
        means.append(
            [
                image[part if part.any() else ...].reshape(-1, image.shape[-1]).mean(0)
                for part in parts
            ]
        )
    values = np.array(means)
    plates = dataset.index[PLATE].to_numpy()[positions]
    typical = np.empty_like(values)
    for plate in np.unique(plates):
        typical[plates == plate] = np.median(values[plates == plate], axis=0)
    return typical


def part_losses(
    network: Network,
    dataset: Dataset,
    positions: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
) -> Float32[np.ndarray, "n k c"]:
    """Compute the decrease of the predicted class's probability for each hidden part.

    Args:
        network: trained network.
        dataset: dataset of the sites.
        positions: sites in the dataset.
        probabilities: predictions of the unchanged sites.

    Returns:
        (sites, compartments, channels); negative if hiding a part increases the probability.
    """
    kinds = len(WITH_NUCLEI if dataset.has_nuclei else WITHOUT_NUCLEI)
    channels = len(dataset.channel_names)
    variants = kinds * channels
    typical = np.rint(typical_values(dataset, positions))

    def hide_part(batch: RawBatch, first: int) -> RawBatch:
        image: Any = np.array(batch.image)
        for row in range(len(image)):
            # Rows follow site by site. Rows after the last site fill the batch.
            site, variant = divmod(first + row, variants)
            if site < len(positions):
                kind, channel = divmod(variant, channels)
                part = compartments(dataset, int(positions[site]), image.shape[1:3])[kind]
                image[row, part, channel] = typical[site, kind, channel]
        return batch._replace(image=image)

    features = _features_of_parts(network, dataset, positions, typical)
    repeated = np.repeat(positions, variants)
    changed = network.changed(dataset, repeated, hide_part, site_features=features)
    hidden = changed.probabilities.reshape(len(positions), kinds, channels, -1)
    # (n, 1, 1, 1): the predicted class.
    predicted = probabilities.argmax(axis=1)[:, None, None, None]
    own = np.take_along_axis(probabilities[:, None, None], predicted, axis=3)
    losses = own - np.take_along_axis(hidden, predicted, axis=3)
    return losses[..., 0].astype(np.float32)


def _features_of_parts(
    network: Network,
    dataset: Dataset,
    positions: Int[np.ndarray, " n"],
    typical: Float[np.ndarray, "n k c"],
) -> Float32[np.ndarray, "variants d"] | None:
    """Compute the site features of all variants of sites; None if the network has none.

    Each site feature depends on one channel. The backbone therefore runs once for each compartment,
    hidden in all channels at the same time, instead of once for each compartment and channel.

    Args:
        network: trained network.
        dataset: dataset of the sites.
        positions: sites in the dataset.
        typical: values in place of the hidden compartments.

    Returns:
        For each site one row per compartment and channel.
    """
    whole = network.site_features(dataset, positions)
    if whole is None:
        return None
    sites, kinds, channels = typical.shape

    def hide_compartment(batch: RawBatch, first: int) -> RawBatch:
        image: Any = np.array(batch.image)
        for row in range(len(image)):
            site, kind = divmod(first + row, kinds)
            if site < sites:
                part = compartments(dataset, int(positions[site]), image.shape[1:3])[kind]
                image[row, part] = typical[site, kind]
        return batch._replace(image=image)

    digest = hashlib.sha256(np.asarray(positions, np.int64).tobytes() + typical.tobytes())
    hidden = network.site_features(
        dataset, np.repeat(positions, kinds), hide_compartment, f"hidden {digest.hexdigest()}"
    )
    assert hidden is not None
    count = whole.shape[1]
    copies = NORMALIZATIONS[network.run.recipe.input.normalize].copies
    channel_of = feature_channels(count, channels, copies)
    is_changed = channel_of == np.arange(channels)[:, None]  # (channels, features)
    parts = np.where(
        is_changed, hidden.reshape(sites, kinds, 1, count), whole.reshape(sites, 1, 1, count)
    )
    return parts.reshape(-1, count)


def summarize(
    losses: Float[np.ndarray, "n k c"],
    labels: Int[np.ndarray, " n"],
    class_names: list[str],
    dataset: Dataset,
) -> pd.DataFrame:
    """Average the losses of each class.

    Returns:
        One row per class, compartment and channel: `loss`, the mean decrease of the probability;
        `fraction`, its part of the sum of all positive losses of the class, NaN if this sum is
        below `SMALLEST_LOSS`;
        `sites`, the number of sites of the class.
    """
    names = WITH_NUCLEI if dataset.has_nuclei else WITHOUT_NUCLEI
    parts = pd.MultiIndex.from_product([names, dataset.channel_names])
    tables = []
    for label in np.unique(labels):
        own = losses[labels == label].mean(axis=0).ravel()
        table = pd.DataFrame({"class": class_names[label], "loss": own})
        table["compartment"], table["channel"] = zip(*parts, strict=True)
        tables.append(table.assign(sites=int((labels == label).sum())))
    table = pd.concat(tables, ignore_index=True)
    # Hiding a part can increase the probability; such parts do not count.
    positive = table["loss"].clip(lower=0)
    total = positive.groupby(table["class"]).transform("sum")
    table["fraction"] = (positive / total).where(total >= SMALLEST_LOSS)
    return table[["class", "compartment", "channel", "fraction", "loss", "sites"]]
