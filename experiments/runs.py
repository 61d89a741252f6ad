"""Runs made with the public commands, and tables of their scores."""

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


def check_names(flag: str, names: Sequence[str], available: Iterable[str]) -> None:
    """Check that all names exist.

    Raises:
        InputError: a name does not exist; the message lists those that do.
    """
    for name in names:
        if name not in available:
            raise InputError(f"{flag} {name}: unknown; choose among {', '.join(available)}")


def command(module: str, *words: object) -> None:
    """Run a public command, with its progress; exit with its status if it fails."""
    line = [sys.executable, "-m", module, *map(str, words)]
    console.print("$ " + " ".join(line[2:]))
    process = subprocess.Popen(line)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C or SIGTERM: let the command save its state
        process.terminate()
        process.wait()
        raise
    if status:
        sys.exit(status)


def train_and_evaluate(run: Path, *flags: object) -> None:
    """Run `perturbjax train` and `evaluate`; a finished run is skipped.

    A finished run with other flags is an error of `train`.
    """
    command("perturbjax.cli", "train", "--out", run, *flags)
    if not (run / SCORES).exists():
        skip = ("--no-training-sites", "--no-attribution")
        command("perturbjax.cli", "evaluate", "--run", run, *skip)


def scores_of(file: Path) -> dict[str, float]:
    """Read scores at site level from a `scores.json`: the model's with interval, and baselines."""
    levels = json.loads(file.read_text())["levels"]
    scores: dict[str, float] = {}
    for metric in METRICS:
        estimate = levels["site"]["model"][metric]
        scores[metric] = estimate["value"]
        scores |= {f"{metric}_{end}": estimate[end] for end in ("low", "high")}
        scores[f"well_{metric}"] = levels["well"]["model"][metric]["value"]
    for baseline in ("majority", "position", "cell count"):
        for metric in METRICS[:2]:
            name = f"{baseline}_{metric}".replace(" ", "_")
            scores[name] = levels["site"][baseline][metric]["value"]
    return scores


def write_table(table: pd.DataFrame, text: str, out: Path) -> None:
    """Write `scores.csv` and `scores.md` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "scores.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic(out / "scores.md") as temporary:
        temporary.write_text(text)


def markdown(table: pd.DataFrame) -> str:
    """Format a table as Markdown."""
    heading = [list(table.columns), ["---"] * len(table.columns)]
    rows = [*heading, *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
