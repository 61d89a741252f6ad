"""Does a network that knows photographs help with cells? Published weights, frozen and fine-tuned, and from scratch.

    python -m experiments.two_phase --data DIR --out runs/two_phase

trains one backbone in up to four ways on the same plates and judges each on the plates held out:

- `scratch`: random weights, one phase;
- `frozen`: published weights, only the new layers are trained;
- `two_phase`: the new layers first, then all of them, the backbone at a tenth of the rate;
- `two_phase_attention`: the same, with the mask-attention head.

Every run is one `perturbjax train` and one `perturbjax evaluate`, as anyone would type them; run again, it goes on
where it was stopped. `scores.csv` and `scores.md` gather what was measured, with the minutes that training took.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.runs import by_fold, check_names, train_and_judge, write_table
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_sound

WAYS = ("scratch", "frozen", "two_phase", "two_phase_attention")


@dataclass(frozen=True)
class Config:
    data: Path
    """Dataset directory."""
    out: Path
    """Folder for runs and scores."""
    backbone: str = "efficientnet_lite0"
    """The network."""
    weights: str = "package:efficientnet_lite0"
    """Its published weights."""
    ways: tuple[str, ...] = WAYS
    """Which ways to train it."""
    folds: tuple[int, ...] = (0,)
    """Which of the five folds of plates to judge on."""
    epochs: int = 10
    """Of every way, so that all see the same number of images."""
    freeze_epochs: int = 3
    """Of the two-phase ways."""
    crop: int = 64
    """Side in pixels of what the network sees."""
    flags: str = "--preset cells --normalize plate"
    """More flags for `perturbjax train`, alike for all; those above win."""

    def __post_init__(self) -> None:
        require_sound(self)
        require(
            "folds",
            self.folds,
            bool(self.folds) and all(0 <= fold < 5 for fold in self.folds),
            "some of 0 to 4",
        )
        require("epochs", self.epochs, self.epochs >= 1, "at least one")
        require(
            "freeze-epochs",
            self.freeze_epochs,
            0 <= self.freeze_epochs <= self.epochs,
            "from 0 to --epochs",
        )
        require("crop", self.crop, self.crop >= 8, "at least 8 pixels")


def flags_of(way: str, options: Config) -> tuple[object, ...]:
    """What `perturbjax train` is told beside what all ways share."""
    if way == "scratch":
        return ("--learning-rate", 0.002)
    frozen = options.epochs if way == "frozen" else options.freeze_epochs
    head = "attention" if way.endswith("attention") else "dense"
    return (
        "--weights",
        options.weights,
        "--head",
        head,
        "--freeze-epochs",
        frozen,
        "--learning-rate",
        0.003,
    )


def main(options: Config) -> None:
    """Train and judge every way and fold; print and write one table."""
    check_names("--ways", options.ways, WAYS)
    rows = []
    for way in options.ways:
        for fold in options.folds:
            scores = train_and_judge(
                options.out / f"{way}_fold{fold}",
                *(*options.flags.split(), "--data", options.data),
                *("--model", options.backbone, "--split", "plate", "--folds", 5, "--fold", fold),
                *("--epochs", options.epochs, "--crop", options.crop, *flags_of(way, options)),
            )
            rows.append({"recipe": way, "fold": fold, **scores})
            table = pd.DataFrame(rows)
            write_table(table, by_fold(table), options.out)
    print((options.out / "scores.md").read_text())


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
