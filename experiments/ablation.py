"""Compare variants of a method on the same train/test splits.

    python -m experiments.ablation --ablation linear --data DIR --out runs/linear
    python -m experiments.ablation --ablation head --data DIR --out runs/head [--branch]
    python -m experiments.ablation --ablation limits --data DIR --out runs/limits
    python -m experiments.ablation --ablation members --runs "runs/presets/*/plate/fold*/p*_seed*" \
        --out runs/members

`scores.csv` has one row per variant and fold, `scores.md` one row per variant: the means over the
folds, and on how many folds the balanced accuracy exceeds that of the reference. Both are rewritten
after every fold. The ablations are in `experiments/ablations/`, each with its cost and result.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pandas as pd

from experiments.runs import check_names, markdown, write_table
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_output, require_sound

FOLDS = 5
#: Value of `fold` for a score of the pooled test sites of all folds.
POOLED = "pooled"


@dataclass(frozen=True)
class Config:
    ablation: Literal["linear", "head", "members", "limits"]
    """Name of the ablation."""
    out: Path
    """Folder for scores, and for the trainings of --branch."""
    data: Path | None = None
    """Dataset directory; not used by members."""
    runs: tuple[str, ...] = ()
    """Evaluated runs of preset pretrained, for members. Patterns such as `runs/*` are expanded."""
    variants: tuple[str, ...] = ()
    """Variants of linear or head; all by default."""
    measurements: Path | None = None
    """Table of `perturbjax features --backbone cellprofiler`, for variants of linear with these
    features."""
    folds: tuple[int, ...] = tuple(range(FOLDS))
    """Outer folds, from 0 to 4."""
    branch: bool = False
    """With head: also train the attention branch on one inner fold of each outer fold."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        valid = bool(self.folds) and all(0 <= fold < FOLDS for fold in self.folds)
        require("folds", self.folds, valid, "one or more numbers from 0 to 4")
        if self.ablation == "members":
            require("runs", self.runs, bool(self.runs), "one or more run directories")
        else:
            require("data", self.data, self.data is not None, "a dataset directory")


class Ablation(Protocol):
    """Interface of the modules in `experiments/ablations/`."""

    #: Variant to compare with.
    REFERENCE: str
    #: Names of the variants that `--variants` chooses from.
    VARIANTS: tuple[str, ...]

    def run(self, options: Config) -> Iterator[dict[str, object]]:
        """Yield `variant`, `fold`, `accuracy`, `balanced_accuracy` and optional numbers."""


def load_ablation(name: str) -> Ablation:
    """Return the module `experiments/ablations/NAME.py`."""
    return importlib.import_module(f"experiments.ablations.{name}")  # type: ignore[return-value]


def main(options: Config) -> None:
    """Evaluate all variants; write and print the tables."""
    ablation = load_ablation(options.ablation)
    check_names("--variants", options.variants, ablation.VARIANTS)
    rows: list[dict[str, object]] = []
    for row in ablation.run(options):
        rows.append(row)
        table = pd.DataFrame(rows)
        text = markdown(summary(table, ablation.REFERENCE)) + "\n"
        write_table(table, text, options.out)
    print((options.out / "scores.md").read_text())


def summary(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Average over folds.

    Args:
        table: one row per variant and fold.
        reference: variant to compare with.

    Returns:
        One row per variant, as text: number of folds, means, and the number of folds on which the
        balanced accuracy exceeds that of the reference (empty without common folds).
    """
    wide = table.pivot(index="fold", columns="variant", values="balanced_accuracy")
    extra = [c for c in table.columns if c not in ("variant", "fold", *_METRICS)]
    rows = []
    for variant, own in table.groupby("variant", sort=False):
        better = ""
        if variant != reference and reference in wide:
            lead = (wide[variant] - wide[reference]).dropna()
            better = str(int((lead > 0).sum())) if len(lead) else ""
        row = {"variant": variant, "folds": POOLED if POOLED in set(own["fold"]) else len(own)}
        row |= {name: _format_mean(own[name], ".0f") for name in extra}
        row |= {heading: _format_mean(own[name], ".3f") for name, heading in _METRICS.items()}
        rows.append({**row, f"folds better than {reference}": better})
    return pd.DataFrame(rows)


#: Columns of scores and their headings.
_METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}


def _format_mean(values: pd.Series, form: str) -> str:
    return "" if values.isna().all() else format(values.mean(), form)


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
