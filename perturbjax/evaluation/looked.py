"""What a network looked at: where its attention lets the image through, and what its score owes to the masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int

from perturbjax.console import InputError
from perturbjax.dataset import Dataset
from perturbjax.evaluation.scores import HEADLINE, score
from perturbjax.files import read_json, write_json, write_parquet
from perturbjax.training.predict import Predictions
from perturbjax.training.run import Run

LOOKED, ATTENTION = "looked.json", "attention.parquet"
#: Sites that are looked at, at most: each is answered three times more.
SITES = 1000
#: What is done to the masks of a batch, by what it is called.
MASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda masks: masks,
    "of another site": lambda masks: np.roll(masks, 1, axis=0),
    "taken away": np.zeros_like,
}


@runtime_checkable
class Asked(Protocol):
    """What is asked of a network (`inference.Network`)."""

    @property
    def run(self) -> Run: ...

    def with_masks(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"], change: Callable[[np.ndarray], np.ndarray]
    ) -> Predictions: ...

    def attention_to(self, dataset: Dataset, positions: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n h2 w2"]: ...


def look(
    network: Asked, dataset: Dataset, positions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], out: Path
) -> None:
    """Write `looked.json`, and `attention.parquet` where the network has attention.

    `looked.json` holds `sites`; `masks` {what is done to them: {metric: value}}, of networks that are given masks; and
    `attention` {low, high, mean, contrast}: the 5th and 95th percentile over the places of a site and their mean, as
    means over sites, and high minus low. A contrast of 0 lets everything through alike: then the mask gates nothing.
    `attention.parquet` has `site_id`, `height`, `width` (places) and `attention`, the places row by row, in (0, 1).

    Args:
        positions: sites that judge, at most `SITES` of which are looked at, evenly chosen.
        labels: their classes.
    """
    chosen = np.unique(np.linspace(0, len(positions) - 1, min(SITES, len(positions))).round().astype(int))
    positions, labels = positions[chosen], labels[chosen]
    found: dict[str, Any] = {"sites": len(positions)}
    if network.run.recipe.input.mask_use == "keep":
        answers = {name: network.with_masks(dataset, positions, change) for name, change in MASKS.items()}
        found["masks"] = {
            name: {metric: score(labels, answer.probabilities)[metric] for metric in ("accuracy", HEADLINE)}
            for name, answer in answers.items()
        }
    try:
        attention = network.attention_to(dataset, positions)
    except InputError:  # the network has none
        attention = None
    if attention is not None:
        found["attention"] = spread(attention)
        table = pd.DataFrame({"site_id": dataset.index["site_id"].to_numpy()[positions]})
        table = table.assign(height=attention.shape[1], width=attention.shape[2])
        table["attention"] = list(attention.reshape(len(attention), -1))
        write_parquet(out / ATTENTION, table)
    write_json(out / LOOKED, found)


def spread(attention: Float[np.ndarray, "n h w"]) -> dict[str, float]:
    """How unequally places of a site are let through, as means over sites; see `look`."""
    places = attention.reshape(len(attention), -1)
    low, high = np.percentile(places, (5, 95), axis=1).mean(axis=1)
    return {"low": float(low), "high": float(high), "mean": float(places.mean()), "contrast": float(high - low)}


def read_looked(folder: Path) -> dict[str, Any] | None:
    """What `look` wrote there; None where it wrote nothing."""
    return read_json(folder / LOOKED) if (folder / LOOKED).is_file() else None


def read_attention(folder: Path) -> dict[str, Float32[np.ndarray, "h w"]]:
    """The map of each site, by its site_id; empty where the network has no attention."""
    if not (folder / ATTENTION).is_file():
        return {}
    rows = pd.read_parquet(folder / ATTENTION).itertuples()
    return {row.site_id: np.asarray(row.attention, np.float32).reshape(row.height, row.width) for row in rows}
