"""Interactive page of `perturbjax embed`: metadata and cells of every point on hover."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.data.splits import TEST, TRAIN
from perturbjax.dataset import open_dataset
from perturbjax.profiles.embedding import GREY, Embedding
from perturbjax.profiles.profile_table import SITE_ID, Profiles
from perturbjax.report.pages import CLASS, Section, page
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.scatter import scatter

#: Maximum number of metadata columns on hover.
_HOVER = 8


def write_page(embedding: Embedding, profiles: Profiles, path: Path) -> Path:
    """Write the page: one file that loads nothing from a network.

    Args:
        embedding: coordinates and classes.
        profiles: the profiles, in the same order.
        path: file to write.

    Returns:
        `path`.
    """
    quality = embedding.quality
    lead = (
        f'<p class="verdict">{html_text(embedding.title)}</p><p>Of the {quality.k} nearest '
        f"neighbors of a row, {quality.purity:.0%} have its class by features, "
        f"{quality.purity_2d:.0%} "
        f"in this embedding, and {quality.chance:.0%} by chance. Silhouette of the classes by "
        "features: "
        f"{quality.silhouette:+.2f} (-1: mixed, 1: separated).</p>"
    )
    caption = "One point per row."
    if embedding.negcon.any():
        caption += " Crosses are negative controls."
    if embedding.trained is not None and embedding.trained.any():
        caption += (
            f" Hollow: {int(embedding.trained.sum())} training rows of the network, whose "
            "separation is no evidence."
        )
    caption += (
        " On hover, rows of one class are joined to their centroid. Only neighborhoods are "
        "meaningful, not distances."
    )
    renderer, positions = _cells(embedding, profiles)
    drawing = scatter(
        "layout",
        _points(embedding, profiles.metadata),
        colors=[CLASS, *_informative_columns(profiles.metadata, embedding.label_column)],
        label=f"{embedding.title}, one point per row",
        caption=caption,
        renderer=renderer,
        positions=positions,
        palette=_palette(embedding),
    )
    sections = [Section("features", "2-D embedding", drawing)]
    with atomic(path) as temporary:
        body = page(f"perturbjax embed: {path.stem}", lead, sections)
        temporary.write_text(body, encoding="utf-8")
    return path


def _palette(embedding: Embedding) -> dict[str, str]:
    """Color of each class; negative controls of one class, drawn as crosses, are gray."""
    controls = np.unique(embedding.labels[embedding.negcon])
    gray = {str(controls[0]): GREY} if len(controls) == 1 else {}
    return gray | {
        name: color
        for name, _, color, marker in embedding.groups()
        if color != GREY and marker != "x"
    }


def _points(embedding: Embedding, metadata: pd.DataFrame) -> pd.DataFrame:
    points = pd.DataFrame(
        {"x": embedding.points[:, 0], "y": embedding.points[:, 1], CLASS: embedding.labels}
    )
    if embedding.trained is not None:
        points["part"] = np.where(embedding.trained, TRAIN, TEST)
    for name in _informative_columns(metadata, embedding.label_column):
        points[name] = metadata[f"Metadata_{name}"].to_numpy()
    if embedding.negcon.any():
        points["control"] = embedding.negcon.astype(int)
    return points


def _informative_columns(metadata: pd.DataFrame, label: str) -> list[str]:
    """Metadata that differ between rows, without their prefix."""
    reserved = {"x", "y", CLASS, "part", "control", "picture", SITE_ID}
    names = [
        column.removeprefix("Metadata_")
        for column in metadata.columns
        if column.startswith("Metadata_") and column != label and metadata[column].nunique() > 1
    ]
    return [name for name in names if name not in reserved][:_HOVER]


def _cells(
    embedding: Embedding, profiles: Profiles
) -> tuple[pictures.Renderer | None, np.ndarray | None]:
    """A renderer of the dataset of the features, and the dataset row of each profile, or None."""
    data = embedding.config.profiles.source.data
    if not data:
        return None, None
    try:
        dataset = open_dataset(data)
    except InputError:
        return None, None
    sites = dataset.index["site_id"]
    if embedding.config.profiles.aggregate != "none":  # a well is drawn by its first site
        wells = dataset.index[PLATE].str.cat(dataset.index[WELL], sep="_")
        # The first site takes the name of the well; other sites retain unique names.
        sites = wells.where(~wells.duplicated(), sites)
    positions = pd.Index(sites).get_indexer(profiles.metadata[SITE_ID])
    if (positions < 0).any():
        return None, None
    return pictures.make_renderer(dataset), positions
