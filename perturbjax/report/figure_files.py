"""Figures of an evaluation as PNG files for slides and papers."""

from __future__ import annotations

import contextlib
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.evaluation import figures
from perturbjax.report.class_section import read_confusion
from perturbjax.report.run_results import RunResults


def write_figures(results: RunResults) -> list[Path]:
    """Write every figure for which there are data into the evaluation folder.

    Returns:
        Paths of the PNG files.
    """
    out, files = results.folder, []
    if results.metrics:
        files.append(figures.plot_curves(results.metrics, out / "curves.png"))
    if results.evaluation is None:
        return files
    files.append(figures.plot_scores(results.evaluation, out / "scores.png"))
    confusion = read_confusion(results)
    if confusion is not None:
        file = figures.plot_confusion(confusion.matrix, confusion.names, out / "confusion.png")
        files.append(file)
    classes = results.csv("per_class.csv")
    if classes is not None:
        files.append(figures.plot_recall(classes, out / "recall.png"))
    test = results.test
    if test is None:
        return files
    labels, probabilities = test.labels, test.probabilities
    files.append(figures.plot_reliability(labels, probabilities, out / "calibration.png"))
    with contextlib.suppress(InputError):  # no plate map if wells are not named like A01
        files.append(figures.plot_plates(test.table, labels, probabilities, out / "plates.png"))
    return files
