"""UMAP and t-SNE of profiles, with numbers beside the picture so that the picture is not the only claim."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, write_csv
from perturbjax.core.messages import PLOT_TEXT, console
from perturbjax.data.splits import TRAIN
from perturbjax.dataset import PLATE
from perturbjax.profiles.classify import load_profiles, notes_of, prepared
from perturbjax.profiles.profile_options import EmbedConfig

#: Colours told apart by most eyes (Okabe & Ito, then Tol's muted), in the order in which classes take them.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288",
    "#117733", "#AA4499", "#999933", "#661100", "#44AA99", "#6699CC", "#DDCC77", "#AA4466",
)  # fmt: skip
#: matplotlib's markers.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#c4c4c4"
#: Greatest number of replicates that lines join; a star of hundreds hides what it joins.
_JOINED = 30
#: Says of the features of a run which part of its split a row was in.
_PART = "Metadata_part"


@dataclass(frozen=True)
class Quality:
    """How well classes hold together, in the features before the layout and in the layout."""

    k: int
    purity: float
    """Mean share of a row's k nearest other rows (in the features) that are of its class."""
    purity_2d: float
    """The same in the layout."""
    chance: float
    """What that share would be if labels were dealt at random: the mean share of each row's class among the others."""
    silhouette: float
    """Mean silhouette of the labels in the features, -1 to 1; NaN with fewer than two classes of two rows."""

    def caption(self) -> str:
        """One sentence for the figure."""
        return (
            f"{self.k}-nearest-neighbour purity {self.purity:.3f} in the features, {self.purity_2d:.3f} in the plane "
            f"(chance {self.chance:.3f}); silhouette in the features {self.silhouette:+.3f}"
        )


def embed(config: EmbedConfig) -> Path:
    """Lay profiles out in the plane; write a PNG, an interactive HTML and the coordinates as CSV.

    Returns:
        the picture's path.

    Raises:
        InputError: a file, column or flag cannot be used, or there are fewer than four rows.
    """
    _require(config.method)
    import matplotlib

    from perturbjax.profiles.preparation import as_table
    from perturbjax.report.embedding_page import write_page

    out = Path(config.out)
    profiles, negcon, label = load_profiles(config.profiles)
    if len(profiles) < 4:
        raise InputError(
            f"{config.profiles.where}: {len(profiles)} rows; a layout needs four or more"
        )
    labels = profiles.column(label).to_numpy()
    plates = profiles.column(PLATE).to_numpy()
    steps, features = prepared(
        as_table(profiles, negcon), config.preparation, config.seed, pd.factorize(labels)[0], plates
    )
    for note in (*profiles.notes, *notes_of(steps)):
        console.print(f"features: {note}")
    neighbours = min(config.neighbors, len(profiles) - 1)
    if config.method == "umap":
        points = lay_out_umap(features, neighbours, config.min_dist, config.seed)
    else:
        points = lay_out_tsne(features, neighbours, config.seed)
    quality = measure(features, points, labels, k=neighbours)
    chosen = choose_highlighted(features, labels, negcon, config.highlight, k=neighbours)
    picture = Picture(
        points, labels, negcon, chosen, config, quality, label, _trained(profiles.metadata)
    )
    with matplotlib.rc_context(PLOT_TEXT):
        _draw(picture, out)
    write_page(picture, profiles, out.with_suffix(".html"))
    write_csv(out.with_suffix(".csv"), profiles.metadata.assign(x=points[:, 0], y=points[:, 1]))
    console.print(f"{config.method}: {quality.caption()}")
    return out


def _require(method: str) -> None:
    library = {"umap": "umap", "tsne": "openTSNE"}[method]
    if find_spec(library) is None:
        raise InputError(
            f"--method {method}: {library} is not installed; run `pip install 'perturbjax[features]'`"
        )


def _trained(metadata: pd.DataFrame) -> Bool[np.ndarray, " n"] | None:
    """Which rows a run was trained on, as its features' table says."""
    if _PART not in metadata.columns or not (metadata[_PART] == TRAIN).any():
        return None
    return (metadata[_PART] == TRAIN).to_numpy()


def lay_out_umap(
    features: Float[np.ndarray, "n d"], neighbours: int, min_dist: float, seed: int
) -> Float[np.ndarray, "n 2"]:
    """UMAP by umap-learn, Euclidean; the same seed gives the same layout."""
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed makes it single-threaded is what is wanted
        layout = umap.UMAP(
            n_neighbors=max(neighbours, 2),
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            init="pca",  # a spectral start throws unconnected groups so far apart that the rest becomes a dot
        )
        return np.asarray(layout.fit_transform(features.astype(np.float32)), dtype=float)


def lay_out_tsne(
    features: Float[np.ndarray, "n d"], perplexity: int, seed: int
) -> Float[np.ndarray, "n 2"]:
    """t-SNE by openTSNE, started from principal components; perplexity at most a third of the rows."""
    import openTSNE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = openTSNE.TSNE(
            perplexity=max(1.0, min(perplexity, (len(features) - 1) / 3)),
            neighbors="exact",
            random_state=seed,
            n_jobs=1,
        )
        return np.asarray(layout.fit(features), dtype=float)


def measure(
    features: Float[np.ndarray, "n d"],
    points: Float[np.ndarray, "n axes"],
    labels: np.ndarray,
    *,
    k: int,
) -> Quality:
    """How well `labels` hold together among `features` and among `points`."""
    from sklearn.metrics import silhouette_score

    number, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    repeated = counts[number] > 1  # a class of one row has no silhouette
    classes = len(np.unique(number[repeated]))
    defined = 2 <= classes < repeated.sum()
    return Quality(
        k=k,
        purity=float(neighbour_purity(features, number, k).mean()),
        purity_2d=float(neighbour_purity(points, number, k).mean()),
        chance=float(((counts[number] - 1) / (len(labels) - 1)).mean()),
        silhouette=float(silhouette_score(features[repeated], number[repeated]))
        if defined
        else float("nan"),
    )


def neighbour_purity(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """For every row the share of its k nearest other rows that have its label."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=k).fit(features).kneighbors(return_distance=False)
    return (labels[nearest] == labels[:, None]).mean(axis=1)


def choose_highlighted(
    features: Float[np.ndarray, "n d"],
    labels: np.ndarray,
    negcon: Bool[np.ndarray, " n"],
    top: int,
    *,
    k: int,
) -> list[str]:
    """Classes that get a colour: all where there are few, else those whose rows find most of their own class nearby.

    Of a class with r rows at most r - 1 neighbours can be its own, so purity is taken relative to that.
    """
    if len(np.unique(labels[negcon])) == 1:  # they are a class of their own and get a cross
        features, labels = features[~negcon], labels[~negcon]
    names, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) <= top:
        return list(names)
    purity = neighbour_purity(features, number, min(k, len(number) - 1))
    mean = np.bincount(number, purity) / counts
    score = np.where(counts > 1, mean / np.minimum(np.maximum(counts - 1, 1) / k, 1), -1)
    return list(names[np.argsort(-score, kind="stable")[:top]])


@dataclass(frozen=True)
class Picture:
    """All that is drawn."""

    points: Float[np.ndarray, "n 2"]
    labels: np.ndarray
    negcon: Bool[np.ndarray, " n"]
    chosen: list[str]
    config: EmbedConfig
    quality: Quality
    label_column: str
    trained: Bool[np.ndarray, " n"] | None = None
    """Rows that the network of the features was trained on; None where nothing is known of it."""

    @property
    def caption(self) -> str:
        """Sentences for the figure."""
        if self.trained is None:
            return self.quality.caption()
        return f"{self.quality.caption()}. Hollow: the {self.trained.sum()} rows that its network was trained on"

    def sides(self, rows: Bool[np.ndarray, " n"]) -> Iterator[tuple[Bool[np.ndarray, " n"], bool]]:
        """Of these rows those that were held out, and those that were trained on: (rows, whether hollow)."""
        known = np.zeros_like(rows) if self.trained is None else self.trained
        for part, hollow in ((rows & ~known, False), (rows & known, True)):
            if part.any():
                yield part, hollow

    def title(self) -> str:
        """What is shown."""
        name = {"umap": "UMAP", "tsne": "t-SNE"}[self.config.method]
        classes = len(np.unique(self.labels))
        column = self.label_column.removeprefix("Metadata_")
        return f"{name} of {len(self.labels)} profiles by {column} ({classes} classes)"

    def groups(self) -> list[tuple[str, Bool[np.ndarray, " n"], str, str]]:
        """(legend, rows, colour, marker) in drawing order."""
        found = []
        names = np.unique(self.labels[self.negcon])
        # Where negative controls are one class, the cross is their colour; else it lies on the colour of their class.
        apart = self.negcon if len(names) == 1 else np.zeros_like(self.negcon)
        others = ~apart & ~np.isin(self.labels, self.chosen)
        if others.any():
            found.append(
                (f"{len(np.unique(self.labels[others]))} other classes", others, GREY, "o")
            )
        if len(names) == 1:
            found.append((f"negative control ({names[0]})", self.negcon, "black", "x"))
        for i, name in enumerate(self.chosen):
            rows = (self.labels == name) & ~apart
            found.append((name, rows, COLOURS[i], MARKERS[i % len(MARKERS)]))
        if len(names) > 1:
            found.append(("negative controls", self.negcon, "black", "x"))
        return found


def _draw(picture: Picture, path: Path) -> None:
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 7), layout="constrained")
    size = float(np.clip(12000 / len(picture.labels), 14, 45))
    groups = picture.groups()
    few = (
        2.5 if groups[0][2] == GREY else 1
    )  # a handful among hundreds of grey rows has to be found
    for order, (legend, rows, colour, marker) in enumerate(groups, start=3):
        grey, control = colour == GREY, marker == "x"
        emphasis = 0.7 if grey else 1 if control else few
        x, y = picture.points[rows].T
        if picture.config.join and not grey and not control and rows.sum() <= _JOINED:
            for a, b in picture.points[rows]:
                axis.plot([a, x.mean()], [b, y.mean()], color=colour, lw=0.7, alpha=0.6, zorder=2)
        rim: dict[str, Any] = {} if control else {"edgecolors": "none" if grey else "white"}
        name: str | None = f"{textwrap.shorten(legend, 32, placeholder=' …')} · {rows.sum()}"
        for part, hollow in picture.sides(rows):
            open_rim: dict[str, Any] = {"facecolors": "none", "edgecolors": colour}
            paint: dict[str, Any] = open_rim if hollow and not control else {"c": colour, **rim}
            across, up = picture.points[part].T
            axis.scatter(
                across, up, marker=marker, label=name, s=size * emphasis,
                alpha=0.6 if grey or control else 0.9, linewidths=0.8 if control or hollow else 0.3, **paint,
                zorder=order,
            )  # fmt: skip
            name = None
    axis.set(xticks=[], yticks=[], title=picture.title())
    axis.set_xlabel("\n".join(textwrap.wrap(picture.caption, 90)), fontsize=9)
    axis.set_aspect("equal", adjustable="datalim")
    axis.spines[["top", "right", "left", "bottom"]].set_color("0.8")
    axis.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=9,
        title="class · rows",
        markerscale=1.2,
    )
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
