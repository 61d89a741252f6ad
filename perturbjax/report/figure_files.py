"""The figures of an evaluation as PNG, for slides and papers; the page draws its own."""

from __future__ import annotations

import contextlib
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.evaluation import figures
from perturbjax.report.class_section import read_confusion
from perturbjax.report.run_results import Evidence


def print_figures(found: Evidence) -> list[Path]:
    """Draw every figure that the evidence allows into its folder."""
    out, drawn = found.folder, []
    if found.metrics:
        drawn.append(figures.plot_curves(found.metrics, out / "curves.png"))
    if found.evaluation is None:
        return drawn
    drawn.append(figures.plot_scores(found.evaluation, out / "scores.png"))
    if (confusion := read_confusion(found)) is not None:
        drawn.append(
            figures.plot_confusion(confusion.matrix, confusion.names, out / "confusion.png")
        )
    if (classes := found.csv("per_class.csv", "precision", "recall", "f1")) is not None:
        drawn.append(figures.plot_recall(classes, out / "recall.png"))
    if (answers := found.answers) is None:
        return drawn
    drawn.append(
        figures.plot_reliability(answers.labels, answers.probabilities, out / "calibration.png")
    )
    with contextlib.suppress(
        InputError
    ):  # wells that are not named as on a plate: there is no map to draw
        drawn.append(
            figures.plot_plates(
                answers.table, answers.labels, answers.probabilities, out / "plates.png"
            )
        )
    return drawn
