"""Class by class: one table of all, the matrix of what is taken for what, and the most confused pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.core.messages import csv_value
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import CLASS, data, figure, table, widget
from perturbjax.report.pages.page import anchor
from perturbjax.report.run_results import Evidence

#: Above so many classes those that are taken for each other are put side by side first.
_FEW = 20


class Confusion(NamedTuple):
    """Sites by true class (rows) and predicted class (columns), of classes that occur among either."""

    names: list[str]
    matrix: Int[np.ndarray, "classes classes"]

    def pairs(self) -> list[tuple[int, int, int]]:
        """(true, predicted, sites) of what is taken for something else, the most sites first, then the larger share."""
        rows, columns = np.nonzero(self.matrix * (1 - np.eye(len(self.matrix), dtype=int)))
        sites = self.matrix[rows, columns]
        share = sites / self.matrix.sum(axis=1)[rows]
        order = np.lexsort((columns, rows, -share, -sites))
        return [(int(rows[at]), int(columns[at]), int(sites[at])) for at in order]


def read_confusion(found: Evidence) -> Confusion | None:
    """The matrix that the evaluation wrote."""
    file = found.folder / "confusion.csv"
    if not file.is_file():
        return None
    read = pd.read_csv(file, index_col=0, keep_default_na=False, dtype=str)
    matrix = read.to_numpy().astype(int)
    kept = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    names = [str(csv_value(name)) for name in read.columns]
    return Confusion([names[at] for at in kept], matrix[np.ix_(kept, kept)])


def class_table(found: Evidence, confusion: Confusion | None, pictured: set[str]) -> str:
    """Every class: sites, wells, recall, precision, activity, what it is confused with; linked to its pictures.

    Args:
        pictured: classes that have pictures.
    """
    shown = found.csv("per_class.csv", "recall", "precision", "f1")
    if shown is None:
        return ""
    shown = shown.drop(columns="predicted", errors="ignore").rename(columns={"f1": "F1"})
    activity = found.csv("retrieval_per_class.csv", "map", "q")
    if activity is not None and "against" in activity and (activity["against"] == "controls").any():
        own = activity[activity["against"] == "controls"].set_index("label")
        for name, column in (("activity", "map"), ("q", "q")):
            if (of := shown["class"].map(own[column])).notna().any():
                shown[name] = of
    if confusion is not None:
        wrong = confusion.matrix * (1 - np.eye(len(confusion.names), dtype=int))
        most = wrong.argmax(axis=1)
        share = wrong.max(axis=1) / np.maximum(confusion.matrix.sum(axis=1), 1)
        other = {
            name: (confusion.names[most[at]], share[at])
            for at, name in enumerate(confusion.names)
            if wrong[at].any()
        }
        shown["most confused with"] = [other.get(name, ("", 0))[0] for name in shown["class"]]
        shown["share confused"] = [other.get(name, ("", np.nan))[1] for name in shown["class"]]
    links = [f"#{anchor('class', name)}" if name in pictured else "" for name in shown["class"]]
    note = '<p class="note">Held-out sites; empty where a share would be of nothing. A click on a title sorts.</p>'
    return note + table("class-table", shown, meanings=MEANINGS, links=links, rows="classes")


def confusion_figure(confusion: Confusion) -> str:
    """The matrix, which can be ordered and zoomed, and names what is pointed at."""
    names, matrix = confusion
    rows, columns = np.nonzero(matrix)
    text = np.asarray(names, dtype=object)
    cells = pd.DataFrame(
        {"true": text[rows], "predicted": text[columns], "sites": matrix[rows, columns]}
    )
    frequent = np.argsort(-matrix.sum(axis=1), kind="stable")
    orders = {
        "most frequent first": frequent,
        "alike side by side": alike(matrix),
        "by name": np.argsort(text.astype(str)),
    }
    if len(names) > _FEW:
        orders = dict(sorted(orders.items()))
    told = "; ".join(
        f"{names[a]} for {names[b]} ({sites})" for a, b, sites in confusion.pairs()[:5]
    )
    label = f"Confusion of {len(names)} classes. Most often taken for another: {told or 'none'}"
    source = data("confusion-classes", pd.DataFrame({CLASS: text, **orders}))
    drawing = widget("confusion", "confusion", label, classes="confusion-classes")
    caption = (
        "Rows are true classes, columns predicted ones; blue is right, orange is not, darker is more of the row "
        "(square root); numbers are per cent of it. Point at a cell for its names; a double click or + comes closer, "
        "dragging moves, arrows walk."
    )
    return source + figure("confusion", drawing, caption, cells)


def alike(matrix: Int[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """An order in which classes that are taken for each other are neighbours: leaves of average linkage."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(matrix) < 3:
        return np.arange(len(matrix))
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    near = np.clip((share + share.T) / 2, 0, 1)
    distance = 1 - near
    np.fill_diagonal(distance, 0)
    return leaves_list(
        linkage(squareform(distance, checks=False), "average", optimal_ordering=len(matrix) <= 400)
    )
