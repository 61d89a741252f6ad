"""UMAP and t-SNE of profiles, with scores of how well classes separate."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.core.colours import CLASS_COLORS, class_colors
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, write_csv
from perturbjax.core.messages import PLOT_TEXT, console
from perturbjax.data.splits import TRAIN
from perturbjax.dataset import PLATE
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import EmbedConfig
from perturbjax.profiles.profile_table import Profiles

#: Markers of matplotlib.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#c4c4c4"
#: Maximum number of replicates of a class that `--join` connects; more lines would hide the points.
_MAX_JOINED = 30
#: Column of features of a trained run: the part of its split that a row was in.
_PART = "Metadata_part"
_LIBRARIES = {"umap": "umap", "tsne": "openTSNE"}
_TITLES = {"umap": "UMAP", "tsne": "t-SNE"}


@dataclass(frozen=True)
class Quality:
    """How well classes separate in the features and in the 2-D embedding.

    Attributes:
        k: number of neighbors.
        purity: mean fraction of the k nearest other rows (in the features) that have the row's
            class.
        purity_2d: the same in the embedding.
        chance: expected purity of random labels: the mean fraction of other rows with the row's
            class.
        silhouette: mean silhouette of the classes in the features, -1 to 1; NaN without two classes
            of two rows.
    """

    k: int
    purity: float
    purity_2d: float
    chance: float
    silhouette: float

    def caption(self) -> str:
        """Return one sentence for the figure."""
        return (
            f"{self.k}-nearest-neighbor purity {self.purity:.3f} in the features, "
            f"{self.purity_2d:.3f} in the figure (chance {self.chance:.3f}); silhouette in the "
            f"features {self.silhouette:+.3f}"
        )


@dataclass(frozen=True)
class Embedding:
    """Profiles with 2-D coordinates: contents of the figure and of the interactive page.

    Attributes:
        points: coordinates.
        labels: class of each row.
        negcon: whether a row is a negative control.
        highlighted: classes with a color of their own.
        config: settings.
        quality: separation of classes.
        label_column: name of the label column.
        profiles: the profiles, in the same order.
        trained: rows that the network of the features was trained on; None if unknown.
    """

    points: Float[np.ndarray, "n 2"]
    labels: np.ndarray
    negcon: Bool[np.ndarray, " n"]
    highlighted: list[str]
    config: EmbedConfig
    quality: Quality
    label_column: str
    profiles: Profiles
    trained: Bool[np.ndarray, " n"] | None = None

    @property
    def caption(self) -> str:
        """Text below the figure."""
        if self.trained is None:
            return self.quality.caption()
        return (
            f"{self.quality.caption()}. Hollow: {self.trained.sum()} training rows of the network"
        )

    @property
    def title(self) -> str:
        """Title of the figure."""
        classes = len(np.unique(self.labels))
        column = self.label_column.removeprefix("Metadata_")
        name = _TITLES[self.config.method]
        return f"{name} of {len(self.labels)} profiles by {column} ({classes} classes)"

    def split_trained(
        self, rows: Bool[np.ndarray, " n"]
    ) -> Iterator[tuple[Bool[np.ndarray, " n"], bool]]:
        """Yield (rows, hollow): first rows that were not trained on, then training rows."""
        trained = np.zeros_like(rows) if self.trained is None else self.trained
        for part, hollow in ((rows & ~trained, False), (rows & trained, True)):
            if part.any():
                yield part, hollow

    def groups(self) -> list[tuple[str, Bool[np.ndarray, " n"], str, str]]:
        """Return (legend, rows, color, marker) in drawing order."""
        groups = []
        controls = np.unique(self.labels[self.negcon])
        # Negative controls of one class are only a cross; otherwise the cross lies on the color of
        # their class.
        crosses = self.negcon if len(controls) == 1 else np.zeros_like(self.negcon)
        rest = ~crosses & ~np.isin(self.labels, self.highlighted)
        if rest.any():
            legend = f"{len(np.unique(self.labels[rest]))} other classes"
            groups.append((legend, rest, GREY, "o"))
        if len(controls) == 1:
            groups.append((f"negative control ({controls[0]})", self.negcon, "black", "x"))
        colors = class_colors(self.labels)
        for i, name in enumerate(self.highlighted):
            rows = (self.labels == name) & ~crosses
            color = colors.get(name, CLASS_COLORS[i])
            groups.append((name, rows, color, MARKERS[i % len(MARKERS)]))
        if len(controls) > 1:
            groups.append(("negative controls", self.negcon, "black", "x"))
        return groups


def embed(config: EmbedConfig) -> Embedding:
    """Compute a 2-D embedding of profiles; write the figure (PNG) and the coordinates (CSV).

    Returns:
        The embedding, from which `perturbjax.report.embedding_page` writes the interactive page.

    Raises:
        InputError: A file, column or flag cannot be used, or there are fewer than four rows.
    """
    _require_library(config.method)
    from perturbjax.profiles.preparation import fit_preparation, preparation_notes
    from perturbjax.profiles.table_steps import as_table

    profiles, negcon, label = load_profiles(config.profiles)
    if len(profiles) < 4:
        raise InputError(
            f"{config.profiles.where}: {len(profiles)} rows, but an embedding needs at least four"
        )
    # Labels color the points; the preparation uses them only with relative="auto".
    labels = profiles.column(label).to_numpy()
    # An embedding has no test set: all rows are used for fitting.
    steps, features = fit_preparation(
        as_table(profiles, negcon),
        config.preparation,
        config.seed,
        pd.factorize(labels)[0],
        profiles.column(PLATE).to_numpy(),
    )
    for note in preparation_notes(steps):
        console.print(f"info: {note}")
    # A row has at most n - 1 neighbors.
    k = min(config.neighbors, len(profiles) - 1)
    if config.method == "umap":
        points = compute_umap(features, k, config.min_dist, config.seed)
    else:
        points = compute_tsne(features, k, config.seed)
    quality = measure_quality(features, points, labels, k=k)
    highlighted = choose_highlighted(features, labels, negcon, config.highlight, k=k)
    trained = _training_rows(profiles.metadata)
    embedding = Embedding(
        points, labels, negcon, highlighted, config, quality, label, profiles, trained
    )
    out = Path(config.out)
    _draw(embedding, out)
    write_csv(out.with_suffix(".csv"), profiles.metadata.assign(x=points[:, 0], y=points[:, 1]))
    console.print(f"{_TITLES[config.method]}: {quality.caption()}")
    return embedding


def _require_library(method: str) -> None:
    library = _LIBRARIES[method]
    if find_spec(library) is None:
        raise InputError(
            f"--method {method}: {library} is not installed. Run `pip install "
            "'perturbjax[features]'`."
        )


def _training_rows(metadata: pd.DataFrame) -> Bool[np.ndarray, " n"] | None:
    if _PART not in metadata.columns or not (metadata[_PART] == TRAIN).any():
        return None
    return (metadata[_PART] == TRAIN).to_numpy()


def compute_umap(
    features: Float[np.ndarray, "n d"], neighbors: int, min_dist: float, seed: int
) -> Float[np.ndarray, "n 2"]:
    """Compute a Euclidean UMAP with umap-learn; the same seed gives the same result."""
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap-learn warns that a seed disables threads
        layout = umap.UMAP(
            n_neighbors=max(neighbors, 2),
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            # The default spectral start places unconnected groups so far apart that each shrinks to
            # a dot.
            init="pca",
        )
        return np.asarray(layout.fit_transform(features.astype(np.float32)), dtype=float)


def compute_tsne(
    features: Float[np.ndarray, "n d"], perplexity: int, seed: int
) -> Float[np.ndarray, "n 2"]:
    """Compute t-SNE with openTSNE; perplexity is at most a third of the rows."""
    import openTSNE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = openTSNE.TSNE(
            # t-SNE uses three times as many neighbors as the perplexity.
            perplexity=max(1.0, min(perplexity, (len(features) - 1) / 3)),
            neighbors="exact",
            random_state=seed,
            n_jobs=1,
        )
        return np.asarray(layout.fit(features), dtype=float)


def measure_quality(
    features: Float[np.ndarray, "n d"],
    points: Float[np.ndarray, "n axes"],
    labels: np.ndarray,
    *,
    k: int,
) -> Quality:
    """Measure how well classes separate in the features and in the embedding."""
    from sklearn.metrics import silhouette_score

    number, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    repeated = counts[number] > 1  # a class of one row has no silhouette
    silhouette = float("nan")
    if 2 <= len(np.unique(number[repeated])) < repeated.sum():
        silhouette = float(silhouette_score(features[repeated], number[repeated]))
    return Quality(
        k=k,
        purity=float(neighbor_purity(features, number, k).mean()),
        purity_2d=float(neighbor_purity(points, number, k).mean()),
        chance=float(((counts[number] - 1) / (len(labels) - 1)).mean()),
        silhouette=silhouette,
    )


def neighbor_purity(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """Compute for each row the fraction of its k nearest other rows that have its label."""
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
    """Choose up to `top` classes to color: all if they are few, else those of highest purity.

    In a class of r rows at most r - 1 neighbors can have the same class, so purity is divided by
    that maximum.
    """
    if len(np.unique(labels[negcon])) == 1:  # controls of one class are drawn as crosses
        features, labels = features[~negcon], labels[~negcon]
    names, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) <= top:
        return list(names)
    purity = neighbor_purity(features, number, min(k, len(number) - 1))
    mean = np.bincount(number, purity) / counts
    # Classes of one row have no purity and come last.
    score = np.where(counts > 1, mean / np.minimum(np.maximum(counts - 1, 1) / k, 1), -1)
    return list(names[np.argsort(-score, kind="stable")[:top]])


def _draw(embedding: Embedding, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(PLOT_TEXT):
        figure, axis = plt.subplots(figsize=(9.5, 7), layout="constrained")
        _draw_groups(embedding, axis)
        axis.set(xticks=[], yticks=[], title=embedding.title)
        axis.set_xlabel("\n".join(textwrap.wrap(embedding.caption, 90)), fontsize=9)
        # Distances must have the same scale in both directions.
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


def _draw_groups(embedding: Embedding, axis: Any) -> None:
    # Marker area in points², smaller for many rows.
    size = float(np.clip(12000 / len(embedding.labels), 14, 45))
    groups = embedding.groups()
    # A few highlighted rows among hundreds of grey ones are drawn larger.
    emphasis = 2.5 if groups[0][2] == GREY else 1
    # Points are drawn above the lines between replicates, which have zorder 2.
    for order, (legend, rows, color, marker) in enumerate(groups, start=3):
        grey, control = color == GREY, marker == "x"
        factor = 0.7 if grey else 1 if control else emphasis
        if embedding.config.join and not grey and not control and rows.sum() <= _MAX_JOINED:
            x, y = embedding.points[rows].T
            for a, b in embedding.points[rows]:
                axis.plot([a, x.mean()], [b, y.mean()], color=color, lw=0.7, alpha=0.6, zorder=2)
        label: str | None = f"{textwrap.shorten(legend, 32, placeholder=' …')} · {rows.sum()}"
        for part, hollow in embedding.split_trained(rows):
            paint: dict[str, Any] = {"c": color}
            if hollow and not control:
                paint = {"facecolors": "none", "edgecolors": color}
            elif not control:
                paint["edgecolors"] = "none" if grey else "white"
            x, y = embedding.points[part].T
            axis.scatter(
                x,
                y,
                marker=marker,
                label=label,
                s=size * factor,
                zorder=order,
                **paint,
                alpha=0.6 if grey or control else 0.9,
                linewidths=0.8 if control or hollow else 0.3,
            )
            label = None  # one legend entry per group
