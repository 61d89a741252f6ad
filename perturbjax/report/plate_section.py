"""Plate maps of a run, and the 2-D embedding of its features."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.messages import counted
from perturbjax.core.plates import PLATE, WELL
from perturbjax.evaluation.predictions import predicted_class_names
from perturbjax.evaluation.wells import well_ids
from perturbjax.report.pages import CLASS
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import anchor
from perturbjax.report.pages.plate_map import has_plate_positions, plate_maps
from perturbjax.report.pages.scatter import PICTURES, scatter
from perturbjax.report.run_results import RunResults

#: Maximum number of points of the embedding; more sites become wells, more wells are sampled.
_POINTS = PICTURES
#: Maximum number of metadata columns on hover.
_METADATA = 8
_PERPLEXITY, _COMPONENTS, _STEPS = 30, 50, 300
#: Columns of the plate map; metadata of these names are left out.
_RESERVED = {CLASS, "part", "plate", "well", "sites", "site", "cells", "row", "column", "flagged"}
_PROBABILITY = "probability of the true class"


def plates(results: RunResults) -> str:
    """Return maps of every plate with training and test wells as HTML; empty without plates."""
    table = results.predictions
    if table is None or not {PLATE, WELL} <= set(table.columns) or not has_plate_positions(table):
        return ""
    wells = _wells(results, table)
    test = int((wells["part"] == "test").sum())
    return plate_maps(
        "plates",
        wells,
        color=_PROBABILITY,
        label=f"Maps of {counted(wells[PLATE].nunique(), 'plate')}: {counted(test, 'test well')}, "
        f"{len(wells) - test} training wells",
        caption="Large wells with a ring are test wells, small ones training wells. Select the "
        "color in the menu; a click opens the pictures of the well's class. Edges or rows with "
        "other values "
        "point to an effect of position instead of treatment.",
    )


def _wells(results: RunResults, table: pd.DataFrame) -> pd.DataFrame:
    """One row per well with class, part, metadata, scores, cell count and intensities."""
    names = predicted_class_names(table)
    values = table[[f"prob_{name}" for name in names]].to_numpy(dtype=float)
    label = pd.Index(names).get_indexer(table["label"])
    # get_indexer returns -1 for labels that are not classes of the run.
    probability = np.where(label >= 0, values[np.arange(len(table)), label], np.nan)
    metadata = _informative_columns(table)
    rows = table[["site_id", PLATE, WELL, "label", "part", *metadata]].assign(
        probability=probability, right=(table["label"] == table["predicted"]).astype(float)
    )
    measured: list[str] = []
    if results.dataset is not None:
        measured = ["n_cells", *(f"mean_{name}" for name in results.dataset.channel_names)]
        rows = rows.join(results.dataset.index.set_index("site_id")[measured], on="site_id")
    # From sites to wells: scores and measurements are averaged over sites.
    groups = rows.groupby([PLATE, WELL], sort=True)
    wells = groups[["label", "part", *metadata]].first().rename(columns={"label": CLASS})
    wells[_PROBABILITY] = groups["probability"].mean()
    wells["fraction of sites correct"] = groups["right"].mean()
    for column in measured:
        name = "cells" if column == "n_cells" else f"{column.removeprefix('mean_')} intensity"
        wells[name] = groups[column].mean()
    wells = wells.rename(columns={column: column.removeprefix("Metadata_") for column in metadata})
    wells = wells.reset_index()
    # A click on a well opens the pictures of the class.
    anchors = [anchor("class", name) for name in wells[CLASS]]
    return wells.assign(sites=groups.size().to_numpy(), site=anchors)


def _informative_columns(table: pd.DataFrame) -> list[str]:
    """Metadata that differ between wells, agree within a well, and do not repeat the class."""
    chosen = []
    for column in table.columns:
        name = column.removeprefix("Metadata_")
        if column == name or column in (PLATE, WELL) or name in _RESERVED:
            continue
        values = table[column].astype(str)
        if values.nunique() < 2 or (values == table["label"]).all():
            continue
        if values.groupby([table[PLATE], table[WELL]]).nunique().max() == 1:
            chosen.append(column)
    return chosen[:_METADATA]


def embedding(results: RunResults, renderer: pictures.Renderer | None) -> str:
    """Return a t-SNE of the features with pictures on hover as HTML, empty below 8 points."""
    if results.features is None or results.predictions is None:
        return ""
    points, values, unit = _points(results)
    if len(points) < 8:
        return ""
    layout = compute_tsne(values)
    table = points.assign(x=layout[:, 0], y=layout[:, 1])
    positions = None
    if renderer is not None:
        positions = np.array([results.positions[site] for site in table["site"]], dtype=int)
    return scatter(
        "embedding",
        table,
        colors=[CLASS, "part", "prediction", "plate"],
        label=f"t-SNE of the features of {len(table)} {unit}; filled: test set, hollow: "
        "training set",
        caption=f"t-SNE (perplexity {_PERPLEXITY}) of the network's features, one point per "
        f"{unit.removesuffix('s')}. Filled: test set. Hollow: training set, whose separation is no "
        "evidence. On hover, points of one class are joined to their centroid. Only "
        "neighborhoods are "
        "meaningful, not distances.",
        renderer=renderer,
        positions=positions,
    )


def _points(results: RunResults) -> tuple[pd.DataFrame, np.ndarray, str]:
    """Points with metadata, their features, and their unit: sites, or wells for many sites."""
    features, predictions = results.features, results.predictions
    assert features is not None and predictions is not None
    names = [column for column in features.columns if not column.startswith("Metadata_")]
    rows = predictions.set_index("site_id").loc[features["Metadata_site_id"]]
    right = (rows["label"] == rows["predicted"]).to_numpy()
    points = pd.DataFrame(
        {
            "site": rows.index.to_numpy(),
            CLASS: rows["label"].to_numpy(),
            "part": rows["part"].to_numpy(),
            "prediction": np.where(right, "right", "wrong"),
            "predicted": rows["predicted"].to_numpy(),
            "plate": rows[PLATE].astype(str).to_numpy(),
            "well": rows[WELL].astype(str).to_numpy(),
        }
    )
    values, unit = features[names].to_numpy(dtype=np.float64), "sites"
    if len(points) > _POINTS:
        wells, unit = well_ids(rows), "wells"
        # Metadata of a well come from the first site.
        first = np.unique(wells, return_index=True)[1]
        sums = np.zeros((len(first), values.shape[1]))
        np.add.at(sums, wells, values)
        sites = np.bincount(wells)
        values, points = sums / sites[:, None], points.iloc[first].reset_index(drop=True)
        # A well counts as right if at least half of the sites are right.
        fraction = np.bincount(wells, right) / sites
        points["prediction"] = np.where(fraction >= 0.5, "right", "wrong")
    if len(points) > _POINTS:
        # A fixed seed gives the same page for the same run.
        sample = np.sort(np.random.default_rng(0).choice(len(points), _POINTS, replace=False))
        values, points = values[sample], points.iloc[sample].reset_index(drop=True)
    return points, values, unit


def compute_tsne(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Compute t-SNE of the first 50 principal components of standardized features."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    if scaled.shape[1] < 2:
        # Fewer than two varying features: add zeros to obtain two axes.
        return np.pad(scaled, ((0, 0), (0, 2 - scaled.shape[1])))
    # PCA first: t-SNE on fewer dimensions is faster and less noisy.
    components = min(_COMPONENTS, *scaled.shape)
    reduced = PCA(components, random_state=0).fit_transform(scaled)
    tsne = TSNE(
        perplexity=min(_PERPLEXITY, (len(features) - 1) / 3),
        init="pca",
        random_state=0,
        max_iter=_STEPS,
    )
    # One thread: with few points, several threads wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        return tsne.fit_transform(reduced)
