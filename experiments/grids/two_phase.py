"""Effect of ImageNet weights on cells: from scratch, frozen, and fine-tuned in two phases.

    python -m experiments.grid --grid two_phase --data bbbc021_cells=DIR --out runs/two_phase

- scratch: random weights, one phase.
- frozen: ImageNet weights; only the new layers are trained.
- two_phase: the new layers for 3 epochs, then all layers, the backbone at a tenth of the rate.
- two_phase_attention: the same with the mask-attention head.

Cost: not recorded separately. Result on fold 0 of BBBC021 (balanced accuracy): scratch 0.208,
two_phase 0.462 (docs/results.md).
"""

from __future__ import annotations

from experiments.grid import Grid, Training

WEIGHTS = ("--weights", "package:efficientnet_lite0", "--learning-rate", "0.003")
TWO_PHASE = (*WEIGHTS, "--freeze-epochs", "3")

GRID = Grid(
    recipes={
        "scratch": Training(("--learning-rate", "0.002")),
        "frozen": Training((*WEIGHTS, "--head", "dense", "--freeze-epochs", "10")),
        "two_phase": Training((*TWO_PHASE, "--head", "dense")),
        "two_phase_attention": Training((*TWO_PHASE, "--head", "attention")),
    },
    folds=(0,),
    flags=(
        *("--preset", "cells", "--normalize", "plate", "--model", "efficientnet_lite0"),
        *("--epochs", "10", "--crop", "64"),
    ),
)
