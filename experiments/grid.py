"""Train and evaluate a grid of recipes on datasets, splits, folds and seeds.

    python -m experiments.grid --grid presets --data bbbc021_cells=DIR --out runs/presets

Every run is one `perturbjax train` (or `classify`) and one `perturbjax evaluate`. Finished runs are
skipped, so that a grid can be computed in parts (`--folds 0`, `--recipes linear`) and continued
after an interruption. `scores.csv` has one row per run; `scores.md`, and with `--page` a
documentation page, has the means. The grids are in `experiments/grids/`, each with its cost and
result.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.bench.tables import describe_machine, machine
from experiments.runs import (
    METRICS,
    SCORES,
    check_names,
    command,
    scores_of,
    train_and_evaluate,
    write_table,
)
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic
from perturbjax.core.options import require, require_sound
from perturbjax.dataset import open_dataset
from perturbjax.profiles.profile_options import CLASSIFY_PRESETS

GRIDS = ("presets", "corrections", "two_phase", "bbbc021_cells")
#: Baseline of every grid. Recipes named as a preset of `perturbjax classify` run this command
#: instead of a training.
LINEAR = "linear"
#: Lines of a page between which the table is written.
MARKS = ("<!-- presets -->", "<!-- end presets -->")
FOLDS = 5


@dataclass(frozen=True)
class Training:
    """Training of one recipe.

    Attributes:
        flags: of `perturbjax train`.
        changes: fields of the recipe without a flag, {section: {field: value}}.
        shrinks_above: height and width in pixels above which the recipe shrinks sites. Smaller
            sites would give the same result as another recipe, so the recipe is left out.
    """

    flags: tuple[str, ...] = ()
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shrinks_above: int = 0


@dataclass(frozen=True)
class Grid:
    """Defaults of one experiment.

    Attributes:
        recipes: name -> training; presets of `classify` need none.
        splits: split policies.
        folds: of five, or of one per plate for split `plate` of fewer plates.
        seeds: of the networks; the split is that of seed 0.
        flags: of every training.
    """

    recipes: Mapping[str, Training]
    splits: tuple[str, ...] = ("plate",)
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seeds: tuple[int, ...] = (0,)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """Options of the grid runner; empty ones take the defaults of the grid."""

    grid: str
    """Name of the grid: presets, corrections, two_phase or bbbc021_cells."""
    data: tuple[str, ...]
    """NAME=DIRECTORY of every dataset."""
    out: Path
    """Folder for runs and scores."""
    recipes: tuple[str, ...] = ()
    """Recipes of the grid."""
    splits: tuple[str, ...] = ()
    """Split policies: plate, layout or well; auto: plate, or well for a single plate."""
    folds: tuple[int, ...] = ()
    """Folds, from 0 to 4; by default all."""
    seeds: tuple[int, ...] = ()
    """Seeds of the networks."""
    flags: str = ""
    """Additional flags of `perturbjax train` in one string."""
    page: Path | None = None
    """Markdown page; its table is rewritten after every run."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("grid", self.grid, self.grid in GRIDS, f"one of {', '.join(GRIDS)}")
        for one in self.data:
            require("data", one, all(one.partition("=")), "NAME=DIRECTORY")
        require("folds", self.folds, all(0 <= f < FOLDS for f in self.folds), "from 0 to 4")
        require("seeds", self.seeds, min(self.seeds, default=0) >= 0, "0 or more")


def load_grid(name: str) -> Grid:
    """Return the grid of `experiments/grids/NAME.py`."""
    return importlib.import_module(f"experiments.grids.{name}").GRID


def main(options: Config) -> None:
    """Train and evaluate every recipe; write the tables after every run."""
    grid = load_grid(options.grid)
    recipes = options.recipes or tuple(grid.recipes)
    check_names("--recipes", recipes, grid.recipes)
    check_names("--splits", options.splits, ("plate", "layout", "well", "auto"))
    if options.page is not None:
        _split_page(options.page)  # fail before hours of work
    for data, directory in (one.split("=", 1) for one in options.data):
        index = open_dataset(directory).index
        plates = index["Metadata_Plate"].nunique()
        pixels = index[["height", "width"]].max(axis=None)
        selected = [recipe for recipe in recipes if pixels > grid.recipes[recipe].shrinks_above]
        for name in options.splits or grid.splits:
            split = name if name != "auto" else "plate" if plates > 1 else "well"
            folds = min(FOLDS, plates) if split == "plate" else FOLDS
            for fold in options.folds or [fold for fold in grid.folds if fold < folds]:
                manifest = options.out / data / split / f"fold{fold}.parquet"
                _write_split(manifest, directory, split, folds, fold)
                for recipe in selected:
                    for seed in (0,) if is_classifier(recipe) else options.seeds or grid.seeds:
                        run = manifest.with_suffix("") / f"{_slug(recipe)}_seed{seed}"
                        flags = ("--data", directory, "--split-file", str(manifest))
                        more = (*grid.flags, *options.flags.split(), "--seed", str(seed))
                        evaluate_run(run, grid.recipes[recipe], flags, more)
                        _write_tables(options, tuple(grid.recipes))
    print((options.out / "scores.md").read_text())


def _slug(recipe: str) -> str:
    return recipe.replace(", ", "-").replace(" ", "-")


def is_classifier(recipe: str) -> bool:
    """Whether a recipe is a preset of `perturbjax classify`."""
    return _slug(recipe) in CLASSIFY_PRESETS


def _write_split(manifest: Path, directory: str, split: str, folds: int, fold: int) -> None:
    if not manifest.exists():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        flags = ("--split", split, "--folds", folds, "--fold", fold)
        command("perturbjax.cli", "split", "--data", directory, "--out", manifest, *flags)


def evaluate_run(
    run: Path, training: Training, flags: tuple[str, ...], training_flags: tuple[str, ...]
) -> None:
    """Train and evaluate one run unless its scores exist.

    Args:
        run: directory of the run; its name begins with the recipe.
        training: flags and changes of the recipe.
        flags: dataset and split.
        training_flags: further flags of `perturbjax train`.
    """
    if find_scores(run) is not None:
        return
    name = run.name.rpartition("_seed")[0]
    if is_classifier(name):
        command("perturbjax.cli", "classify", "--preset", name, *flags, "--out", run)
        return
    recipe: tuple[str, ...] = ()
    if training.changes:
        file = run.with_suffix(".json")
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(training.changes))
        recipe = ("--recipe", str(file))
    train_and_evaluate(run, *training.flags, *recipe, *flags, *training_flags)


def find_scores(run: Path) -> Path | None:
    """Return the `scores.json` of a run or of the only classifier of `classify`, if it exists."""
    files = (run / SCORES, *run.glob("evaluation/*/scores.json"))
    return next((file for file in files if file.is_file()), None)


def gather(out: Path) -> pd.DataFrame:
    """Read the scores of all runs below a folder, one row per run."""
    rows = []
    for run in sorted(out.glob("*/*/fold*/*_seed*")):
        scores = find_scores(run)
        if scores is None:
            continue
        recipe, _, seed = run.name.rpartition("_seed")
        rows.append(
            {
                "data": run.parts[-4],
                "split": run.parts[-3],
                "fold": int(run.parts[-2].removeprefix("fold")),
                "recipe": recipe,
                "seed": int(seed),
                **scores_of(scores),
                "minutes": _minutes(run),
            }
        )
    return pd.DataFrame(rows)


def _minutes(run: Path) -> float:
    """Minutes of training, or of fitting the classifier."""
    if (run / "table.csv").is_file():
        return float(pd.read_csv(run / "table.csv")["seconds"].dropna().sum()) / 60
    rows = pd.read_json(run / "metrics.jsonl", lines=True)
    return float(rows.loc[rows["split"] == "train", "seconds"].sum()) / 60


def summary(table: pd.DataFrame, recipes: tuple[str, ...] = ()) -> pd.DataFrame:
    """Average over folds and seeds.

    Args:
        table: from `gather`.
        recipes: their order; further ones follow by name.

    Returns:
        One row per dataset, split and recipe, baselines first. `lowest` and `highest`: balanced
        accuracy of the worst and of the best fold. `lead` and `min_lead`: mean and minimum of the
        balanced accuracy minus that of `linear` on the same fold. `spread`: largest distance of a
        run's balanced accuracy from the mean of its fold.
    """
    order = [_slug(name) for name in recipes]
    rows: list[dict[str, Any]] = []
    for (data, split), part in table.groupby(["data", "split"], sort=False):
        place = {"data": data, "split": split}
        linear = part[part["recipe"] == LINEAR].set_index("fold")["balanced_accuracy"]
        one_per_fold = part.drop_duplicates("fold")
        for name in ("majority", "position"):
            means = {metric: one_per_fold[f"{name}_{metric}"].mean() for metric in METRICS[:2]}
            rows.append({**place, "recipe": name, "folds": len(one_per_fold), **means})
        names = sorted(part["recipe"].unique(), key=lambda n: [*order, n].index(n))
        for name in names:
            own = part[part["recipe"] == name]
            score = own["balanced_accuracy"]
            of_folds, repeated = score.groupby(own["fold"]).mean(), own["seed"].nunique() > 1
            lead = (score - own["fold"].map(linear)).dropna() if name != LINEAR else score[:0]
            rows.append(
                {
                    **place,
                    "recipe": name,
                    "folds": own["fold"].nunique(),
                    "seeds": own["seed"].nunique(),
                    **{metric: own[metric].mean() for metric in METRICS},
                    "lowest": of_folds.min(),
                    "highest": of_folds.max(),
                    "spread": (score - own["fold"].map(of_folds)).abs().max() if repeated else None,
                    "lead": lead.mean(),
                    "min_lead": lead.min(),
                    "minutes": own["minutes"].mean(),
                }
            )
    return pd.DataFrame(rows)


#: Columns of the Markdown table: name in `summary`, heading, format.
_COLUMNS = (
    ("data", "data", ""),
    ("split", "split", ""),
    ("recipe", "recipe", ""),
    ("folds", "folds", ".0f"),
    ("seeds", "seeds", ".0f"),
    ("accuracy", "accuracy", ".3f"),
    ("balanced_accuracy", "balanced accuracy", ".3f"),
    ("lowest", "lowest fold", ".3f"),
    ("highest", "highest fold", ".3f"),
    ("macro_f1", "macro-F1", ".3f"),
    ("spread", "spread between seeds", ".3f"),
    ("lead", "lead over linear", "+.3f"),
    ("min_lead", "minimum lead", "+.3f"),
    ("minutes", "minutes per fold", ".1f"),
)


def as_markdown(table: pd.DataFrame, recipes: tuple[str, ...] = ()) -> str:
    """Format the summary as a Markdown table, without empty columns."""
    rows = summary(table, recipes)
    columns = [each for each in _COLUMNS if each[0] in rows and rows[each[0]].notna().any()]
    lines = [
        "| " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for _, row in rows.iterrows():
        cells = ("" if pd.isna(row[name]) else format(row[name], form) for name, _, form in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write_tables(options: Config, recipes: tuple[str, ...]) -> None:
    table = gather(options.out)
    write_table(table, as_markdown(table, recipes), options.out)
    if options.page is not None:
        write_page(options.page, table, recipes)


def write_page(page: Path, table: pd.DataFrame, recipes: tuple[str, ...] = ()) -> None:
    """Replace the table between the marks of a page, with the machine it was measured on."""
    before, after = _split_page(page)
    text = f"{MARKS[0]}\n{as_markdown(table, recipes)}\n{describe_machine(machine())}.\n{MARKS[1]}"
    with atomic(page) as temporary:
        temporary.write_text(f"{before}{text}{after}")


def _split_page(page: Path) -> tuple[str, str]:
    """Text before and after the table of a page.

    Raises:
        InputError: the page does not exist or has no marks.
    """
    text = page.read_text() if page.is_file() else ""
    match = re.fullmatch(rf"(.*){MARKS[0]}.*{MARKS[1]}(.*)", text, re.DOTALL)
    if match is None:
        raise InputError(
            f"--page {page}: has no lines {MARKS[0]} and {MARKS[1]}; add them around the table"
        )
    return match[1], match[2]


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
