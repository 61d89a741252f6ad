"""Where things are: wells on their plates, and sites in the plane of the network's features."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.plates import PLATE, WELL
from perturbjax.evaluation.predictions import predicted_class_names
from perturbjax.evaluation.wells import well_ids
from perturbjax.report.pages import CLASS
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import anchor
from perturbjax.report.pages.plate_map import has_plate_positions, plate_maps
from perturbjax.report.pages.scatter import PICTURES, scatter
from perturbjax.report.run_results import Evidence

#: Points of the layout; more sites are laid out well by well, and of more wells some.
_POINTS = PICTURES
#: Columns of metadata shown beside what is known anyway.
_METADATA = 8
_PERPLEXITY, _COMPONENTS, _STEPS = 30, 50, 300
#: What a map says of wells in words of its own; metadata of these names would stand for something else.
_OWN = {CLASS, "part", "plate", "well", "sites", "site", "cells", "row", "column", "flagged"}


def plates(found: Evidence) -> str:
    """Every well that was predicted, on its plate: who trained, who judges, and how well; empty without plates."""
    table = found.predictions
    if table is None or not {PLATE, WELL} <= set(table.columns) or not has_plate_positions(table):
        return ""
    wells = _wells(found, table)
    judged = int((wells["part"] == "test").sum())
    return plate_maps(
        "plates",
        wells,
        colour="probability of the true class",
        label=f"Maps of {wells[PLATE].nunique()} plates: {judged} wells judge, the other {len(wells) - judged} trained",
        caption="Large ringed wells judge, small ones trained. Colour by anything; a click leads to the pictures of "
        "the well's class. Edges or rows that stand out point to position, not treatment.",
    )


def _wells(found: Evidence, table: pd.DataFrame) -> pd.DataFrame:
    names = predicted_class_names(table)
    values = table[[f"prob_{name}" for name in names]].to_numpy(dtype=float)
    own = pd.Index(names).get_indexer(table["label"])
    truth = np.where(own >= 0, values[np.arange(len(table)), own], np.nan)
    metadata = _telling(table)
    rows = table[["site_id", PLATE, WELL, "label", "part", *metadata]].assign(
        truth=truth, right=(table["label"] == table["predicted"]).astype(float)
    )
    if found.dataset is not None:
        measured = ["n_cells", *(f"mean_{channel}" for channel in found.dataset.channel_names)]
        rows = rows.join(found.dataset.index.set_index("site_id")[measured], on="site_id")
    groups = rows.groupby([PLATE, WELL], sort=True)
    wells = groups[["label", "part", *metadata]].first().rename(columns={"label": CLASS})
    wells["probability of the true class"] = groups["truth"].mean()
    wells["share of sites right"] = groups["right"].mean()
    for column in rows.columns.intersection(
        ["n_cells", *(c for c in rows if c.startswith("mean_"))]
    ):
        words = "cells" if column == "n_cells" else f"{column.removeprefix('mean_')} intensity"
        wells[words] = groups[column].mean()
    wells = wells.rename(
        columns={column: column.removeprefix("Metadata_") for column in metadata}
    ).reset_index()
    return wells.assign(
        sites=groups.size().to_numpy(), site=[anchor("class", name) for name in wells[CLASS]]
    )


def _telling(table: pd.DataFrame) -> list[str]:
    """Metadata that differ between wells, do not repeat the class, and are alike within a well."""
    chosen = []
    for column in (
        c for c in table.columns if c.startswith("Metadata_") and c not in (PLATE, WELL)
    ):
        values = table[column].astype(str)
        alone = values.nunique() < 2 or (values == table["label"]).all()
        alone |= column.removeprefix("Metadata_") in _OWN
        if not alone and values.groupby([table[PLATE], table[WELL]]).nunique().max() == 1:
            chosen.append(column)
    return chosen[:_METADATA]


def embedding(found: Evidence, renderer: pictures.Renderer | None) -> str:
    """The network's features in the plane, with each point's picture on hover; empty where there are too few."""
    if found.features is None or found.predictions is None:
        return ""
    points, values, by = _points(found)
    if len(points) < 8:
        return ""
    layout = lay_out(values)
    drawn = points.assign(x=layout[:, 0], y=layout[:, 1])
    label = f"{len(drawn)} {by} laid out by t-SNE of the network's features; filled ones judge, hollow ones trained"
    caption = (
        f"t-SNE (perplexity {_PERPLEXITY}) of the network's features, one point a {by.removesuffix('s')}. Filled: held "
        "out. Hollow: trained on, and therefore apart by no merit. Where the pointer is, replicates are joined to the "
        "middle of their class. Only nearness means something, not distance."
    )
    positions = (
        None
        if renderer is None
        else np.array([found.positions[site] for site in drawn["site"]], dtype=int)
    )
    return scatter("embedding", drawn, colours=[CLASS, "part", "answer", "plate"], label=label, caption=caption,
                   renderer=renderer, positions=positions)  # fmt: skip


def _points(found: Evidence) -> tuple[pd.DataFrame, np.ndarray, str]:
    """What is laid out: sites, or wells where sites are too many."""
    features, predictions = found.features, found.predictions
    assert features is not None and predictions is not None
    names = [column for column in features.columns if not column.startswith("Metadata_")]
    rows = predictions.set_index("site_id").loc[features["Metadata_site_id"]]
    points = pd.DataFrame(
        {
            "site": rows.index.to_numpy(),
            CLASS: rows["label"].to_numpy(),
            "part": rows["part"].to_numpy(),
            "answer": np.where(rows["label"] == rows["predicted"], "right", "wrong"),
            "predicted": rows["predicted"].to_numpy(),
            "plate": rows[PLATE].astype(str).to_numpy(),
            "well": rows[WELL].astype(str).to_numpy(),
        }
    )
    values, by = features[names].to_numpy(dtype=np.float64), "sites"
    if len(points) > _POINTS:
        wells, by = well_ids(rows), "wells"
        first = np.unique(wells, return_index=True)[1]
        sums = np.zeros((len(first), values.shape[1]))
        np.add.at(sums, wells, values)
        values, points = (
            sums / np.bincount(wells)[:, None],
            points.iloc[first].reset_index(drop=True),
        )
        right = (
            pd.Series(rows["label"].to_numpy() == rows["predicted"].to_numpy())
            .groupby(wells)
            .mean()
        )
        points["answer"] = np.where(right >= 0.5, "right", "wrong")
    if len(points) > _POINTS:
        kept = np.sort(np.random.default_rng(0).choice(len(points), _POINTS, replace=False))
        values, points = values[kept], points.iloc[kept].reset_index(drop=True)
    return points, values, by


def lay_out(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """t-SNE in the plane, of standardized features' first principal components; the same every time."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    deviation = features.std(axis=0)
    scaled = (features - features.mean(axis=0))[:, deviation > 0] / deviation[deviation > 0]
    if scaled.shape[1] < 2:
        return np.pad(scaled, ((0, 0), (0, 2 - scaled.shape[1])))
    parts = PCA(min(_COMPONENTS, *scaled.shape), random_state=0).fit_transform(scaled)
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    with (
        warnings.catch_warnings()
    ):  # exact: with few points quicker than the approximation, whose threads wait for each other
        warnings.simplefilter("ignore")
        return TSNE(
            perplexity=perplexity, init="pca", random_state=0, max_iter=_STEPS, method="exact"
        ).fit_transform(parts)
