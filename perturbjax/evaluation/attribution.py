"""Attribution of a network's predictions: attention or occlusion maps, and the effect of masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json, read_parquet, write_json, write_parquet
from perturbjax.data.batches.decoder import MaskChange
from perturbjax.data.mask_encodings import draw_disks
from perturbjax.dataset import Dataset
from perturbjax.evaluation.cell_attention import CELL_ATTENTION, write_cell_attention
from perturbjax.evaluation.class_attribution import CLASS_ATTRIBUTION, write_class_attribution
from perturbjax.evaluation.occlusion import occlude, summary, window_centers
from perturbjax.evaluation.scores import HEADLINE, score
from perturbjax.inference import Network

ATTRIBUTION_FILE = "attribution.json"
#: Name of the file in versions up to 0.1, which remains readable.
_FORMER_FILE = "looked.json"
ATTENTION, OCCLUSION = "attention.parquet", "occlusion.parquet"
#: Maximum number of sites for masks and attention (three extra predictions each), and for
#: occlusion.
SITES, OCCLUDED = 300, 12


UNCHANGED_MASKS = "unchanged"
MASK_CHANGES = {
    "bounding discs of the cells": MaskChange(mask_transform=draw_disks),
    "masks of another site": MaskChange(lambda masks: np.roll(masks, 1, axis=0)),
    "no masks": MaskChange(np.zeros_like),
}


def remove_attribution(out: Path) -> None:
    """Delete the files of an earlier evaluation, which can belong to another checkpoint."""
    names = (ATTRIBUTION_FILE, _FORMER_FILE, ATTENTION, OCCLUSION, CELL_ATTENTION)
    for name in (*names, CLASS_ATTRIBUTION):
        (out / name).unlink(missing_ok=True)


def write_attribution(
    network: Network,
    dataset: Dataset,
    positions: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float32[np.ndarray, "n classes"],
    out: Path,
) -> None:
    """Write `attribution.json`, and `attention.parquet` or (without attention) `occlusion.parquet`.

    A network on cells writes `cell_attention.parquet` instead; other networks also write
    `class_attribution.csv`.

    `attribution.json` has the keys `sites`; `masks` {change: {metric: value}} for networks with
    mask input; and `attention` (see `attention_contrast`), `occlusion` (see `occlusion.summary`) or
    `cell_attention` (see `cell_attention.summarize_weights`). `attention.parquet` has `site_id`,
    `height`, `width` and `attention`, the map row by row with values in (0, 1);
    `occlusion.parquet` has the same columns with `occlusion`, for the most confident site of at
    most `OCCLUDED` classes.

    Args:
        network: trained network.
        dataset: dataset of the test sites.
        positions: test sites in the dataset; at most `SITES`, evenly spaced, are used.
        labels: their classes.
        probabilities: their predictions with unchanged masks.
        out: folder.
    """
    # Evenly spaced positions cover the whole test set in the order of the index.
    selected = np.linspace(0, len(positions) - 1, min(SITES, len(positions)))
    selected = np.unique(selected.round().astype(int))
    positions, labels, probabilities = (
        positions[selected],
        labels[selected],
        probabilities[selected],
    )
    result: dict[str, Any] = {"sites": len(positions)}
    # Networks of ablations already have changed masks or images.
    if network.run.recipe.input.mask_use == "keep":
        predictions = {UNCHANGED_MASKS: probabilities}
        changed = network.apply_with_masks(dataset, positions, MASK_CHANGES)
        for name, one in zip(MASK_CHANGES, changed, strict=True):
            predictions[name] = one.probabilities
        result["masks"] = {
            name: {metric: score(labels, one)[metric] for metric in ("accuracy", HEADLINE)}
            for name, one in predictions.items()
        }
    if network.run.recipe.input.cells:
        result["cell_attention"] = write_cell_attention(network, dataset, positions, out)
        write_json(out / ATTRIBUTION_FILE, result)
        return
    write_class_attribution(network, dataset, positions, labels, probabilities, out)
    try:
        attention = network.attention_on_dataset(dataset, positions)
    except InputError:  # the network has no attention
        confident = _most_confident(positions, labels, probabilities)
        result["occlusion"] = _write_occlusion(network, dataset, confident, out)
    else:
        result["attention"] = attention_contrast(attention)
        _write_maps(out / ATTENTION, "attention", dataset, positions, attention)
    write_json(out / ATTRIBUTION_FILE, result)


def _most_confident(
    positions: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    probabilities: Float32[np.ndarray, "n classes"],
) -> Int[np.ndarray, " few"]:
    """Select the site with the highest true-class probability of each class."""
    own = pd.Series(probabilities[np.arange(len(labels)), labels])
    # One site per class. A site needs 65 predictions (64 windows and the unchanged site), so the
    # number of classes is limited.
    return positions[np.sort(own.groupby(labels).idxmax().to_numpy()[:OCCLUDED])]


def _write_occlusion(
    network: Network, dataset: Dataset, positions: Int[np.ndarray, " n"], out: Path
) -> dict[str, float]:
    drops = occlude(network, dataset, positions)
    _write_maps(out / OCCLUSION, "occlusion", dataset, positions, drops)
    # Element 1 of `pixels` is the mask.
    cells = [window_centers(dataset.pixels(int(position))[1]) for position in positions]
    return summary(drops, np.stack(cells))


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


def attention_contrast(attention: Float[np.ndarray, "n h w"]) -> dict[str, float]:
    """Summarize attention maps, as means over sites.

    Returns:
        `low` and `high`: 5th and 95th percentile within a site; `mean`; `contrast`: high - low. A
        contrast of 0 means that attention weights all positions equally.
    """
    values = attention.reshape(len(attention), -1)
    low, high = np.percentile(values, (5, 95), axis=1).mean(axis=1)
    return {
        "low": float(low),
        "high": float(high),
        "mean": float(values.mean()),
        "contrast": float(high - low),
    }


def read_attribution(folder: Path) -> dict[str, Any] | None:
    """Read `attribution.json` (or `looked.json` of earlier versions); None if there is none."""
    files = (folder / ATTRIBUTION_FILE, folder / _FORMER_FILE)
    return next((read_json(file) for file in files if file.is_file()), None)


def read_maps(folder: Path, name: str) -> dict[str, Float32[np.ndarray, "h w"]]:
    """Read the maps by site_id; empty if there are none.

    Args:
        folder: evaluation folder.
        name: "attention" or "occlusion".

    Raises:
        InputError: the file is damaged.
    """
    file = folder / f"{name}.parquet"
    if not file.is_file():
        return {}
    table = read_parquet(file, "run `perturbjax evaluate` again")
    try:
        return {
            row.site_id: np.asarray(getattr(row, name), np.float32).reshape(row.height, row.width)
            for row in table.itertuples()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: is not a table of maps ({error}); run `perturbjax evaluate` again"
        ) from error
