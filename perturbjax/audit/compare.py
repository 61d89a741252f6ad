"""`perturbjax compare`: what several runs say of the same sites, and how they differ there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.audit.audit_options import CompareConfig
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_csv, write_json
from perturbjax.core.messages import PlainConsole, html_text
from perturbjax.core.plates import PLATE
from perturbjax.data.splits import TEST
from perturbjax.evaluation.apply import EVALUATION, PREDICTIONS
from perturbjax.evaluation.bootstrap import Estimate, Resampled, interval, resample
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.predictions import (
    encode_labels,
    labels_and_probabilities,
    predicted_class_names,
    read_predictions,
)
from perturbjax.evaluation.scores import HEADLINE, METRICS, count
from perturbjax.evaluation.wells import aggregate_wells, well_ids
from perturbjax.training.run_directory import CONFIG


@dataclass(frozen=True)
class Row:
    """One run, or the mean of those that differ in their seed alone, at one level."""

    name: str
    scores: dict[str, Estimate]
    leads: dict[str, Estimate]
    """Its scores minus those of the first run, on the same resamples; empty for that run."""
    seeds: int = 1
    """Runs in the mean."""
    spread: float | None = None
    """Standard deviation of the headline score over seeds."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, by site and by well."""

    sites: int
    wells: int
    classes: int
    resample: str
    replicates: int
    levels: dict[str, tuple[Row, ...]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics worth a column."""
        return tuple(metric for metric, what in METRICS.items() if self.classes >= what.min_classes)


def compare(config: CompareConfig) -> Comparison:
    """Runs that judged the same sites.

    Raises:
        InputError: there are fewer than two, one was not evaluated, or they judged other sites, labels or classes.
    """
    if len(config.runs) < 2:
        raise InputError(
            f"--runs {' '.join(map(str, config.runs))}: needs two or more; the others are compared with the first"
        )
    names = _names(config.runs)
    tables = {name: _judged(path) for name, path in names.items()}
    first = next(iter(tables.values()))
    answers = {name: _answers(names[name], table, first) for name, table in tables.items()}
    labels = encode_labels(first["label"], sorted(predicted_class_names(first)), "predictions")
    wells = well_ids(first)
    whole = wells if config.resample == "well" else pd.factorize(first[PLATE])[0]
    series = _series(names)
    levels = {
        "site": _rows({n: count(labels, a, whole) for n, a in answers.items()}, series, config)
    }
    try:
        together = {
            name: aggregate_wells(wells, labels, answer) for name, answer in answers.items()
        }
        of_well = whole[np.unique(wells, return_index=True)[1]]
        levels["well"] = _rows(
            {n: count(*one, of_well) for n, one in together.items()}, series, config
        )
    except InputError:  # sites of one well differ in label: there is no level of wells
        pass
    classes = len(predicted_class_names(first))
    return Comparison(
        len(labels), int(wells.max()) + 1, classes, config.resample, config.replicates, levels
    )


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """Runs by the end of their path that tells them apart."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = {"/".join(path.with_suffix("").parts[-parts:]): path for path in paths}
        if len(names) == len(paths):
            return names
    raise InputError(f"--runs {paths[0]}: is named twice")


def _judged(path: Path) -> pd.DataFrame:
    """The predictions of the sites that a run, or a file of predictions, was judged on, in the order of their names.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    file = path / EVALUATION / PREDICTIONS if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{path}: was not evaluated; run `perturbjax evaluate --run {path}`, or name a file of predictions"
        )
    table = read_predictions(file)
    table = table[table["part"] == TEST] if "part" in table.columns else table
    if table.empty or table["site_id"].duplicated().any():
        raise InputError(f"{file}: has no site that judges, or one twice")
    return table.sort_values("site_id").reset_index(drop=True)


def _answers(
    path: Path, table: pd.DataFrame, first: pd.DataFrame
) -> Float[np.ndarray, "n classes"]:
    """Probabilities, classes sorted by name.

    Raises:
        InputError: the sites, labels or classes are not those of the first run.
    """
    mine, theirs = set(table["site_id"]), set(first["site_id"])
    if mine != theirs:
        raise InputError(
            f"{path}: judged {len(mine)} sites, {len(mine & theirs)} of them among the {len(theirs)} of the first run; "
            "train both with one --split-file to compare them"
        )
    if (other := (table["label"] != first["label"]).to_numpy()).any():
        site = table["site_id"][int(np.argmax(other))]
        raise InputError(
            f"{path}: site {site!r} has another label than in the first run; compare runs of one label"
        )
    names = sorted(predicted_class_names(first))
    if sorted(predicted_class_names(table)) != names:
        raise InputError(
            f"{path}: knows other classes than the first run; compare runs of one label"
        )
    return np.asarray(labels_and_probabilities(table, names)[1], dtype=float)


def _series(names: Mapping[str, Path]) -> dict[str, list[str]]:
    """Runs that differ in nothing but their seed, by the name of the series; a run of no series is left out."""
    groups: dict[str, list[str]] = {}
    for name, path in names.items():
        if (path / CONFIG).is_file():
            recipe = dict(read_json(path / CONFIG).get("recipe", {}), seed=None)
            groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(name)
    return {f"mean of {', '.join(runs)}": runs for runs in groups.values() if len(runs) > 1}


def _rows(
    counts: dict[str, Any], series: dict[str, list[str]], config: CompareConfig
) -> tuple[Row, ...]:
    found = resample(counts, replicates=config.replicates, seed=config.seed)
    first = next(iter(counts))
    rows = [Row(n, found.scores(n), {} if n == first else found.lead(n, first)) for n in counts]
    return (*rows, *(_mean(found, name, runs, first) for name, runs in series.items()))


def _mean(found: Resampled, name: str, runs: list[str], first: str) -> Row:
    """The mean of several runs, and the spread of their seeds."""
    points = {
        metric: float(np.mean([found.points[run][metric] for run in runs]))
        for metric in found.points[first]
    }
    draws = {
        metric: np.mean([found.draws[run][metric] for run in runs], axis=0) for metric in points
    }
    spread = float(np.std([found.points[run][HEADLINE] for run in runs], ddof=1))
    scores = {
        metric: Estimate(value, *interval(draws[metric], value)) for metric, value in points.items()
    }
    return Row(name, scores, {}, len(runs), spread)


def rows(comparison: Comparison, level: str, gap: str = " ") -> Iterator[list[str]]:
    """The cells of a table: name, every metric, and the lead in the headline score."""
    for row in comparison.levels[level]:
        spread = "" if row.spread is None else f"{gap}± {row.spread:.3f} ({row.seeds} seeds)"
        lead = format_estimate(row.leads.get(HEADLINE), gap)
        yield [
            row.name,
            *(
                format_estimate(row.scores[m], gap) + (spread if m == HEADLINE else "")
                for m in comparison.metrics
            ),
            lead,
        ]


def head(comparison: Comparison, level: str) -> list[str]:
    """Titles of that table."""
    first = comparison.levels[level][0].name
    return [
        f"by {level}",
        *(METRICS[metric].words for metric in comparison.metrics),
        f"{METRICS[HEADLINE].words} minus {first}'s",
    ]


def print_comparison(comparison: Comparison) -> None:
    """Show every level on stdout."""
    from rich import box
    from rich.table import Table

    console = PlainConsole(soft_wrap=False)
    console.print(f"The same {comparison.sites} sites in {comparison.wells} wells.")
    for level in comparison.levels:
        table = Table(box=box.SIMPLE_HEAD)
        for number, title in enumerate(head(comparison, level)):
            table.add_column(title, justify="right" if number else "left")
        for cells in rows(comparison, level, " " if console.width >= 140 else "\n"):
            table.add_row(*cells)
        console.print(table)
    console.print(_explained(comparison))


def told(comparison: Comparison) -> str:
    """One plain sentence: whether one run is clearly better than the first, where wells can be counted by well."""
    name, (first, *others) = list(comparison.levels.items())[-1]
    best = max((row for row in others if row.leads), key=lambda row: row.leads[HEADLINE].value)
    lead, words = best.leads[HEADLINE], METRICS[HEADLINE].words
    by = f"{words} by {name}, {lead.value:+.2f} ({lead.low:+.2f} to {lead.high:+.2f})".replace(
        "-", "−"
    )
    if lead.low > 0:
        return f"{best.name} is clearly better than {first.name}: {by}."
    if lead.high < 0:
        return f"{first.name} is clearly better than {'each of the others' if len(others) > 1 else best.name}: {by}."
    return f"No clear difference between {first.name} and {best.name}: {by}."


def _explained(comparison: Comparison) -> str:
    return (
        f"In brackets: 95 % intervals from {comparison.replicates} resamples of whole {comparison.resample}s; those of "
        "differences are of the same resamples for both. ± is the standard deviation of seeds, which the interval of a "
        "mean does not hold."
    )


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """`compare.json`, `compare.csv` (one row a number) and the page `compare.html`, which is returned."""
    from perturbjax.report.audit_page import html_table, write_html

    write_json(make_folder(out) / "compare.json", dataclasses.asdict(comparison))
    numbers = [
        (level, row.name, what, metric, *dataclasses.astuple(one))
        for level, of in comparison.levels.items()
        for row in of
        for what, scores in (("score", row.scores), ("minus the first", row.leads))
        for metric, one in scores.items()
    ]
    columns = ["level", "run", "quantity", "metric", "value", "low", "high"]
    write_csv(out / "compare.csv", pd.DataFrame(numbers, columns=columns))
    lead = (
        f'<p class="verdict">{html_text(told(comparison))}</p>'
        f"<p>All judged the same {comparison.sites} sites in {comparison.wells} wells.</p>"
    )
    sections = {
        f"By {level}": html_table(head(comparison, level), rows(comparison, level))
        for level in comparison.levels
    }
    explained = f"<p><small>{html_text(_explained(comparison))}</small></p>"
    return write_html(out / "compare.html", "perturbjax compare", lead + explained, sections)
