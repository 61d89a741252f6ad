"""`index.html` of `perturbjax run`: result, hits, audit, links to all pages, and the commands."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from perturbjax.core.files import atomic, read_json, read_parquet
from perturbjax.core.messages import counted, html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.conclusions import verdict
from perturbjax.evaluation.evaluation_result import read_evaluation
from perturbjax.report.comparison_page import models_of
from perturbjax.report.pages import Section, page, table
from perturbjax.report.pages.preview import PREVIEW
from perturbjax.report.run_page import REPORT
from perturbjax.report.run_results import evaluation_folder

#: Folders of the steps in the output folder of `perturbjax run`.
DATASET, MODEL, HITS, AUDIT = "dataset", "run", "hits", "audit"
#: Name of the page.
OVERVIEW = "index.html"
#: Number of treatments that the sentence about hits names.
_NAMED = 6
#: Columns of the hit list on the page -> heading.
_HIT_COLUMNS = {
    "treatment": "treatment",
    "wells": "wells",
    "result": "result",
    "cell_count_ratio": "cells relative to controls",
    "energy_distance_q": "q (energy distance)",
    "map_q": "q (mAP)",
    "mahalanobis_q": "q (Mahalanobis)",
}


@dataclass(frozen=True)
class Overview:
    """Results in the output folder of `perturbjax run`.

    Attributes:
        folder: output folder.
        commands: command lines of all steps.
        skipped: step that could not run -> reason.
    """

    folder: Path
    commands: tuple[str, ...]
    skipped: dict[str, str]

    @functools.cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.folder / DATASET)

    @functools.cached_property
    def model(self) -> Path:
        """Folder with the scores and the report of the network or the classifier."""
        return models_of(self.folder / MODEL)[0]

    @functools.cached_property
    def hits(self) -> pd.DataFrame | None:
        """Hit list with a column `result`; None without one."""
        if HITS in self.skipped:
            return None
        rows = read_parquet(self.folder / HITS / "hits.parquet", "run `perturbjax hits` again")
        p_values = rows[[c for c in rows if c.endswith("_p") and c != "cell_count_p"]]
        result = rows["active"].map({True: "different", False: "no difference found"})
        result = result.mask(p_values.isna().all(axis=1), "too few wells")
        toxic = rows["toxic"].fillna(False).astype(bool)
        return rows.assign(result=result.mask(toxic, "different, fewer cells"))

    def sentences(self) -> list[str]:
        """The result in five sentences or less, the last one with the files to open."""
        index = self.dataset.index
        wells = len(index[[PLATE, WELL]].drop_duplicates())
        plates = index[PLATE].nunique()
        first = (
            f"Found {counted(int(index['n_cells'].sum()), 'cell')} in "
            f"{counted(len(index), 'site')}, {counted(wells, 'well')} and "
            f"{counted(plates, 'plate')}."
        )
        last = (
            f"Open {self.folder / DATASET / PREVIEW} to check the cells, {self.model / REPORT} for "
            f"the scores, and {self.folder / OVERVIEW} for hits, audit and commands."
        )
        parts = (first, self.verdict, self.describe_hits(), self.describe_audit(), last)
        return [sentence for sentence in parts if sentence]

    @property
    def verdict(self) -> str:
        return verdict(read_evaluation(evaluation_folder(self.model) / "scores.json"))

    def describe_hits(self) -> str:
        """The hit list in one sentence."""
        rows = self.hits
        if rows is None:
            return f"Hits: not computed. {self.skipped[HITS]}"
        different = rows[rows["result"].str.startswith("different")]
        parts = [
            f"Hits: {len(different)} of {len(rows)} treatments differ from the negative controls"
            + _named(different)
        ]
        if len(same := rows[rows["result"] == "no difference found"]):
            parts.append(f"no difference was found for {_list(same)}")
        if len(toxic := rows[rows["result"] == "different, fewer cells"]):
            ratios = toxic["cell_count_ratio"]
            parts.append(f"fewer cells with {_list(toxic)} ({ratios.min():.0%} of the controls)")
        return "; ".join(parts) + "."

    def describe_audit(self) -> str:
        """Headline of the audit."""
        if AUDIT in self.skipped:
            return f"Leakage audit: not computed. {self.skipped[AUDIT]}"
        audit = read_json(self.folder / AUDIT / "audit.json")
        return f"Leakage audit: {audit['verdict']['headline']}"


def _named(rows: pd.DataFrame) -> str:
    return f" ({_list(rows)})" if len(rows) else ""


def _list(rows: pd.DataFrame) -> str:
    names = list(rows["treatment"])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def write_overview(overview: Overview) -> Path:
    """Write the page: one file, with links to the other pages of the folder.

    Returns:
        Path of the page.
    """
    first, result, *more, _ = overview.sentences()
    lead = f'<p class="verdict">{html_text(result)}</p>' + "".join(
        f"<p>{html_text(sentence)}</p>" for sentence in (first, *more)
    )
    sections = [
        Section("pages", "Pages", _links(overview)),
        Section("hits", "Hits", _hits_table(overview.hits)),
        Section("commands", "Commands", _commands(overview)),
    ]
    out = overview.folder / OVERVIEW
    with atomic(out) as temporary:
        text = page(f"perturbjax: {overview.folder.resolve().name}", lead, sections)
        temporary.write_text(text, encoding="utf-8")
    return out


def _links(overview: Overview) -> str:
    """Links to the pages that exist, each with its purpose."""
    pages = {
        overview.folder / DATASET / PREVIEW: "Cells with outlines: check the masks first.",
        overview.model / REPORT: "Scores, baselines, cells of each class, plate maps.",
        overview.folder / HITS / "hits.html": "Treatments that differ from the controls.",
        overview.folder / HITS / "hits.csv": "Hit list as a table.",
        overview.folder / AUDIT / "audit.html": "Scores by split, next to technical controls.",
    }
    rows = []
    for path, purpose in pages.items():
        if path.is_file():
            # Relative links remain valid if the folder is moved.
            link = html_text(path.relative_to(overview.folder).as_posix())
            rows.append(f'<li><a href="{link}">{link}</a>: {purpose}</li>')
    return f"<ul>{''.join(rows)}</ul>"


def _hits_table(hits: pd.DataFrame | None) -> str:
    if hits is None:
        return ""
    columns = {name: heading for name, heading in _HIT_COLUMNS.items() if name in hits}
    rows = hits[list(columns)].copy()
    for name in rows:
        if name.endswith("_q"):
            # A q-value of 0.000 would look like a proof.
            texts = ["< 0.001" if q < 0.001 else f"{q:.3f}" for q in rows[name]]
            rows[name] = pd.Series(texts, rows.index).where(rows[name].notna(), "")
    return table("hit-list", rows.rename(columns=columns), rows="treatments")


def _commands(overview: Overview) -> str:
    skipped = "".join(
        f'<p class="note">{html_text(step)} was skipped: {html_text(reason)}</p>'
        for step, reason in overview.skipped.items()
    )
    lines = "".join(f"<span>{html_text(command)}</span>" for command in overview.commands)
    note = '<p class="note">Every step is a command of its own, to repeat with other options.</p>'
    return f"{note}<pre>{lines}</pre>{skipped}"
