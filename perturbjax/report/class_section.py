"""Per-class results: a table, the confusion matrix, and the most confused pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import CLASS, data, figure, table, widget
from perturbjax.report.pages.page import anchor
from perturbjax.report.result_files import read_confusion_counts
from perturbjax.report.run_results import RunResults

#: Above this number of classes the matrix starts with similar classes side by side.
_FEW = 20


class Confusion(NamedTuple):
    """Sites by true class (rows) and predicted class (columns), for classes that occur."""

    names: list[str]
    matrix: Int[np.ndarray, "classes classes"]

    def pairs(self) -> list[tuple[int, int, int]]:
        """Confused pairs as (true, predicted, sites): most sites first."""
        # The diagonal contains correct predictions and is excluded.
        rows, columns = np.nonzero(self.matrix * (1 - np.eye(len(self.matrix), dtype=int)))
        sites = self.matrix[rows, columns]
        fraction = sites / self.matrix.sum(axis=1)[rows]
        # lexsort sorts by the last key first.
        order = np.lexsort((columns, rows, -fraction, -sites))
        return [(int(rows[i]), int(columns[i]), int(sites[i])) for i in order]


def read_confusion(results: RunResults) -> Confusion | None:
    """Read the confusion matrix of the evaluation; None if there is none.

    Raises:
        InputError: the file is not a table of counts.
    """
    file = results.folder / "confusion.csv"
    if not file.is_file():
        return None
    names, matrix = read_confusion_counts(file)
    occurs = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    return Confusion([names[i] for i in occurs], matrix[np.ix_(occurs, occurs)])


def class_table(results: RunResults, confusion: Confusion | None, pictured: set[str]) -> str:
    """Return a table of all classes with their scores, linked to their pictures.

    Args:
        results: the run.
        confusion: its confusion matrix, or None.
        pictured: classes with pictures.
    """
    rows = results.csv("per_class.csv")
    if rows is None:
        return ""
    rows = rows.drop(columns="predicted", errors="ignore").rename(columns={"f1": "F1"})
    activity = results.csv("retrieval_per_class.csv")
    if activity is not None and "against" in activity and (activity["against"] == "controls").any():
        # Activity is the mAP of replicates against negative controls.
        own = activity[activity["against"] == "controls"].set_index("label")
        for name, column in (("activity", "map"), ("q", "q")):
            values = rows["class"].map(own[column])
            if values.notna().any():
                rows[name] = values
    if confusion is not None:
        most, fraction = _most_confused(confusion)
        rows["most confused with"] = [most.get(name, "") for name in rows["class"]]
        rows["fraction confused"] = [fraction.get(name, np.nan) for name in rows["class"]]
    # Classes without pictures have no link.
    links = [f"#{anchor('class', name)}" if name in pictured else "" for name in rows["class"]]
    note = (
        '<p class="note">Test sites; a cell is empty if there is no site to compute it from. '
        "Click a heading to sort.</p>"
    )
    return note + table("class-table", rows, meanings=MEANINGS, links=links, rows="classes")


def _most_confused(confusion: Confusion) -> tuple[dict[str, str], dict[str, float]]:
    """Most frequent wrong prediction of each class, and its fraction of the sites."""
    names, matrix = confusion
    # Wrong predictions only: the diagonal is set to 0.
    wrong = matrix * (1 - np.eye(len(names), dtype=int))
    most = wrong.argmax(axis=1)
    fraction = wrong.max(axis=1) / np.maximum(matrix.sum(axis=1), 1)
    rows = [row for row in range(len(names)) if wrong[row].any()]
    return (
        {names[row]: names[most[row]] for row in rows},
        {names[row]: float(fraction[row]) for row in rows},
    )


def confusion_figure(confusion: Confusion) -> str:
    """Return the confusion matrix, drawn by the script of the page, with orders and zoom."""
    names, matrix = confusion
    rows, columns = np.nonzero(matrix)
    text = np.asarray(names, dtype=object)
    cells = pd.DataFrame(
        {"true": text[rows], "predicted": text[columns], "sites": matrix[rows, columns]}
    )
    frequent = np.argsort(-matrix.sum(axis=1), kind="stable")
    orders = {
        "most frequent first": frequent,
        "alike side by side": similarity_order(matrix),
        "by name": np.argsort(text.astype(str)),
    }
    if len(names) > _FEW:
        # The page starts with the first order; sorting by name puts similar classes first.
        orders = dict(sorted(orders.items()))
    top = "; ".join(f"{names[a]} as {names[b]} ({n})" for a, b, n in confusion.pairs()[:5])
    label = f"Confusion of {len(names)} classes. Most frequent errors: {top or 'none'}"
    source = data("confusion-classes", pd.DataFrame({CLASS: text, **orders}))
    drawing = widget("confusion", "confusion", label, classes="confusion-classes")
    caption = (
        "Rows: true classes, columns: predicted classes. Blue cells are correct, orange cells "
        "wrong. The larger the fraction of the row (square root), the more a cell differs from the "
        "background. Numbers are percent of the row. Hover for names; double click or + to zoom, "
        "drag to move, arrow keys to step."
    )
    return source + figure("confusion", drawing, caption, cells)


def similarity_order(matrix: Int[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """Order classes so that often confused ones are neighbors (leaves of average linkage)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(matrix) < 3:
        return np.arange(len(matrix))
    # The similarity of two classes is the mean of both confusion rates.
    fraction = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    distance = 1 - np.clip((fraction + fraction.T) / 2, 0, 1)
    np.fill_diagonal(distance, 0)
    # The optimal order of the leaves takes too long for many classes.
    optimal = len(matrix) <= 400
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=optimal)
    return leaves_list(tree)
