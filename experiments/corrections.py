"""What does each correction of the original recipe change, and does the mask carry signal?

    python -m experiments.corrections --data DIR --out runs/corrections

trains the original's recipe as it was, with each of its faults mended alone, with all mended, the multiscale network,
and the ablations of the mask, each with several seeds, and judges all on the same held-out plates. `scores.md` has a
row a variant: mean over the seeds, and the largest distance from it. Every run is one `perturbjax train` and one
`perturbjax evaluate`; run again, it goes on where it was stopped.

Judged sites of `original` and `binary mask` are augmented at random, as the original's were: the flag that mends the
augmentation mends both. The table for BBBC021 is in docs/fidelity.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.runs import METRICS, check_names, command, train_and_judge, write_table
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_sound

MENDED = ("--preset", "paper")
#: Variant → flags of `perturbjax train`.
VARIANTS: dict[str, tuple[str, ...]] = {
    "original": ("--preset", "original"),
    "binary mask": ("--preset", "original", "--mask-encoding", "binary"),
    "augmentation": ("--preset", "original", "--no-legacy-augmentation"),
    "all, binary": MENDED,
    "all, boundary": (*MENDED, "--mask-encoding", "boundary"),
    "all, distance": (*MENDED, "--mask-encoding", "distance"),
    "multiscale": (*MENDED, "--model", "attention_multiscale"),
    "no mask": (*MENDED, "--mask-use", "none"),
    "mask only": (*MENDED, "--mask-use", "only"),
    "masks shuffled": (*MENDED, "--mask-use", "shuffle"),
}


@dataclass(frozen=True)
class Config:
    data: Path
    """Dataset directory, of one channel as the original's."""
    out: Path
    """Folder for runs and scores."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each, all on one split."""
    fold: int = 0
    """Which of the five folds of plates judges."""
    crop: int = 32
    """Side in pixels of what the network sees."""
    epochs: int = 40
    """Of every run."""

    def __post_init__(self) -> None:
        require_sound(self)
        seeds = bool(self.seeds) and min(self.seeds, default=0) >= 0
        require("seeds", self.seeds, seeds, "one or several, each 0 or more")
        require("fold", self.fold, 0 <= self.fold < 5, "from 0 to 4")
        require("crop", self.crop, self.crop >= 8, "at least 8 pixels")
        require("epochs", self.epochs, self.epochs >= 1, "at least one")


def main(options: Config) -> None:
    """Train and judge every variant and seed; print and write one table."""
    check_names("--variants", options.variants, VARIANTS)
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = options.out / "split.parquet"
    if not manifest.exists():
        split = ("--policy", "plate", "--folds", 5, "--fold", options.fold)
        command("perturbjax.cli", "split", "--data", options.data, "--out", manifest, *split)
    rows = []
    for seed in options.seeds:
        for variant in options.variants:
            scores = train_and_judge(
                options.out / f"{variant.replace(', ', '_').replace(' ', '_')}_seed{seed}",
                *("--data", options.data, *VARIANTS[variant]),
                *(
                    "--split-file",
                    manifest,
                    "--crop",
                    options.crop,
                    "--epochs",
                    options.epochs,
                    "--seed",
                    seed,
                ),
            )
            rows.append({"variant": variant, "seed": seed, **scores})
            table = pd.DataFrame(rows)
            write_table(table, by_variant(table), options.out)
    print((options.out / "scores.md").read_text())


def by_variant(table: pd.DataFrame) -> str:
    """A row a variant, as Markdown."""
    heads = ("variant", "seeds", *METRICS, "majority", "minutes a run")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for variant, rows in table.groupby("variant", sort=False):
        cells = [
            f"{rows[m].mean():.3f} ± {(rows[m] - rows[m].mean()).abs().max():.3f}" for m in METRICS
        ]
        rest = f"{rows['majority_accuracy'].mean():.3f}", f"{rows['minutes'].mean():.1f}"
        lines.append("| " + " | ".join([str(variant), str(len(rows)), *cells, *rest]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
