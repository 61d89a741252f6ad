"""The whole job on real cells: BBBC021 crops, Cellpose masks, mechanism of action, plates held out.

Data: 1,996 MCF-7 cells (68×68 pixels, DNA, Actin, Tubulin) of 55 plates, 39 compounds, 13 mechanisms of action, as
single-channel TIFFs with load_data.csv (a subset of BBBC021; Caie et al. 2010, Ljosa et al. 2012).

    python -m experiments.bbbc021_cells --images DIR/bbbc021_cells --weights DIR/nuclei_dsb2018 --out runs/bbbc021

runs `data_prep build`, `perturbjax train` and `perturbjax evaluate`, as anyone would by hand, once a recipe and fold,
and writes `scores.csv` and `scores.md` beside the runs. Run again, it goes on where it was stopped.

Recipes: `paper` is the original's (median of the three channels, 60 epochs, 64×64 crops); `cells` keeps the channels
apart and sees their intensities both as they are and relative to their plate, `cells_log` only as they are,
`cells_plate` only relative to their plate. Scores, cost and what was tried: see "Results" in the README.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from perturbjax.console import console, run_command
from perturbjax.files import atomic

LABEL = "Metadata_moa"
#: Nuclei of these crops are about this wide, in pixels.
DIAMETER = 45
CELLS = ("--preset", "cells", "--precision", "bf16")
#: Recipe → (how channels become an image, flags of `perturbjax train`).
RECIPES = {
    "paper": ("median", ("--preset", "paper", "--crop", "64", "--epochs", "60")),
    "cells": ("none", CELLS),
    "cells_log": ("none", (*CELLS, "--normalize", "log")),
    "cells_plate": ("none", (*CELLS, "--normalize", "plate")),
}
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class Options:
    images: Path
    """Folder of load_data.csv and images/."""
    weights: Path
    """Cellpose 3.1 weights that segment nuclei."""
    out: Path
    """Folder for datasets, runs and scores."""
    recipes: tuple[str, ...] = ("paper", "cells")
    """Which recipes to run."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Which of the five folds of plates to judge on."""
    flags: str = ""
    """More flags for `perturbjax train`, in one string; they change the runs' numbers."""


def main(options: Options) -> None:
    """Build, train and judge every recipe and fold; print and write one table."""
    rows = []
    for recipe in options.recipes:
        aggregate, flags = RECIPES[recipe]
        data = build(options, aggregate)
        for fold in options.folds:
            run, seconds = train_and_judge(options, data, recipe, fold, (*flags, *options.flags.split()))
            rows.append({"recipe": recipe, "fold": fold, "minutes": round(seconds / 60, 1), **scores_of(run)})
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic(options.out / "scores.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic(options.out / "scores.md") as temporary:
        temporary.write_text(markdown(table))
    print(markdown(table))


def build(options: Options, aggregate: str) -> Path:
    """Cellpose masks of the DNA channel, and the dataset."""
    data = options.out / f"dataset_{aggregate}"
    command(
        *("data_prep", "build", "--load-data", options.images / "load_data.csv", "--images", options.images),
        *("--out", data, "--aggregate", aggregate, "--segmenter", "cellpose", "--weights", options.weights),
        *("--segment-channels", "DNA", "--diameter", DIAMETER, "--label-column", LABEL),
    )
    return data


def train_and_judge(options: Options, data: Path, recipe: str, fold: int, flags: tuple[str, ...]) -> tuple[Path, float]:
    """One run; gives its directory and the seconds that training took (0 where it was there before)."""
    run = options.out / f"{recipe}_fold{fold}"
    started = time.monotonic()
    command(
        *("perturbjax.cli", "train", "--data", data, "--out", run, *flags),
        *("--split", "plate", "--folds", 5, "--fold", fold),
    )
    seconds = sum(row["seconds"] for row in rows_of(run) if row["split"] == "train")
    console.print(f"{run}: {time.monotonic() - started:.0f} s")
    command("perturbjax.cli", "evaluate", "--run", run)
    return run, seconds


def command(module: str, *words: object) -> None:
    """Run one public command, its progress shown; leave with its status if it fails."""
    line = [sys.executable, "-m", module, *map(str, words)]
    console.print("$ " + " ".join(line[2:]))
    status = subprocess.run(line).returncode
    if status:
        sys.exit(status)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scores_of(run: Path) -> dict[str, float]:
    """Scores at site level of the model and of the best baseline, with the model's interval."""
    levels = json.loads((run / "evaluation/scores.json").read_text())["levels"]
    found: dict[str, float] = {}
    for metric in METRICS:
        estimate = levels["site"]["model"][metric]
        found |= {metric: estimate["value"], f"{metric}_low": estimate["low"], f"{metric}_high": estimate["high"]}
        found[f"well_{metric}"] = levels["well"]["model"][metric]["value"]
    for baseline, name in (("majority", "majority_accuracy"), ("position", "position_accuracy")):
        found[name] = levels["site"][baseline]["accuracy"]["value"]
    for baseline in ("position", "cell count"):
        found[f"{baseline}_balanced".replace(" ", "_")] = levels["site"][baseline]["balanced_accuracy"]["value"]
    return found


def markdown(table: pd.DataFrame) -> str:
    """A row a run and a mean a recipe, as Markdown."""
    heads = ("recipe", "fold", *METRICS, "by well", "majority", "position, balanced", "minutes")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for recipe, rows in table.groupby("recipe", sort=False):
        for _, row in rows.iterrows():
            cells = [f"{row[m]:.3f} [{row[m + '_low']:.2f}, {row[m + '_high']:.2f}]" for m in METRICS]
            lines.append(_line(recipe, row["fold"], cells, row))
        if len(rows) > 1:
            mean = rows.mean(numeric_only=True)
            lines.append(_line(recipe, "mean", [f"**{mean[m]:.3f}**" for m in METRICS], mean))
    return "\n".join(lines) + "\n"


def _line(recipe: str, fold: object, cells: list[str], row: pd.Series) -> str:
    rest = [f"{row[name]:.3f}" for name in ("well_balanced_accuracy", "majority_accuracy", "position_balanced")]
    return "| " + " | ".join([recipe, str(fold), *cells, *rest, f"{row['minutes']:.1f}"]) + " |"


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, description=__doc__.split("\n\n")[0])))
