"""What each part of the linear baseline is worth, told by folds of the training plates alone.

    python -m experiments.inner_folds --data DIR --out runs/inner

For every one of the five outer folds of plates, the plates that train are dealt to three inner folds; each variant is
fitted on two of them and judged on the third. The outer folds' judging plates are never looked at: what is chosen here
is judged once, by `experiments.presets`. `scores.md` has a row a variant: the means over the inner folds, and on how
many of them it is better than the preset as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from experiments.runs import write_table
from perturbjax.cli import parse_options
from perturbjax.core.config import LINEAR_VARIANCE
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_sound
from perturbjax.core.progress import track
from perturbjax.data import splits
from perturbjax.profiles.classifiers import CLASSIFIERS
from perturbjax.profiles.control_relative import GROUP
from perturbjax.profiles.preparation import preparation
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import (
    CLASSIFY_PRESETS,
    Preparation,
    ProfileConfig,
    SourceConfig,
)
from perturbjax.profiles.profile_table import STATISTIC
from perturbjax.profiles.table_steps import as_table


@dataclass(frozen=True)
class Variant:
    """What is changed of the preset: fields of the preparation, and of where features come from."""

    preparation: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    statistics: bool = True


PRESET = "as it is"
VARIANTS = {
    PRESET: Variant(),
    "the last layer, 224×224 pixels": Variant(source={"pool": "last", "augmentations": 1}),
    "one view of a site": Variant(source={"augmentations": 1}),
    "eight views": Variant(source={"augmentations": 8}),
    "stages at 224×224 pixels": Variant(source={"size": 224, "augmentations": 1}),
    "relative to the plate's mean": Variant({"relative": "plate"}),
    "not relative": Variant({"relative": "none"}),
    "without statistics": Variant(statistics=False),
    "features alone": Variant({"relative": "none"}, statistics=False),
    "components as large as they come": Variant({"pca_variance": 0.0}),
    "a quarter of the variance": Variant({"pca_variance": LINEAR_VARIANCE / 4}),
    "four times the variance": Variant({"pca_variance": LINEAR_VARIANCE * 4}),
}
INNER = 3
#: Steps in which variants differ.
AFTER = ("balance", "relative", "features")


@dataclass(frozen=True)
class Config:
    data: Path
    """Dataset directory."""
    out: Path
    """Folder for the scores."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of which outer folds the training plates are taken."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants."""

    def __post_init__(self) -> None:
        require_sound(self)
        require(
            "folds",
            self.folds,
            bool(self.folds) and all(0 <= fold < 5 for fold in self.folds),
            "some of 0 to 4",
        )
        require(
            "variants",
            self.variants,
            set(self.variants) <= set(VARIANTS),
            f"some of {', '.join(VARIANTS)}",
        )


def main(options: Config) -> None:
    """Judge every variant on every inner fold; write and print the table."""
    preset: Preparation = CLASSIFY_PRESETS["linear"]["preparation"]
    by_source: dict[str, list[str]] = {}  # variants that see the same features
    for name in options.variants:
        by_source.setdefault(str(VARIANTS[name].source), []).append(name)
    rows = []
    for names in by_source.values():
        for part, name, right in _judged(options, preset, names):
            rows.append({"variant": name, "part": part, **right})
            found = pd.DataFrame(rows)
            write_table(found, as_markdown(found), options.out)
    print((options.out / "scores.md").read_text())


def _judged(
    options: Config, preset: Preparation, names: list[str]
) -> Iterator[tuple[int, str, dict[str, float]]]:
    """(number of the inner fold, variant, its scores) of variants that see the same features."""
    given = CLASSIFY_PRESETS["linear"]["source"] | VARIANTS[names[0]].source
    profiles, negcon, column = load_profiles(
        ProfileConfig(source=SourceConfig(data=(options.data,), **given))
    )
    table, labels = as_table(profiles, negcon), pd.factorize(profiles.column(column), sort=True)[0]
    parts = [
        part for fold in options.folds for part in inner_parts(profiles.metadata, column, fold)
    ]
    for number, (fit, held, groups) in enumerate(
        track(parts, total=len(parts), label="inner folds", unit="folds")
    ):
        shared = Pipeline(
            steps_of(preset, first=True)
        )  # what is the same in all variants is fitted once
        inside = shared.fit_transform(table.iloc[fit].assign(**{GROUP: groups}))
        outside = shared.transform(table.iloc[held].assign(**{GROUP: ""}))
        for name in names:
            variant = VARIANTS[name]
            x, z = (
                part if variant.statistics else without_statistics(part)
                for part in (inside, outside)
            )
            steps = Pipeline(
                steps_of(dataclasses.replace(preset, **variant.preparation), first=False)
            )
            x = steps.fit_transform(x, labels[fit])
            model = CLASSIFIERS["logistic_balanced"].make(len(fit), len(np.unique(labels[fit])), 0)
            said = model.fit(x, labels[fit]).predict(steps.transform(z))
            yield number, name, scores(labels[held], said)


def steps_of(config: Preparation, *, first: bool) -> list[tuple[str, BaseEstimator]]:
    """The steps of a preparation up to the components, or those after them."""
    return [(name, step) for name, step in preparation(config).steps if (name in AFTER) != first]


def without_statistics(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the index's statistics."""
    return table[[name for name in table.columns if not name.startswith(STATISTIC)]]


def inner_parts(
    metadata: pd.DataFrame, label: str, fold: int
) -> Iterator[tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"], np.ndarray]]:
    """(rows that fit, rows that judge, plates of those that fit) of the inner folds of an outer fold."""
    outer = splits.make_split(metadata, "plate", label=label, folds=5, fold=fold, seed=0)
    train = np.flatnonzero(outer["part"] == splits.TRAIN)
    for inner in range(INNER):
        dealt = splits.make_split(
            metadata.iloc[train], "plate", label=label, folds=INNER, fold=inner, seed=1
        )
        judges = (dealt["part"] == splits.TEST).to_numpy()
        yield train[~judges], train[judges], dealt["group"].to_numpy()[~judges]


def scores(truth: Int[np.ndarray, " n"], said: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Accuracy, and balanced accuracy over the classes that are there."""
    right = truth == said
    return {
        "accuracy": right.mean(),
        "balanced_accuracy": pd.Series(right).groupby(truth).mean().mean(),
    }


def as_markdown(found: pd.DataFrame) -> str:
    """A row a variant."""
    heads = ("variant", "inner folds", "accuracy", "balanced accuracy", "better than the preset on")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    wide = found.pivot(index="part", columns="variant", values="balanced_accuracy")
    for name, rows in found.groupby("variant", sort=False):
        better = (
            ""
            if name == PRESET or PRESET not in wide
            else str(int((wide[name] > wide[PRESET]).sum()))
        )
        means = (f"{rows[metric].mean():.3f}" for metric in ("accuracy", "balanced_accuracy"))
        lines.append("| " + " | ".join([str(name), str(len(rows)), *means, better]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
