"""Static figures of matrices, plates and rankings, each written as PNG, SVG and PDF.

Charts with axes are drawn by `perturbjax.report.svg`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import PLOT_TEXT
from perturbjax.core.plates import PLATE, WELL, parse_wells, row_name, smallest_plate_shape
from perturbjax.evaluation.evaluation_result import EvaluationResult, rank_rows
from perturbjax.evaluation.scores import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colors with one meaning in all figures, suitable for color blindness (Wong 2011, Nat Methods 8,
#: 441).
BLUE, GREY = "#0072B2", "#8A8A8A"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
#: Maximum numbers for which names and values fit.
_NAMED_CLASSES, _NUMBERED_CLASSES, _PLATES = 45, 20, 12


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of width × height inches, and write it as PNG, SVG and PDF at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | PLOT_TEXT):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        # Without a date, the same results give the same file.
        for suffix, date in (("png", ()), ("svg", ("Date",)), ("pdf", ("CreationDate",))):
            with atomic(Path(path).with_suffix(f".{suffix}")) as temporary:
                facts = dict.fromkeys(date)
                figure.savefig(temporary, format=suffix, metadata=facts)
            # The first file determines the layout, because computing it takes most of the time.
            figure.set_layout_engine(None)


def plot_ranking(evaluation: EvaluationResult, path: Path, title: str) -> Path:
    """Plot accuracy and balanced accuracy of several models and baselines, by site.

    Filled symbols are test scores with intervals, hollow symbols training scores."""
    level = evaluation.levels[0]
    rows = rank_rows(level, [row.name for row in level.rows])[::-1]
    with _figure(path, 10, 1.6 + 0.34 * len(rows)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(panels, ("accuracy", "balanced_accuracy"), strict=True):
            for y, row in enumerate(rows):
                score, colour = row.scores[metric], GREY if row.baseline else BLUE
                axes.plot([score.low, score.high], [y, y], color=colour, linewidth=2)
                axes.plot(score.value, y, "o", color=colour, markersize=7)
                if row.name in evaluation.train:
                    trained = evaluation.train[row.name][metric]
                    axes.plot(trained, y, "o", markerfacecolor="none", color=colour, markersize=7)
                axes.annotate(
                    f"{score.value:.3f}",
                    (score.value, y),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
            axes.set(xlim=(-0.03, 1.05), ylim=(-0.6, len(rows) - 0.3), xlabel=METRICS[metric].words)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(
            "filled: test, with 95 % interval (whole wells resampled); hollow: training; "
            "grey: baselines",
            fontsize=9,
        )
    return Path(path)


def plot_confusion(
    matrix: Int[np.ndarray, "classes classes"], class_names: Sequence[str], path: Path
) -> Path:
    """Plot the fraction of each true class (row) predicted as each class (column).

    Rows are classes in the truth, columns classes in the truth or the predictions, both sorted by
    frequency.
    """
    from matplotlib.colors import PowerNorm

    truth = matrix.sum(axis=1)
    order = np.argsort(-truth, kind="stable")
    rows = [i for i in order if truth[i] > 0]
    columns = [i for i in order if truth[i] > 0 or matrix[:, i].sum() > 0]
    share = matrix[np.ix_(rows, columns)] / truth[rows][:, None]
    named = max(len(rows), len(columns)) <= _NAMED_CLASSES
    side = 2.2 + 0.34 * len(columns) if named else 8.0
    with _figure(path, max(side + 1.2, 5), max(side, 4)) as figure:
        axes = figure.subplots()
        image = axes.imshow(
            # The square-root scale makes small fractions visible.
            share,
            cmap="Blues",
            norm=PowerNorm(0.5, 0, 1),
            aspect="auto",
            interpolation="nearest",
        )
        bar = figure.colorbar(
            image, ax=axes, label="fraction of the true class", ticks=[0, 0.05, 0.2, 0.5, 1]
        )
        bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"])
        axes.grid(visible=False)
        if named:
            axes.set_xticks(
                range(len(columns)),
                [class_names[i] for i in columns],
                rotation=60,
                ha="right",
                rotation_mode="anchor",
            )
            axes.set_yticks(range(len(rows)), [f"{class_names[i]} ({truth[i]})" for i in rows])
        else:
            _name_frequent_columns(axes, matrix, columns, class_names)
        if len(columns) <= _NUMBERED_CLASSES:
            for (row, column), value in np.ndenumerate(share):
                if value >= 0.005:
                    colour = "white" if value > 0.4 else "black"
                    axes.text(
                        column,
                        row,
                        f"{100 * value:.0f}",
                        ha="center",
                        va="center",
                        color=colour,
                        fontsize=7,
                    )
        title = "confusion of test sites"
        title += ", in % of the true class" if len(columns) <= _NUMBERED_CLASSES else ""
        title += (
            ""
            if named
            else f": {len(columns)} classes, most frequent first; the most predicted have labels"
        )
        axes.set(
            title=title,
            xlabel="predicted class",
            ylabel="true class (sites)" if named else "true class",
        )
    return Path(path)


def _name_frequent_columns(
    axes: Axes, matrix: np.ndarray, columns: Sequence[int] | np.ndarray, class_names: Sequence[str]
) -> None:
    """Label the ten most predicted classes if their labels do not overlap."""
    predicted = matrix.sum(axis=0)[columns]
    chosen: list[int] = []
    for column in np.argsort(-predicted, kind="stable")[:10]:
        if all(abs(column - other) > 0.025 * len(columns) for other in chosen):
            chosen.append(int(column))
    axes.set_xticks(
        chosen,
        [class_names[columns[column]] for column in chosen],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks([])


def plot_recall(table: pd.DataFrame, path: Path) -> Path:
    """Plot the recall of each class, from the table of `scores.per_class`.

    With many classes: the largest classes by name, and a histogram of all.
    """
    present = table[table["sites"] > 0].sort_values("sites", ascending=False, kind="stable")
    crowded = len(present) > _NAMED_CLASSES
    rows = present.head(30 if crowded else len(present)).sort_values(
        "recall", ascending=False, kind="stable"
    )
    with _figure(path, 9 if crowded else 6.5, 0.2 * len(rows) + 1.1) as figure:
        panels = figure.subplots(
            1, 2 if crowded else 1, width_ratios=[3, 2] if crowded else None, squeeze=False
        )[0]
        axes = panels[0]
        axes.barh(np.arange(len(rows)), rows["recall"], color=BLUE, height=0.72)
        names = [f"{row['class']} ({row['sites']}, {row['wells']})" for _, row in rows.iterrows()]
        axes.set_yticks(np.arange(len(rows)), names)
        axes.set(
            xlim=(0, 1),
            ylim=(len(rows) - 0.4, -0.6),
            xlabel="recall (fraction of sites recognized)",
        )
        axes.set_title(
            (f"{len(rows)} most frequent classes" if crowded else "all classes") + " (sites, wells)"
        )
        axes.grid(axis="y", visible=False)
        if crowded:
            panels[1].hist(present["recall"], bins=np.linspace(0, 1, 21), color=BLUE)
            panels[1].set(
                title=f"all {len(present)} classes", xlabel="recall", ylabel="classes", xlim=(0, 1)
            )
            panels[1].set_box_aspect(0.8)
            panels[1].set_anchor("N")
    return Path(path)


def plot_plates(
    index: pd.DataFrame,
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    path: Path,
) -> Path:
    """Plot plate maps of the test wells, colored by the mean probability of the true class.

    At most 12 plates, those with most wells. Patterns along edges or rows are position effects.

    Raises:
        InputError: well names give no position.
    """
    spots = parse_wells(index[WELL])
    if (spots < 0).any():
        raise InputError(f"{WELL}: wells are not named like A01; no plate map can be drawn")
    wells = pd.DataFrame(
        {
            "plate": index[PLATE].to_numpy(),
            "row": spots[:, 0],
            "column": spots[:, 1],
            "true": probabilities[np.arange(len(labels)), labels],
        }
    )
    wells = wells.groupby(["plate", "row", "column"], as_index=False)["true"].mean()
    plates = list(wells["plate"].value_counts(sort=True).index[:_PLATES])
    height, width = smallest_plate_shape(spots)
    across = min(len(plates), 3 if width > 12 else 4)
    # Ceiling division: number of rows of panels.
    down = -(-len(plates) // across)
    with _figure(path, 3.4 * across + 1, down * (3.4 * height / width + 0.45) + 0.4) as figure:
        panels = np.ravel(figure.subplots(down, across, squeeze=False))
        for axes, plate in zip(panels, sorted(plates), strict=False):
            grid = np.full((height, width), np.nan)
            here = wells[wells["plate"] == plate]
            grid[here["row"], here["column"]] = here["true"]
            axes.set_facecolor("#F2F2F2")
            image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=max(wells["true"].max(), 1e-3))
            axes.set_title(str(plate), fontsize=8)
            axes.set_xticks(
                range(0, width, 4 if width > 12 else 2), range(1, width + 1, 4 if width > 12 else 2)
            )
            axes.set_yticks(range(0, height, 3), [row_name(row) for row in range(0, height, 3)])
            axes.tick_params(labelsize=7, length=2)
            axes.grid(visible=False)
        for axes in panels[len(plates) :]:
            axes.axis("off")
        figure.colorbar(
            image, ax=panels.tolist(), label="mean probability of the true class", shrink=0.7
        )
        total = wells["plate"].nunique()
        figure.suptitle(
            "test wells" + (f" of {len(plates)} of {total} plates" if total > len(plates) else ""),
            x=0.01,
            ha="left",
            fontsize=10,
        )
    return Path(path)
