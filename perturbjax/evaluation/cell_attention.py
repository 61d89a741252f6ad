"""Attention of a network on cells: the weight of each cell in the prediction of its site."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int

from perturbjax.core.files import write_parquet
from perturbjax.data.bags import CellBags
from perturbjax.dataset import Dataset
from perturbjax.inference import Network
from perturbjax.training.apply_network import apply_to_sites
from perturbjax.training.step import make_cell_attention_step

CELL_ATTENTION = "cell_attention.parquet"


def write_cell_attention(
    network: Network, dataset: Dataset, positions: Int[np.ndarray, " n"], out: Path
) -> dict[str, float]:
    """Write `cell_attention.parquet`: one row for each cell of some sites.

    Columns: `site_id`; `object`, the label of the cell in the mask; `row` and `column` of its
    centroid in pixels; `attention`, its weight, with sum 1 in a site; `relative`, the weight times
    the number of cells of the site in the bag.

    Args:
        network: network on cells.
        dataset: dataset of the sites.
        positions: sites in the dataset.
        out: folder.

    Returns:
        Means over sites with cells: `cells` in the bag, and `effective` cells, the inverse of the
        sum of squared weights.
    """
    weights = compute_cell_attention(network, dataset, positions)
    bags = CellBags(dataset, network.run.recipe.input)
    site_ids = dataset.index["site_id"].to_numpy()[positions]
    tables = []
    for position, site, weight in zip(positions, site_ids, weights, strict=True):
        cells = bags.cells(int(position))
        own = weight[: len(cells)]
        tables.append(
            pd.DataFrame(
                {
                    "site_id": site,
                    "object": cells.objects,
                    "row": cells.centroids[:, 0],
                    "column": cells.centroids[:, 1],
                    "attention": own,
                    "relative": own * len(cells),
                }
            )
        )
    write_parquet(out / CELL_ATTENTION, pd.concat(tables, ignore_index=True))
    return summarize_weights(weights)


def compute_cell_attention(
    network: Network, dataset: Dataset, positions: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "n cells"]:
    """Compute the weight of each cell of sites, in the order of `CellBags.cells`; 0 for padding.

    Raises:
        InputError: the network was trained on whole sites, or the dataset does not fit.
    """
    recipe, placement = network.run.recipe, network.placement
    step = placement.compile_predict(make_cell_attention_step(network.graphdef, recipe))
    decoder = network.decoder(dataset)
    (weights,) = apply_to_sites(
        step,
        network.state["params"],
        network.state["stats"],
        lambda order: map(placement.place_rows, decoder.batches(order)),
        positions,
        network.batch_size,
        multiple=placement.batch_multiple,
    )
    return weights


def summarize_weights(weights: Float32[np.ndarray, "n cells"]) -> dict[str, float]:
    """Return the mean number of cells and of effective cells, over sites with cells."""
    weights = weights[weights.sum(axis=1) > 0]
    if not len(weights):
        return {"cells": 0.0, "effective": 0.0}
    effective = 1 / np.square(weights).sum(axis=1)
    return {"cells": float((weights > 0).sum(1).mean()), "effective": float(effective.mean())}


def read_cell_attention(folder: Path) -> pd.DataFrame | None:
    """Read `cell_attention.parquet` of an evaluation folder; None if there is none."""
    file = folder / CELL_ATTENTION
    return pd.read_parquet(file) if file.is_file() else None
