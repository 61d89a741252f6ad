"""Compare runs on the same test sites, with paired differences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.audit.audit_options import CompareConfig
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_csv, write_json
from perturbjax.core.messages import PlainConsole
from perturbjax.core.plates import PLATE
from perturbjax.data.splits import TEST
from perturbjax.evaluation.apply import EVALUATION, PREDICTIONS
from perturbjax.evaluation.bootstrap import Estimate, ResampledScores, interval, resample
from perturbjax.evaluation.evaluation_result import format_estimate
from perturbjax.evaluation.predictions import (
    encode_labels,
    labels_and_probabilities,
    predicted_class_names,
    read_predictions,
)
from perturbjax.evaluation.scores import HEADLINE, METRICS, Counts, count
from perturbjax.evaluation.wells import aggregate_wells, well_ids
from perturbjax.training.run_directory import CONFIG


@dataclass(frozen=True)
class Row:
    """Scores of one run, or the mean of runs that differ only in their seed, at one level."""

    name: str
    scores: dict[str, Estimate]
    leads: dict[str, Estimate]
    """Scores minus those of the first run (same resamples); empty for the first run."""
    seeds: int = 1
    """Number of runs in the mean."""
    spread: float | None = None
    """Standard deviation of balanced accuracy over seeds."""


@dataclass(frozen=True)
class Comparison:
    """Scores of several runs on the same sites, by site and by well."""

    sites: int
    wells: int
    classes: int
    resample: str
    replicates: int
    levels: dict[str, tuple[Row, ...]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that are informative for this number of classes."""
        return tuple(name for name, one in METRICS.items() if self.classes >= one.min_classes)


def compare(config: CompareConfig) -> Comparison:
    """Compare runs that were evaluated on the same sites.

    Raises:
        InputError: there are fewer than two runs, one was not evaluated, or their test sites,
            labels or classes differ.
    """
    if len(config.runs) < 2:
        raise InputError(
            f"--runs {' '.join(map(str, config.runs))}: two or more are needed; all others are "
            "compared with the first"
        )
    paths = _name_runs(config.runs)
    tables = {name: _test_predictions(path) for name, path in paths.items()}
    # All runs must have the same test sites, so the first table defines sites, labels and wells.
    first = next(iter(tables.values()))
    probabilities = {name: _probabilities(paths[name], one, first) for name, one in tables.items()}
    # Runs can store classes in different orders; sorted names align the probabilities.
    classes = sorted(predicted_class_names(first))
    labels = encode_labels(first["label"], classes, "predictions")
    wells = well_ids(first)
    # Clusters are the units of the bootstrap.
    clusters = wells if config.resample == "well" else pd.factorize(first[PLATE])[0]
    series = _seed_series(paths)
    counts = {name: count(labels, one, clusters) for name, one in probabilities.items()}
    levels = {"site": _rows(counts, series, config)}
    try:
        means = {name: aggregate_wells(wells, labels, one) for name, one in probabilities.items()}
    except InputError:  # sites of one well have different labels: no well level
        pass
    else:
        # Cluster of each well (the well or the plate), read from its first site.
        well_clusters = clusters[np.unique(wells, return_index=True)[1]]
        counts = {name: count(*one, well_clusters) for name, one in means.items()}
        levels["well"] = _rows(counts, series, config)
    sizes = len(labels), int(wells.max()) + 1, len(classes)
    return Comparison(*sizes, config.resample, config.replicates, levels)


def _name_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each run by the shortest end of its path that is unique."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        # Equal names collapse to one key, so a smaller dictionary shows a duplicate.
        names = {"/".join(path.with_suffix("").parts[-parts:]): path for path in paths}
        if len(names) == len(paths):
            return names
    raise InputError(f"--runs {paths[0]}: is listed twice")


def _test_predictions(path: Path) -> pd.DataFrame:
    """Read the predictions of a run's test sites, sorted by site.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    file = path / EVALUATION / PREDICTIONS if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{path}: was not evaluated; run `perturbjax evaluate --run {path}`, or pass a file "
            "of predictions"
        )
    table = read_predictions(file)
    table = table[table["part"] == TEST]
    if table.empty or table["site_id"].duplicated().any():
        raise InputError(f"{file}: has no test sites, or a repeated site")
    # Sorting by site aligns the rows of all runs.
    return table.sort_values("site_id").reset_index(drop=True)


def _probabilities(
    path: Path, table: pd.DataFrame, first: pd.DataFrame
) -> Float[np.ndarray, "n classes"]:
    """Return the probabilities with classes sorted by name.

    Raises:
        InputError: sites, labels or classes differ from the first run.
    """
    own, reference = set(table["site_id"]), set(first["site_id"])
    if own != reference:
        raise InputError(
            f"{path}: has {len(own)} test sites, {len(own & reference)} of the {len(reference)} of "
            "the first run; train both runs with one --split-file"
        )
    # Equal sites can have other labels if a run predicts another column.
    if (other := (table["label"] != first["label"]).to_numpy()).any():
        site = table["site_id"][int(np.argmax(other))]
        raise InputError(
            f"{path}: label of site {site!r} differs from the first run; compare runs of one label"
        )
    names = sorted(predicted_class_names(first))
    if sorted(predicted_class_names(table)) != names:
        raise InputError(f"{path}: classes differ from the first run; compare runs of one label")
    return np.asarray(labels_and_probabilities(table, names)[1], dtype=float)


def _seed_series(paths: Mapping[str, Path]) -> dict[str, list[str]]:
    """Group runs whose recipes differ only in the seed."""
    groups: dict[str, list[str]] = {}
    for name, path in paths.items():
        # Predictions of other models have no recipe and belong to no series.
        is_file = (path / CONFIG).is_file()
        if is_file and (recipe := read_json(path / CONFIG).get("recipe")):
            # Recipes that differ only in the seed give the same key.
            key = json.dumps({**recipe, "seed": None}, sort_keys=True)
            groups.setdefault(key, []).append(name)
    return {f"mean of {', '.join(runs)}": runs for runs in groups.values() if len(runs) > 1}


def _rows(
    counts: dict[str, Counts], series: dict[str, list[str]], config: CompareConfig
) -> tuple[Row, ...]:
    resampled = resample(counts, replicates=config.replicates, seed=config.seed)
    first = next(iter(counts))
    rows = [
        Row(name, resampled.scores(name), {} if name == first else resampled.lead(name, first))
        for name in counts
    ]
    return (*rows, *(_mean(resampled, name, runs) for name, runs in series.items()))


def _mean(resampled: ResampledScores, name: str, runs: list[str]) -> Row:
    """Average several runs, with the standard deviation over their seeds."""
    scores = {}
    for metric in METRICS:
        value = float(np.mean([resampled.points[run][metric] for run in runs]))
        # Replicate i uses the same clusters for all runs, so draws are averaged one by one.
        draws = np.mean([resampled.draws[run][metric] for run in runs], axis=0)
        scores[metric] = Estimate(value, *interval(draws, value))
    spread = float(np.std([resampled.points[run][HEADLINE] for run in runs], ddof=1))
    return Row(name, scores, {}, len(runs), spread)


def table_rows(comparison: Comparison, level: str, gap: str = " ") -> Iterator[list[str]]:
    """Yield name, every metric, and the lead in balanced accuracy of each run."""
    for row in comparison.levels[level]:
        spread = "" if row.spread is None else f"{gap}± {row.spread:.3f} ({row.seeds} seeds)"
        scores = [
            format_estimate(row.scores[metric], gap) + (spread if metric == HEADLINE else "")
            for metric in comparison.metrics
        ]
        yield [row.name, *scores, format_estimate(row.leads.get(HEADLINE), gap)]


def table_header(comparison: Comparison, level: str) -> list[str]:
    """Column titles of the table."""
    first = comparison.levels[level][0].name
    titles = [METRICS[metric].words for metric in comparison.metrics]
    return [f"by {level}", *titles, f"{METRICS[HEADLINE].words} minus {first}'s"]


def print_comparison(comparison: Comparison) -> None:
    """Print one table per level."""
    from rich import box
    from rich.table import Table

    console = PlainConsole(soft_wrap=False)
    console.print(f"The same {comparison.sites} test sites in {comparison.wells} wells.")
    for level in comparison.levels:
        table = Table(box=box.SIMPLE_HEAD)
        for number, title in enumerate(table_header(comparison, level)):
            table.add_column(title, justify="right" if number else "left")
        for cells in table_rows(comparison, level, " " if console.width >= 140 else "\n"):
            table.add_row(*cells)
        console.print(table)
    console.print(explain_intervals(comparison))


def summarize(comparison: Comparison) -> str:
    """State whether a run is clearly better than the first, by well if possible."""
    # The last level is by well, if it exists.
    level, (first, *others) = list(comparison.levels.items())[-1]
    best = max((row for row in others if row.leads), key=lambda row: row.leads[HEADLINE].value)
    lead = best.leads[HEADLINE]
    difference = f"{lead.value:+.2f} ({lead.low:+.2f} to {lead.high:+.2f})".replace("-", "−")
    evidence = f"{METRICS[HEADLINE].words} by {level}, {difference}"
    if lead.low > 0:
        return f"{best.name} is clearly better than {first.name}: {evidence}."
    if lead.high < 0:
        rest = "all other runs" if len(others) > 1 else best.name
        return f"{first.name} is clearly better than {rest}: {evidence}."
    return f"No clear difference between {first.name} and {best.name}: {evidence}."


def explain_intervals(comparison: Comparison) -> str:
    """Explain the intervals below the tables."""
    return (
        f"In brackets: 95 % intervals from {comparison.replicates} resamples of whole "
        f"{comparison.resample}s; differences use the same resamples for both runs. ± is the "
        "standard deviation over seeds, which the interval of a mean does not include."
    )


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write `compare.json`, and `compare.csv` with one number per row."""
    write_json(make_folder(out) / "compare.json", dataclasses.asdict(comparison))
    numbers = [
        (level, row.name, quantity, metric, *dataclasses.astuple(one))
        for level, rows in comparison.levels.items()
        for row in rows
        for quantity, scores in (("score", row.scores), ("minus the first", row.leads))
        for metric, one in scores.items()
    ]
    columns = ["level", "run", "quantity", "metric", "value", "low", "high"]
    write_csv(out / "compare.csv", pd.DataFrame(numbers, columns=columns))
