"""`report.html` of one run: result, scores, cells, plates, confidence, attention and provenance."""

from __future__ import annotations

from pathlib import Path

from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text
from perturbjax.report import gallery, plate_section, score_charts
from perturbjax.report.attention_section import attention_section
from perturbjax.report.class_section import class_table, confusion_figure, read_confusion
from perturbjax.report.figure_files import write_figures
from perturbjax.report.headline import headline_html
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import Section, page, table
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.provenance_section import provenance, reproduce
from perturbjax.report.run_results import RunResults, read_run_results

REPORT = "report.html"


def write_report(run: Path) -> Path:
    """Write `report.html` of a run, and its figures as SVG, PNG and PDF into `evaluation/`.

    The page is one file that loads nothing from a network. Sections without data are left out.

    Args:
        run: run directory, or folder of one classifier of `perturbjax classify`.

    Returns:
        Path of the page.

    Raises:
        InputError: the run has no results, or a file cannot be read.
    """
    results = read_run_results(run)
    write_figures(results)
    out = results.path / REPORT
    with atomic(out) as temporary:
        temporary.write_text(run_page(results), encoding="utf-8")
    return out


def run_page(results: RunResults) -> str:
    """Return the page of one run as HTML."""
    dataset, test, evaluation = results.dataset, results.test, results.evaluation
    renderer = None if dataset is None else pictures.make_renderer(dataset)
    confusion = read_confusion(results)
    many = confusion is not None and len(confusion.names) > gallery.MAX_OPEN
    pictured: set[str] = set()
    pairs = cells = ""
    if renderer is not None and test is not None:
        album = gallery.Gallery(results, test, renderer)
        pairs = gallery.pairs(album, confusion) if confusion is not None else ""
        cells, pictured = gallery.classes(album)
        legend = gallery.legend(album)
        # The legend precedes the first pictures; with many classes these are the confused pairs.
        pairs, cells = (legend + pairs, cells) if many else (pairs, legend + cells)
    elif evaluation is not None:
        cells = f'<p class="note">No pictures: {html_text(results.dataset_error)}.</p>'
    matrix = confusion_figure(confusion) if confusion is not None else ""
    confused = Section("pairs", "Most confused pairs", pairs)
    # What a biologist looks at first comes first; details of the method are folded.
    sections = [
        Section("plate-maps", "Plates", plate_section.plates(results)),
        *([confused] if many else []),
        Section("gallery", "Cells", cells),
        Section("scores", "Scores", score_charts.scores(evaluation) if evaluation else ""),
        Section("classes", "Per-class results", class_table(results, confusion, pictured)),
        Section("confusion-matrix", "Confusion", matrix),
        *([] if many else [confused]),
        Section(
            "confidence",
            "Confidence and calibration",
            score_charts.calibration(test, evaluation) if test else "",
        ),
        Section("features", "2-D embedding", plate_section.embedding(results, renderer)),
        Section("attention", "Attention maps", attention_section(results, renderer), folded=True),
        Section("training", "Training", score_charts.training(results.metrics), folded=True),
        Section("retrieval", "Replicate retrieval", _retrieval(results), folded=True),
        Section("provenance", "Provenance", provenance(results), folded=True),
        Section("reproduce", "Reproduce", reproduce(results), folded=True),
    ]
    title = f"perturbjax: {results.path.resolve().name}"
    return page(title, headline_html(results, pictures=bool(pictured)), sections)


def _retrieval(results: RunResults) -> str:
    rows = results.csv("retrieval.csv")
    if rows is None or rows.empty:
        return ""
    note = (
        '<p class="note">Test wells, compared by the cosine of their mean features. mAP: do '
        "replicates retrieve each other before the controls of their plate, or before other "
        "perturbations? NSB, NSS, NSL: without wells of the same plate, position, layout. NSC, "
        "NSCB: does the nearest well of another compound (and another batch) have the same "
        "mechanism? chance: value of random rankings.</p>"
    )
    return note + table("retrieval-table", rows, meanings=MEANINGS, rows="measures")
