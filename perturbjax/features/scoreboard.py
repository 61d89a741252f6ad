"""Several classifiers beside each other and beside their baselines: one table, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.evaluation import baselines
from perturbjax.evaluation.bootstrap import estimate
from perturbjax.evaluation.scores import METRICS, TOP_K, count, score
from perturbjax.evaluation.wells import aggregate_wells, well_ids
from perturbjax.files import atomic

#: Levels of the table, in words.
LEVELS = {
    "site": "every row of the features",
    "treated": "rows that are not negative controls",
    "well": "wells: the mean of their rows' probabilities",
}
SHOWN = {
    "accuracy": "accuracy",
    "top5": f"top {TOP_K}",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
}


@dataclass(frozen=True)
class Fold:
    """One way of dealing rows to training and judging, with the probabilities that models gave.

    `train` and `test` have `site_id`, `Metadata_Plate`, `Metadata_Well`, `label` (class name) and `negcon` (true or
    false); probabilities are (rows, classes) in the order of the class names.
    """

    name: str
    train: pd.DataFrame
    test: pd.DataFrame
    train_probabilities: dict[str, Float[np.ndarray, "train classes"]]
    test_probabilities: dict[str, Float[np.ndarray, "test classes"]]


def scoreboard(
    folds: Sequence[Fold], class_names: Sequence[str], *, replicates: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Scores of every model and baseline over the test rows of all folds together.

    Returns:
        one row a level and subject, best balanced accuracy first: `level`, `subject`, `baseline` (true or false),
        `n`, each metric of `METRICS` with `_low` and `_high` (95 %, resampling whole wells), and `train_<metric>`, the
        mean over folds of the score on the training rows.
    """
    number = {name: i for i, name in enumerate(class_names)}
    test = pd.concat([fold.test for fold in folds], ignore_index=True)
    labels = test["label"].map(number).to_numpy(dtype=int)
    train_labels = np.concatenate([fold.train["label"].map(number).to_numpy(dtype=int) for fold in folds])
    subjects = {
        name: np.concatenate([fold.test_probabilities[name] for fold in folds]) for name in folds[0].test_probabilities
    }
    models = tuple(subjects)
    subjects |= _baselines(folds, number)
    treated = ~test["negcon"].to_numpy(dtype=bool)
    found = [_level("site", subjects, labels, well_ids(test), train_labels, replicates, seed)]
    if treated.any() and not treated.all():
        some = {name: values[treated] for name, values in subjects.items()}
        wells = well_ids(test[treated])
        found.append(_level("treated", some, labels[treated], wells, train_labels, replicates, seed))
    wells = well_ids(test)
    if wells.max() + 1 < len(test) and _one_label_a_well(wells, labels):
        together = {name: aggregate_wells(wells, labels, values) for name, values in subjects.items()}
        well_labels = next(iter(together.values()))[0]
        means = {name: mean for name, (_, mean) in together.items()}
        found.append(_level("well", means, well_labels, np.arange(len(well_labels)), train_labels, replicates, seed))
    table = pd.concat(found, ignore_index=True)
    table.insert(2, "baseline", ~table["subject"].isin(models))
    table = table.merge(_train_scores(folds, models, number), on="subject", how="left")
    order = table["level"].map({name: i for i, name in enumerate(LEVELS)})
    return (
        table.assign(_order=order)
        .sort_values(["_order", "balanced_accuracy", "accuracy"], ascending=[True, False, False], kind="stable")
        .drop(columns="_order")
        .reset_index(drop=True)
    )


def _baselines(folds: Sequence[Fold], number: dict[str, int]) -> dict[str, np.ndarray]:
    """Majority, position and cell count, each fitted on its fold's training rows; what cannot be computed is absent."""
    found: dict[str, list[np.ndarray]] = {"majority": [], "position": [], "cell count": []}
    for fold in folds:
        labels = fold.train["label"].map(number).to_numpy(dtype=int)
        found["majority"].append(baselines.majority(labels, len(fold.test), len(number)))
        for name, baseline in (("position", baselines.position), ("cell count", baselines.cell_count)):
            try:
                found[name].append(baseline(fold.train, labels, fold.test, len(number)))
            except baselines.Unavailable:
                continue
    return {name: np.concatenate(parts) for name, parts in found.items() if len(parts) == len(folds)}


def _level(
    name: str,
    subjects: dict[str, np.ndarray],
    labels: Int[np.ndarray, " n"],
    clusters: Int[np.ndarray, " n"],
    train_labels: np.ndarray,
    replicates: int,
    seed: int,
) -> pd.DataFrame:
    classes = next(iter(subjects.values())).shape[1]
    counts = {subject: count(labels, values, clusters) for subject, values in subjects.items()}
    counts["chance"] = baselines.chance_counts(labels, train_labels, classes, clusters, seed=seed)
    scores, _ = estimate(counts, replicates=replicates, seed=seed)
    rows = []
    for subject, metrics in scores.items():
        row = {"level": name, "subject": subject, "n": len(labels)}
        for metric, value in metrics.items():
            row |= {metric: value["value"], f"{metric}_low": value["low"], f"{metric}_high": value["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _one_label_a_well(wells: np.ndarray, labels: np.ndarray) -> Bool[np.ndarray, ""]:
    return pd.Series(labels).groupby(wells).nunique().max() == 1


def _train_scores(folds: Sequence[Fold], models: Sequence[str], number: dict[str, int]) -> pd.DataFrame:
    rows = []
    for name in models:
        scores = [
            score(fold.train["label"].map(number).to_numpy(dtype=int), fold.train_probabilities[name]) for fold in folds
        ]
        rows.append({"subject": name, **{f"train_{m}": float(np.mean([s[m] for s in scores])) for m in METRICS}})
    return pd.DataFrame(rows)


def print_scoreboard(table: pd.DataFrame) -> None:
    """Show the table on stdout: training and test side by side, one block a level."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    wide = console.width >= 125
    gap = " " if wide else "\n"
    for level, rows in table.groupby("level", sort=False):
        title = f"{LEVELS[level]} (n = {rows['n'].iloc[0]})"
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        words = " ".join(rows["subject"]).split()
        shown.add_column("", min_width=max(map(len, words), default=0))  # names break between words, never inside
        for column in ("train accuracy", *(f"test {words}" for words in SHOWN.values())):
            shown.add_column(column, justify="right", max_width=None if wide else len("balanced"))
        for _, row in rows.iterrows():
            train = "" if row["baseline"] else f"{row['train_accuracy']:.3f}"
            cells = [f"{row[m]:.3f}{gap}[{row[f'{m}_low']:.2f}, {row[f'{m}_high']:.2f}]" for m in SHOWN]
            shown.add_row(row["subject"], train, *cells, style="dim" if row["baseline"] else "")
        console.print(shown)
    console.print("In brackets: 95 % intervals from bootstrap resamples of whole wells. Dim rows are baselines.")
    for sentence in unbeaten(table):
        console.print(sentence)


def unbeaten(table: pd.DataFrame) -> list[str]:
    """One sentence for each baseline that the best model does not beat in balanced accuracy, over all rows."""
    rows = table[table["level"] == "site"]
    best = rows[~rows["baseline"]].iloc[0]
    above = rows[rows["baseline"] & (rows["balanced_accuracy"] >= best["balanced_accuracy"])]
    return [
        f"warning: the baseline '{row['subject']}' ({row['balanced_accuracy']:.3f}) is not beaten by the best model "
        f"({best['subject']}, {best['balanced_accuracy']:.3f}) in balanced accuracy"
        for _, row in above.iterrows()
    ]


def plot_scoreboard(table: pd.DataFrame, path: Path, title: str) -> None:
    """Accuracy and balanced accuracy of models (train hollow, test filled, with interval) and baselines, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = table[table["level"] == table["level"].iloc[0]].iloc[::-1].reset_index(drop=True)
    height = 1.6 + 0.34 * len(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    for axis, metric in zip(axes, ("accuracy", "balanced_accuracy"), strict=True):
        for y, row in rows.iterrows():
            colour = "0.55" if row["baseline"] else "C0"
            axis.plot([row[f"{metric}_low"], row[f"{metric}_high"]], [y, y], color=colour, lw=2)
            axis.plot(row[metric], y, "o", color=colour, ms=7)
            if not row["baseline"]:
                axis.plot(row[f"train_{metric}"], y, "o", mfc="none", color=colour, ms=7)
            axis.annotate(f"{row[metric]:.3f}", (row[metric], y), (0, 7), textcoords="offset points", ha="center",
                          fontsize=8, color=colour)  # fmt: skip
        axis.set(xlim=(-0.03, 1.05), ylim=(-0.6, len(rows) - 0.3), xlabel=SHOWN[metric])
        axis.grid(axis="x", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), rows["subject"])
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("filled: test, with 95 % interval (whole wells resampled); hollow: training; grey: baselines",
                     fontsize=9)  # fmt: skip
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
