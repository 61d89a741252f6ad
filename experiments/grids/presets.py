"""Every preset of `train`, compared with the linear baseline on ImageNet features.

    python -m experiments.grid --grid presets --data bbbc021_cells=DIR --splits plate \
        --recipes linear pretrained --seeds 0 1 2 --out runs/presets --page docs/presets.md

Cost: 6 to 7 minutes per fold and seed for `pretrained` on 1,571 cells (two cores), seconds for
`linear`. `resized` recipes shrink whole fields, as before native resolution was the default; they
differ for sites of more than 128 pixels only. Result on test plates of BBBC021 (balanced accuracy,
mean of 5 folds and 3 seeds): linear 0.652, pretrained 0.699. All results: docs/presets.md.
"""

from __future__ import annotations

from experiments.grid import LINEAR, Grid, Training
from perturbjax.core.config import PRESETS

RESIZED = {"transfer": {"window": 0}}
GRID = Grid(
    recipes={
        LINEAR: Training(),
        "linear, resized": Training(),
        **{name: Training(("--preset", name)) for name in PRESETS},
        "pretrained, resized": Training(("--preset", "pretrained"), RESIZED),
    },
    splits=("plate", "layout"),
)
