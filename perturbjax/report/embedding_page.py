"""The layout of `perturbjax embed` as a page: what a point is where the pointer is, its cells where they are known."""

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

#: At most so many metadata columns are shown where the mouse points.
_HOVER = 8


def write_page(picture: Embedding, profiles: Profiles, path: Path) -> Path:
    """One file that asks nothing of a network: points with their metadata on hover, and their coordinates as CSV."""
    quality = picture.quality
    lead = (
        f'<p class="verdict">{html_text(picture.title)}</p><p>Of the {quality.k} rows nearest to a row, '
        f"{quality.purity:.0%} are of its class in the features, {quality.purity_2d:.0%} in this plane, and "
        f"{quality.chance:.0%} by chance. Silhouette of the classes in the features {quality.silhouette:+.2f} (from "
        "-1, mixed up, to 1, apart).</p>"
    )
    trained = 0 if picture.trained is None else int(picture.trained.sum())
    rim = (
        f" Hollow: the {trained} rows that its network was trained on, apart by no merit."
        if trained
        else ""
    )
    cross = " Crosses are negative controls." if picture.negcon.any() else ""
    renderer, positions = _cells(picture, profiles)
    drawn = scatter(
        "layout",
        _points(picture, profiles.metadata),
        colours=[CLASS, *_telling(profiles.metadata, picture.label_column)],
        label=f"{picture.title}, one point a row",
        caption=f"One point a row of the table.{cross}{rim} Where the pointer is, rows of one class are joined to "
        "their middle. Only nearness means something, not distance.",
        renderer=renderer,
        positions=positions,
        palette=_palette(picture),
    )
    with atomic(path) as temporary:
        body = page(
            f"perturbjax embed: {path.stem}",
            lead,
            [Section("features", "Features in the plane", drawn)],
        )
        temporary.write_text(body, encoding="utf-8")
    return path


def _palette(picture: Embedding) -> dict[str, str]:
    """Colours of classes; controls of one class, which are crosses, have that of no class."""
    named = np.unique(picture.labels[picture.negcon])
    crossed = {str(named[0]): GREY} if len(named) == 1 else {}
    return crossed | {
        name: colour
        for name, _, colour, marker in picture.groups()
        if colour != GREY and marker != "x"
    }


def _points(picture: Embedding, metadata: pd.DataFrame) -> pd.DataFrame:
    points = pd.DataFrame(
        {"x": picture.points[:, 0], "y": picture.points[:, 1], CLASS: picture.labels}
    )
    if picture.trained is not None:
        points["part"] = np.where(picture.trained, TRAIN, TEST)
    for name in _telling(metadata, picture.label_column):
        points[name] = metadata[f"Metadata_{name}"].to_numpy()
    return points.assign(control=picture.negcon.astype(int)) if picture.negcon.any() else points


def _telling(metadata: pd.DataFrame, label: str) -> list[str]:
    """Metadata that differ between rows, as they are called without their prefix."""
    taken = {"x", "y", CLASS, "part", "control", "picture", SITE_ID}
    found = [
        column.removeprefix("Metadata_")
        for column in metadata.columns
        if column.startswith("Metadata_") and column != label and metadata[column].nunique() > 1
    ]
    return [name for name in found if name not in taken][:_HOVER]


def _cells(
    picture: Embedding, profiles: Profiles
) -> tuple[pictures.Renderer | None, np.ndarray | None]:
    """A painter of the dataset that the features were extracted from, and where each row's site stands in it."""
    data = picture.config.profiles.source.data
    if not data:
        return None, None
    try:
        dataset = open_dataset(data)
    except InputError:
        return None, None
    sites = dataset.index["site_id"]
    if (
        picture.config.profiles.aggregate != "none"
    ):  # a well is shown by its first site, and called by its place
        wells = dataset.index[PLATE].str.cat(dataset.index[WELL], sep="_")
        sites = wells.where(~wells.duplicated(), sites)
    positions = pd.Index(sites).get_indexer(profiles.metadata[SITE_ID])
    return (pictures.renderer(dataset), positions) if (positions >= 0).all() else (None, None)
