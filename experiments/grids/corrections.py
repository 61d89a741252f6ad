"""Effect of each correction of the original recipe, and of the mask.

    python -m experiments.grid --grid corrections --data bbbc021_median=DIR --out runs/corrections

The dataset has one channel, as the original's: the median of all channels (`build --aggregate
median`). Test sites of `original` and `binary mask` are augmented at random, as in the original
program; the field that corrects the augmentation corrects both.

Cost: 2.4 to 5.4 minutes per run (one core), 30 runs. Result: without a mask, or with the mask of
another site, the balanced accuracy is 0.03 to 0.05 lower (docs/fidelity.md).
"""

from __future__ import annotations

from experiments.grid import Grid, Training

ORIGINAL, CORRECTED = ("--preset", "original"), ("--preset", "paper")

GRID = Grid(
    recipes={
        "original": Training(ORIGINAL),
        "binary mask": Training((*ORIGINAL, "--mask-encoding", "binary")),
        "augmentation": Training(ORIGINAL, {"augment": {"legacy_augmentation": False}}),
        "all, binary": Training(CORRECTED),
        "all, boundary": Training((*CORRECTED, "--mask-encoding", "boundary")),
        "all, distance": Training((*CORRECTED, "--mask-encoding", "distance")),
        "multiscale": Training((*CORRECTED, "--model", "attention_multiscale")),
        "no mask": Training((*CORRECTED, "--mask-use", "none")),
        "mask only": Training((*CORRECTED, "--mask-use", "only")),
        "masks shuffled": Training((*CORRECTED, "--mask-use", "shuffle")),
    },
    folds=(0,),
    seeds=(0, 1, 2),
    flags=("--crop", "32", "--epochs", "40"),
)
