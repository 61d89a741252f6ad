"""What a network looked at: where its attention lets the image through, and what its score owes to the masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json, write_json, write_parquet
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import MaskTransform
from perturbjax.data.mask_encodings import draw_disks
from perturbjax.dataset import Dataset
from perturbjax.evaluation.occlusion import occlude, summary, window_centers
from perturbjax.evaluation.scores import HEADLINE, score
from perturbjax.training.apply_network import Predictions
from perturbjax.training.run_directory import Run

ATTRIBUTION_FILE, ATTENTION, OCCLUSION = "looked.json", "attention.parquet", "occlusion.parquet"
#: Sites that are looked at, at most: each is answered three times more; and of those without attention where windows
#: are hidden.
SITES, OCCLUDED = 1000, 12


class Other(NamedTuple):
    """What is done to masks: to a batch of them as they are encoded, and to the cells of a site before that."""

    change: Callable[[np.ndarray], np.ndarray] = lambda masks: masks
    mask_transform: MaskTransform | None = None


#: What a network was asked before, and what it is asked besides, by what it is called.
UNCHANGED_MASKS = "as they are"
MASK_CHANGES = {
    "each cell its bounding disc": Other(mask_transform=draw_disks),
    "of another site": Other(lambda masks: np.roll(masks, 1, axis=0)),
    "taken away": Other(np.zeros_like),
}


@runtime_checkable
class Asked(Protocol):
    """What is asked of a network (`inference.Network`)."""

    @property
    def run(self) -> Run: ...

    def apply_with_masks(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[np.ndarray], np.ndarray],
        mask_transform: MaskTransform | None = None,
    ) -> Predictions: ...

    def changed(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[RawBatch, int], RawBatch],
    ) -> Predictions: ...

    def attention_on_dataset(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "n h2 w2"]: ...


def forget(out: Path) -> None:
    """Remove what an earlier evaluation wrote of where the network looked: it may have been of another checkpoint."""
    for name in (ATTRIBUTION_FILE, ATTENTION, OCCLUSION):
        (out / name).unlink(missing_ok=True)


def write_attribution(
    network: Asked,
    dataset: Dataset,
    positions: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float32[np.ndarray, "n classes"],
    out: Path,
) -> None:
    """Write `looked.json`, and `attention.parquet` where the network has attention, else `occlusion.parquet`.

    `looked.json` holds `sites`; `masks` {what is done to them: {metric: value}}, of networks that are given masks; and
    `attention` {low, high, mean, contrast}: the 5th and 95th percentile over the places of a site and their mean, as
    means over sites, and high minus low. A contrast of 0 lets everything through alike: then the mask gates nothing.
    `attention.parquet` has `site_id`, `height`, `width` (places) and `attention`, the places row by row, in (0, 1);
    `occlusion.parquet` the same with `occlusion`, see `occlusion.occlude`, of at most `OCCLUDED` sites: those surest of
    their class. `occlusion` of `looked.json` is `occlusion.summary`.

    Args:
        positions: sites that judge, at most `SITES` of which are looked at, evenly chosen.
        labels: their classes.
        probabilities: what the network answers to them as they are.
    """
    chosen = np.unique(
        np.linspace(0, len(positions) - 1, min(SITES, len(positions))).round().astype(int)
    )
    positions, labels, probabilities = positions[chosen], labels[chosen], probabilities[chosen]
    found: dict[str, Any] = {"sites": len(positions)}
    if network.run.recipe.input.mask_use == "keep":
        answers = {UNCHANGED_MASKS: probabilities}
        for name, other in MASK_CHANGES.items():
            answers[name] = network.apply_with_masks(dataset, positions, *other).probabilities
        found["masks"] = {
            name: {metric: score(labels, answer)[metric] for metric in ("accuracy", HEADLINE)}
            for name, answer in answers.items()
        }
    try:
        attention = network.attention_on_dataset(dataset, positions)
    except InputError:  # the network has none
        found["occlusion"] = _occluded(
            network, dataset, _surest(positions, labels, probabilities), out
        )
    else:
        found["attention"] = spread(attention)
        _write_maps(out / ATTENTION, "attention", dataset, positions, attention)
    write_json(out / ATTRIBUTION_FILE, found)


def _surest(
    positions: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float32[np.ndarray, "n classes"],
) -> Int[np.ndarray, " few"]:
    """The site of each class that the network is surest of, of at most `OCCLUDED` classes."""
    sure = pd.Series(probabilities[np.arange(len(labels)), labels]).groupby(labels).idxmax()
    return positions[np.sort(sure.to_numpy()[:OCCLUDED])]


def _occluded(
    network: Asked, dataset: Dataset, chosen: Int[np.ndarray, " n"], out: Path
) -> dict[str, float]:
    """Hide windows of these sites, and write what is lost."""
    drops = occlude(network, dataset, chosen)
    _write_maps(out / OCCLUSION, "occlusion", dataset, chosen, drops)
    cells = np.stack([window_centers(dataset.pixels(int(position))[1]) for position in chosen])
    return summary(drops, cells)


def _write_maps(
    path: Path,
    name: str,
    dataset: Dataset,
    positions: Int[np.ndarray, " n"],
    maps: Float32[np.ndarray, "n h w"],
) -> None:
    table = pd.DataFrame({"site_id": dataset.index["site_id"].to_numpy()[positions]})
    table = table.assign(height=maps.shape[1], width=maps.shape[2])
    table[name] = list(maps.reshape(len(maps), -1))
    write_parquet(path, table)


def spread(attention: Float[np.ndarray, "n h w"]) -> dict[str, float]:
    """How unequally places of a site are let through, as means over sites; see `look`."""
    places = attention.reshape(len(attention), -1)
    low, high = np.percentile(places, (5, 95), axis=1).mean(axis=1)
    return {
        "low": float(low),
        "high": float(high),
        "mean": float(places.mean()),
        "contrast": float(high - low),
    }


def read_attribution(folder: Path) -> dict[str, Any] | None:
    """What `look` wrote there; None where it wrote nothing."""
    return read_json(folder / ATTRIBUTION_FILE) if (folder / ATTRIBUTION_FILE).is_file() else None


def read_maps(folder: Path, name: str) -> dict[str, Float32[np.ndarray, "h w"]]:
    """The map of each site, by its site_id: of its `attention`, or its `occlusion`; empty where there are none."""
    file = folder / f"{name}.parquet"
    if not file.is_file():
        return {}
    rows = pd.read_parquet(file).itertuples()
    return {
        row.site_id: np.asarray(getattr(row, name), np.float32).reshape(row.height, row.width)
        for row in rows
    }
