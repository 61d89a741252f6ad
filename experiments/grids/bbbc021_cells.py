"""Mechanism of action of BBBC021 cells on new plates, with networks trained from scratch.

Data: 1,996 MCF-7 cells (68 x 68 pixels; DNA, actin, tubulin) of 55 plates, 39 compounds and 13
mechanisms, a subset of BBBC021 (Caie et al. 2010, Ljosa et al. 2012). Recipe `paper` needs the
dataset of the median of the channels, all other recipes the dataset with separate channels:

    perturbjax build --load-data DIR/load_data.csv --images DIR --out cells --aggregate none \
        --segment-channels DNA --diameter 45 --label-column Metadata_moa
    perturbjax build --load-data DIR/load_data.csv --images DIR --out median --aggregate median \
        --segment-channels DNA --diameter 45 --label-column Metadata_moa
    python -m experiments.grid --grid bbbc021_cells --data cells=cells --recipes cells --out runs
    python -m experiments.grid --grid bbbc021_cells --data median=median --recipes paper \
        --folds 0 --out runs

Cost: 3 minutes per fold for `cells`, 22 for `paper` (two cores). Result (balanced accuracy):
`cells` 0.544 (mean of 5 folds), `paper` 0.250 (fold 0); docs/results.md.
"""

from __future__ import annotations

from experiments.grid import Grid, Training

CELLS = ("--preset", "cells", "--precision", "bf16")

GRID = Grid(
    recipes={
        "paper": Training(("--preset", "paper", "--crop", "64", "--epochs", "60")),
        "cells": Training(CELLS),
        "cells_log": Training((*CELLS, "--normalize", "log")),
        "cells_plate": Training((*CELLS, "--normalize", "plate")),
    }
)
