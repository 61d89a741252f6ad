"""The judge: a model's predictions beside their baselines, with intervals, for sites and for wells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.console import InputError
from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation import baselines
from perturbjax.evaluation.bootstrap import estimate
from perturbjax.evaluation.scores import (
    METRICS,
    TOP_K,
    Counts,
    check_probabilities,
    confusion_matrix,
    count,
    per_class,
    score,
)
from perturbjax.evaluation.shortcuts import overlap, warnings
from perturbjax.evaluation.wells import aggregate_wells, well_ids
from perturbjax.files import atomic, make_folder, write_json
from perturbjax.splits import MEANING

MODEL = "model"
METRIC_WORDS = {
    "accuracy": "accuracy",
    "top5": f"top-{TOP_K} accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Predictions that were checked and put in the order of their index."""

    index: pd.DataFrame
    labels: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n classes"]


def read_predictions(
    predictions: pd.DataFrame, index: pd.DataFrame, class_names: Sequence[str], *, part: str = "test"
) -> Judged:
    """The predictions of one part, checked, in the order of `index`.

    Args:
        predictions: `site_id`, `label`, `prob_<class name>` for every class, and `part` (all rows are taken if absent).
        index: the sites of that part, `site_id` among its columns.
        class_names: classes in logit order.
        part: rows of `predictions` to take.

    Raises:
        InputError: a column is missing, a site occurs twice, is missing or is not of this part, a label is not one of
            `class_names`, or probabilities are not probabilities.
    """
    columns = [f"prob_{name}" for name in class_names]
    for column in ("site_id", "label", *columns):
        if column not in predictions.columns:
            raise InputError(f"predictions: no column {column!r}; predict again with the run's own classes")
    if "part" in predictions.columns:
        predictions = predictions[predictions["part"] == part]
    _refuse_repeated(predictions["site_id"], "predictions")
    _refuse_repeated(index["site_id"], "index")
    if missing := sorted(set(index["site_id"]) - set(predictions["site_id"])):
        raise InputError(f"predictions: none for {part} site {missing[0]} ({len(missing)} missing); predict again")
    if foreign := sorted(set(predictions["site_id"]) - set(index["site_id"])):
        raise InputError(f"predictions: site {foreign[0]} is not in the {part} part ({len(foreign)} such sites)")
    rows = predictions.set_index("site_id").loc[index["site_id"]]
    labels = label_numbers(rows["label"], class_names, "predictions")
    probabilities = rows[columns].to_numpy(dtype=np.float32)
    check_probabilities(labels, probabilities, list(index["site_id"]))
    return Judged(index.reset_index(drop=True), labels, probabilities)


def label_numbers(labels: pd.Series, class_names: Sequence[str], table: str) -> Int[np.ndarray, " n"]:
    """Class names as numbers in logit order.

    Raises:
        InputError: a label is not one of `class_names`.
    """
    numbers = labels.map({name: number for number, name in enumerate(class_names)})
    if numbers.isna().any():
        unknown = labels[numbers.isna().to_numpy()].iloc[0]
        raise InputError(f"{table}: label {unknown!r} is not one of the run's {len(class_names)} classes (labels.json)")
    return numbers.to_numpy(dtype=int)


def _refuse_repeated(site_ids: pd.Series, table: str) -> None:
    if (repeated := site_ids.duplicated()).any():
        raise InputError(f"{table}: site {site_ids[repeated].iloc[0]} occurs more than once; every site counts once")


def evaluate_predictions(
    predictions: pd.DataFrame,
    *,
    train_index: pd.DataFrame,
    test_index: pd.DataFrame,
    class_names: Sequence[str],
    split_policy: str,
    out: Path,
    seed: int = 0,
    replicates: int = 2000,
    resample: Literal["well", "plate"] = "well",
) -> dict[str, Any]:
    """Judge predictions of the test part and write `scores.json`, `scores.csv`, `per_class.csv`, `confusion.csv`.

    Args:
        predictions: as `perturbjax predict` writes them; rows of the training part are scored too, without baselines.
        train_index, test_index: rows of the dataset's index, with `site_id`, `Metadata_Plate`, `Metadata_Well`, for
            the cell-count baseline `n_cells` and `mask_area`; `train_index` also `label`, the class name.
        class_names: classes in logit order.
        split_policy: site, well, plate, layout, compound, or the name of a file.
        out: folder to write to.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        resample: what the bootstrap draws whole. Plates give the wider, more cautious interval, and need several.

    Returns:
        what `scores.json` holds: `levels` {site|well: {subject: {metric: {value, low, high}}}}, `leads` (model minus
        each baseline), `n`, `train`, `overlap`, `warnings`, `skipped` (baseline: why), `split`, `seed`, `replicates`.

    Raises:
        InputError: as `read_predictions`, or an index lacks a column.
    """
    for name, index in (("train_index", train_index), ("test_index", test_index)):
        needed = ("site_id", PLATE, WELL, *(("label",) if name == "train_index" else ()))
        if missing := [column for column in needed if column not in index.columns]:
            raise InputError(f"{name}: no column {missing[0]!r}; it has {', '.join(map(str, index.columns))}")
    judged = read_predictions(predictions, test_index, class_names)
    train_labels = label_numbers(train_index["label"], class_names, "train_index")
    subjects, skipped = _subjects(judged, train_index, train_labels)
    wells = well_ids(judged.index)
    clusters = wells if resample == "well" else pd.factorize(judged.index[PLATE])[0]
    cluster_of_well = clusters[np.unique(wells, return_index=True)[1]]
    counts = {"site": _count_sites(subjects, judged.labels, clusters, train_labels, seed)}
    try:
        counts["well"] = _count_wells(subjects, judged.labels, wells, cluster_of_well, train_labels, seed)
    except InputError as error:
        skipped["well level"] = str(error)

    estimates = {level: estimate(found, replicates=replicates, seed=seed) for level, found in counts.items()}
    levels = {level: scores for level, (scores, _) in estimates.items()}
    leads = {level: lead for level, (_, lead) in estimates.items()}
    names = np.asarray(class_names, dtype=object)
    shared = overlap(train_index, judged.index.assign(label=names[judged.labels]))
    result = {
        "split": split_policy,
        "split_words": MEANING.get(split_policy, "as given in a split file"),
        "n": {
            "site": len(judged.labels),
            "well": len(cluster_of_well),
            "plate": int(test_index[PLATE].nunique()),
            "train_site": len(train_index),
            "classes": len(class_names),
            "test_classes": len(np.unique(judged.labels)),
        },
        "levels": levels,
        "leads": leads,
        "train": _train_scores(predictions, train_index, class_names),
        "overlap": dataclasses.asdict(shared),
        "skipped": skipped,
        "seed": seed,
        "replicates": replicates,
        "resample": resample,
    }
    told = {level: leads[level] for level in shown_levels(result)}
    result["warnings"] = warnings(split_policy, shared, levels, told)
    _write(Path(out), result, judged, wells, class_names)
    return result


def _subjects(
    judged: Judged, train_index: pd.DataFrame, train_labels: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Probabilities of the model and of each baseline, and why a baseline is absent."""
    n, classes = judged.probabilities.shape
    subjects = {MODEL: judged.probabilities, "majority": baselines.majority(train_labels, n, classes)}
    skipped = {}
    for name, baseline in (("position", baselines.position), ("cell count", baselines.cell_count)):
        try:
            subjects[name] = baseline(train_index, train_labels, judged.index, classes)
        except baselines.Unavailable as reason:
            skipped[name] = str(reason)
    return subjects, skipped


def _count_sites(
    subjects: dict[str, np.ndarray], labels: np.ndarray, clusters: np.ndarray, train_labels: np.ndarray, seed: int
) -> dict[str, Counts]:
    classes = subjects[MODEL].shape[1]
    counts = {name: count(labels, probabilities, clusters) for name, probabilities in subjects.items()}
    chance = baselines.chance_counts(labels, train_labels, classes, clusters, seed=seed)
    return {MODEL: counts.pop(MODEL), "majority": counts.pop("majority"), "chance": chance, **counts}


def _count_wells(
    subjects: dict[str, np.ndarray],
    labels: np.ndarray,
    wells: np.ndarray,
    cluster_of_well: np.ndarray,
    train_labels: np.ndarray,
    seed: int,
) -> dict[str, Counts]:
    together = {name: aggregate_wells(wells, labels, probabilities) for name, probabilities in subjects.items()}
    probabilities = {name: mean for name, (_, mean) in together.items()}
    return _count_sites(probabilities, together[MODEL][0], cluster_of_well, train_labels, seed)


def _train_scores(predictions: pd.DataFrame, train_index: pd.DataFrame, class_names: Sequence[str]) -> dict[str, float]:
    """The model's scores on what it was trained on (sites), where predictions of all of it are there; else empty."""
    if "part" not in predictions.columns or not (predictions["part"] == "train").any():
        return {}
    fitted = read_predictions(predictions, train_index, class_names, part="train")
    return score(fitted.labels, fitted.probabilities)


def _write(out: Path, result: dict[str, Any], judged: Judged, wells: np.ndarray, class_names: Sequence[str]) -> None:
    make_folder(out)
    matrix = confusion_matrix(judged.labels, judged.probabilities.argmax(axis=1), len(class_names))
    tables = {
        "scores.csv": (tidy(result), False),
        "per_class.csv": (per_class(judged.labels, judged.probabilities, wells, class_names), False),
        "confusion.csv": (pd.DataFrame(matrix, index=pd.Index(class_names, name="true"), columns=class_names), True),
    }
    for name, (table, with_index) in tables.items():
        with atomic(out / name) as temporary:
            table.to_csv(temporary, index=with_index)
    write_json(out / "scores.json", result)


def tidy(result: dict[str, Any]) -> pd.DataFrame:
    """One row a number: level, subject, metric, value, low, high, n."""
    rows = [
        {"level": level, "subject": subject, "metric": metric, **values, "n": result["n"][level]}
        for level, subjects in result["levels"].items()
        for subject, scores in subjects.items()
        for metric, values in scores.items()
    ]
    rows += [
        {
            "level": "site",
            "subject": "model on training sites",
            "metric": metric,
            "value": value,
            "low": np.nan,
            "high": np.nan,
            "n": result["n"]["train_site"],
        }
        for metric, value in result["train"].items()
    ]
    return pd.DataFrame(rows)


def print_table(result: dict[str, Any]) -> None:
    """Show scores to a person, on stdout: the model beside its baselines, by site and by well, and warnings."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(escape(tested_on(result)))
    metrics = shown_metrics(result)
    gap = " " if console.width >= 105 else "\n"
    for level in shown_levels(result):
        subjects = result["levels"][level]
        table = Table(title=f"by {level} (n = {result['n'][level]})", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("")
        for metric in metrics:
            table.add_column(METRIC_WORDS[metric], justify="right")
        for subject, scores in subjects.items():
            cells = [_cell(scores[metric], gap) for metric in metrics]
            table.add_row(subject, *cells, style="bold" if subject == MODEL else "", end_section=subject == MODEL)
        if level == "site" and result["train"]:
            table.add_section()
            table.add_row("on training", *(f"{result['train'][metric]:.3f}" for metric in metrics))
        console.print(table)
    console.print(f"In brackets: 95 % intervals from {result['replicates']} resamples of whole {result['resample']}s.")
    for sentence in headline(result):
        console.print(f"[bold]{escape(sentence)}[/bold]")
    for name, why in result["skipped"].items():
        console.print(f"no {name}: {escape(why)}")
    for warning in result["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def tested_on(result: dict[str, Any]) -> str:
    """One sentence: how the split was made, and how much the test part holds."""
    n = result["n"]
    tested = ", ".join(f"{n[what]} {what}{'' if n[what] == 1 else 's'}" for what in ("site", "well", "plate"))
    return (
        f"Split by {result['split']}: {result['split_words']}. Tested on {tested}, "
        f"{n['test_classes']} of {n['classes']} classes; trained on {n['train_site']} sites."
    )


def headline(result: dict[str, Any]) -> list[str]:
    """For each level one sentence: balanced accuracy, and its lead over the best baseline."""
    sentences = []
    for level in shown_levels(result):
        subjects = {name: scores["balanced_accuracy"] for name, scores in result["levels"][level].items()}
        best = max((name for name in subjects if name != MODEL), key=lambda name: subjects[name]["value"])
        own, lead = subjects[MODEL], result["leads"][level][best]["balanced_accuracy"]
        sentences.append(
            f"Balanced accuracy by {level} {_cell(own)}; lead over the best baseline ({best}) {_cell(lead)}."
        )
    return sentences


def shown_metrics(result: dict[str, Any]) -> list[str]:
    """Metrics worth a column: top 5 says nothing where there are five classes or fewer."""
    return [metric for metric in METRICS if metric != "top5" or result["n"]["classes"] > TOP_K]


def shown_levels(result: dict[str, Any]) -> list[str]:
    """Levels worth a table: one where every well is one site."""
    return [level for level in result["levels"] if level == "site" or result["n"]["well"] < result["n"]["site"]]


def _cell(estimate: dict[str, float], gap: str = " ") -> str:
    return f"{estimate['value']:.3f}{gap}[{estimate['low']:.2f}, {estimate['high']:.2f}]"
