"""Every preset of `train`, compared with the linear baseline on ImageNet features.

    python -m experiments.grid --grid presets --data bbbc021_cells=DIR sirna_plate=DIR \
        --splits auto --recipes linear "linear, resized" pretrained "pretrained, resized" \
        --out runs/presets --page docs/presets.md

Cost: 6 to 7 minutes per fold and seed for `pretrained` on 1,571 cells (two cores), seconds for
`linear`. `resized` recipes shrink whole fields, as before native resolution was the default; they
are left out for sites of up to 128 pixels, which are not shrunk. Results: docs/presets.md.
"""

from __future__ import annotations

from experiments.grid import LINEAR, Grid, Training
from perturbjax.core.config import PRESETS
from perturbjax.profiles.feature_cache import SMALL_SITE

RESIZED = {"transfer": {"window": 0}}
GRID = Grid(
    recipes={
        LINEAR: Training(),
        "linear, resized": Training(shrinks_above=SMALL_SITE),
        **{name: Training(("--preset", name)) for name in PRESETS},
        "pretrained, resized": Training(
            ("--preset", "pretrained"), RESIZED, shrinks_above=SMALL_SITE
        ),
    },
    splits=("plate", "layout"),
)
