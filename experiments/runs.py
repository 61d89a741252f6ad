"""Runs made by the public commands, and tables of their scores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import console

METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
SCORES = "evaluation/scores.json"


def check_names(flag: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        InputError: names the flag, and lists what it takes.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{flag} {name}: unknown; choose among {', '.join(known)}")


def command(module: str, *words: object) -> None:
    """Run one public command, its progress shown; leave with its status if it fails."""
    line = [sys.executable, "-m", module, *map(str, words)]
    console.print("$ " + " ".join(line[2:]))
    process = subprocess.Popen(line)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C or SIGTERM: let it save what it has
        process.terminate()
        process.wait()
        raise
    if status:
        sys.exit(status)


def train_and_judge(run: Path, *flags: object) -> dict[str, float]:
    """`perturbjax train` and `evaluate`; the scores of the run, and the minutes that training took.

    A finished run is left as it is, unless its flags are others: that is an error of `train`.
    """
    command("perturbjax.cli", "train", "--out", run, *flags)
    if not (run / SCORES).exists():
        command("perturbjax.cli", "evaluate", "--run", run, "--no-training-sites", "--no-look")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row["seconds"] for row in rows if row["split"] == "train")
    return {"minutes": round(seconds / 60, 1), **scores_of(run / SCORES)}


def scores_of(file: Path) -> dict[str, float]:
    """Scores at site level of the model of a `scores.json` and of its baselines, with the model's interval."""
    levels = json.loads(file.read_text())["levels"]
    found: dict[str, float] = {}
    for metric in METRICS:
        estimate = levels["site"]["model"][metric]
        found |= {
            metric: estimate["value"],
            f"{metric}_low": estimate["low"],
            f"{metric}_high": estimate["high"],
        }
        found[f"well_{metric}"] = levels["well"]["model"][metric]["value"]
    for baseline in ("majority", "position", "cell count"):
        for metric in METRICS[:2]:
            found[f"{baseline}_{metric}".replace(" ", "_")] = levels["site"][baseline][metric][
                "value"
            ]
    return found


def write_table(table: pd.DataFrame, text: str, out: Path) -> None:
    """`scores.csv` and `scores.md` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "scores.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic(out / "scores.md") as temporary:
        temporary.write_text(text)


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [
        list(table.columns),
        ["---"] * len(table.columns),
        *table.astype(str).to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def by_fold(table: pd.DataFrame) -> str:
    """A row a run and a mean a recipe, as Markdown."""
    heads = ("recipe", "fold", *METRICS, "by well", "majority", "position, balanced", "minutes")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for recipe, rows in table.groupby("recipe", sort=False):
        for _, row in rows.iterrows():
            cells = [
                f"{row[m]:.3f} [{row[m + '_low']:.2f}, {row[m + '_high']:.2f}]" for m in METRICS
            ]
            lines.append(_line(recipe, row["fold"], cells, row))
        if len(rows) > 1:
            mean = rows.mean(numeric_only=True)
            lines.append(_line(recipe, "mean", [f"**{mean[m]:.3f}**" for m in METRICS], mean))
    return "\n".join(lines) + "\n"


def _line(recipe: str, fold: object, cells: list[str], row: pd.Series) -> str:
    rest = [
        f"{row[name]:.3f}"
        for name in ("well_balanced_accuracy", "majority_accuracy", "position_balanced_accuracy")
    ]
    return "| " + " | ".join([recipe, str(fold), *cells, *rest, f"{row['minutes']:.1f}"]) + " |"
