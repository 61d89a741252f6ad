"""One HTML file that says whether a run worked, on what, how far to trust it, which classes, and shows the cells."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text
from perturbjax.report import gallery
from perturbjax.report import plate_section as places
from perturbjax.report import score_charts as curves
from perturbjax.report.attention_section import looked_at
from perturbjax.report.class_section import class_table, confusion_figure, read_confusion
from perturbjax.report.figure_files import print_figures
from perturbjax.report.headline import lead
from perturbjax.report.metric_descriptions import MEANINGS
from perturbjax.report.pages import Section, page, table
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.provenance_section import again, provenance
from perturbjax.report.run_results import Evidence, read_evidence

REPORT = "report.html"


def write_report(run: Path) -> Path:
    """Write a run's `report.html`, and its figures as PNG into `evaluation/`.

    One file that asks nothing of a network. Parts whose files are missing are left out. `run` may also be the folder
    of one evaluation, as `perturbjax classify` writes one a classifier.

    Raises:
        InputError: the run was neither trained nor evaluated here, or a file of it cannot be read.
    """
    found = read_evidence(run)
    print_figures(found)
    out = found.path / REPORT
    with atomic(out) as temporary:
        temporary.write_text(run_page(found), encoding="utf-8")
    return out


def run_page(found: Evidence) -> str:
    """The page of one run."""
    renderer = None if found.dataset is None else pictures.renderer(found.dataset)
    confusion = read_confusion(found)
    many = confusion is not None and len(confusion.names) > gallery.ROOMY
    shown: set[str] = set()
    pairs = cells = ""
    if renderer is not None and found.answers is not None:
        album = gallery.Gallery(found, found.answers, renderer)
        pairs = gallery.pairs(album, confusion) if confusion is not None else ""
        cells, shown = gallery.classes(album)
        meant = gallery.key(album)
        pairs, cells = (meant + pairs, cells) if many else (pairs, meant + cells)
    elif found.evaluation is not None:
        cells = f'<p class="note">No pictures: {html_text(found.no_dataset)}.</p>'
    answers = found.answers
    sections = [
        Section("scores", "Scores", curves.scores(found.evaluation) if found.evaluation else ""),
        *([Section("pairs", "The most confused pairs", pairs)] if many else []),
        Section("gallery", "The cells", cells),
        Section("classes", "Classes", class_table(found, confusion, shown)),
        Section(
            "taken-for",
            "What is taken for what",
            confusion_figure(confusion) if confusion is not None else "",
        ),
        *([] if many else [Section("pairs", "The most confused pairs", pairs)]),
        Section("on-plates", "Plates", places.plates(found)),
        Section(
            "sureness",
            "How sure, and how often right",
            curves.calibration(answers, found.evaluation) if answers else "",
        ),
        Section("looked-at", "What it looked at", looked_at(found, renderer)),
        Section("training", "Training", curves.training(found.metrics)),
        Section("layout", "Features in the plane", places.embedding(found, renderer)),
        Section("retrieval", "Retrieval by features", _retrieval(found)),
        Section("provenance", "Provenance", provenance(found)),
        Section("again", "The same again", again(found)),
    ]
    title = f"perturbjax: {found.path.resolve().name}"
    return page(title, lead(found, pictures=bool(shown)), sections)


def _retrieval(found: Evidence) -> str:
    if not (found.folder / "retrieval.csv").is_file():
        return ""
    rows = pd.read_csv(found.folder / "retrieval.csv")
    if rows.empty:
        return ""
    note = (
        '<p class="note">Wells of the test part, compared by the cosine of their mean features. mAP: do replicates '
        "find each other before the controls of their plate, or before other perturbations? NSB, NSS, NSL: "
        "without wells of the same plate, of the same place on a plate, of the same layout. NSC, NSCB: has the nearest "
        "well of another compound (and another batch) the same mechanism? chance: the same of random rankings.</p>"
    )
    return note + table("retrieval-table", rows, meanings=MEANINGS, rows="measures")
