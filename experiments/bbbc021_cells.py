"""The whole job on real cells: BBBC021 crops, Cellpose masks, mechanism of action, plates held out.

Data: 1,996 MCF-7 cells (68×68 pixels, DNA, Actin, Tubulin) of 55 plates, 39 compounds, 13 mechanisms of action, as
single-channel TIFFs with load_data.csv (a subset of BBBC021; Caie et al. 2010, Ljosa et al. 2012).

    python -m experiments.bbbc021_cells --images DIR/bbbc021_cells --weights DIR/nuclei_dsb2018 --out runs/bbbc021

runs `data_prep build`, `perturbjax train` and `perturbjax evaluate`, as anyone would by hand, once a recipe and fold,
and writes `scores.csv` and `scores.md` beside the runs. Run again, it goes on where it was stopped.

Recipes: `paper` is the original's (median of the three channels, 60 epochs, 64×64 crops); `cells` keeps the channels
apart and sees their intensities both as they are and relative to their plate, `cells_log` only as they are,
`cells_plate` only relative to their plate. Scores, cost and what was tried: see docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.runs import by_fold, check_names, command, train_and_judge, write_table
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_sound

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


@dataclass(frozen=True)
class Config:
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

    def __post_init__(self) -> None:
        require_sound(self)
        require(
            "folds",
            self.folds,
            bool(self.folds) and all(0 <= fold < 5 for fold in self.folds),
            "some of 0 to 4",
        )


def main(options: Config) -> None:
    """Build, train and judge every recipe and fold; print and write one table."""
    check_names("--recipes", options.recipes, RECIPES)
    rows = []
    for recipe in options.recipes:
        aggregate, flags = RECIPES[recipe]
        data = build(options, aggregate)
        for fold in options.folds:
            split = ("--split", "plate", "--folds", 5, "--fold", fold)
            run = options.out / f"{recipe}_fold{fold}"
            scores = train_and_judge(run, "--data", data, *flags, *options.flags.split(), *split)
            rows.append({"recipe": recipe, "fold": fold, **scores})
            table = pd.DataFrame(rows)
            write_table(table, by_fold(table), options.out)
    print((options.out / "scores.md").read_text())


def build(options: Config, aggregate: str) -> Path:
    """Cellpose masks of the DNA channel, and the dataset."""
    data = options.out / f"dataset_{aggregate}"
    command(
        *(
            "data_prep",
            "build",
            "--load-data",
            options.images / "load_data.csv",
            "--images",
            options.images,
        ),
        *(
            "--out",
            data,
            "--aggregate",
            aggregate,
            "--segmenter",
            "cellpose-torch",
            "--weights",
            options.weights,
        ),
        *("--segment-channels", "DNA", "--diameter", DIAMETER, "--label-column", LABEL),
    )
    return data


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
