"""Figures of an evaluation as PNG, SVG and PDF files, for slides and papers."""

from __future__ import annotations

import contextlib
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.evaluation import figures
from perturbjax.report import score_charts
from perturbjax.report.chart_files import write_charts
from perturbjax.report.class_section import read_confusion
from perturbjax.report.run_results import RunResults


def write_figures(results: RunResults) -> list[Path]:
    """Write every figure for which there are data into the evaluation folder.

    Returns:
        Paths of the files.
    """
    out, files = results.folder, []
    if results.metrics:
        _, charts = score_charts.training_charts(results.metrics)
        files += write_charts(charts, out / "curves") if charts else []
    if results.evaluation is None:
        return files
    files += write_charts(score_charts.score_charts(results.evaluation), out / "scores")
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
    files += write_charts(score_charts.calibration_charts(test), out / "calibration")
    with contextlib.suppress(InputError):  # no plate map if wells are not named like A01
        files.append(figures.plot_plates(test.table, labels, probabilities, out / "plates.png"))
    return files
