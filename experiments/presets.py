"""Every preset of `train` on every data set, beside the linear baseline, the majority class and position.

    python -m experiments.presets --data bbbc021_cells=DIR simulated=DIR --out runs/presets --page docs/presets.md

trains, judges and writes one row a data set, split, fold, seed and preset, by the public commands, as anyone would type
them; what is done is not done again, so that it may be run in parts (`--folds 0`, `--presets linear`). The page's table
holds the mean over the folds that each preset has been judged on, and says how many; a difference to the linear
baseline is over the folds that both have. A data set is a directory of `python -m data_prep build`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.bench.tables import machine, where
from experiments.runs import (
    METRICS,
    SCORES,
    check_names,
    command,
    scores_of,
    train_and_judge,
    write_table,
)
from perturbjax.cli import parse_options
from perturbjax.core.config import PRESETS
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic
from perturbjax.core.options import require, require_sound

LINEAR = "linear"
NAMES = (LINEAR, *PRESETS)
SPLITS = ("plate", "layout", "well")
#: Between these lines of the page stands the table.
MARKS = ("<!-- presets -->", "<!-- end presets -->")


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...]
    """NAME=DIRECTORY of every data set."""
    out: Path
    """Folder for runs and scores."""
    presets: tuple[str, ...] = NAMES
    """Which presets; linear is that of `classify`."""
    splits: tuple[str, ...] = ("plate", "layout")
    """How sites are dealt: plate, layout or well."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Which of the five folds."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the networks; the split is that of seed 0."""
    flags: str = ""
    """More flags for `perturbjax train`, in one string; they change the runs' numbers."""
    page: Path | None = None
    """Markdown page whose table is rewritten after every row."""

    def __post_init__(self) -> None:
        require_sound(self)
        for one in self.data:
            require("data", one, all(one.partition("=")), "NAME=DIRECTORY")
        require(
            "folds",
            self.folds,
            bool(self.folds) and all(0 <= fold < 5 for fold in self.folds),
            "some of 0 to 4",
        )
        require(
            "seeds",
            self.seeds,
            bool(self.seeds) and min(self.seeds, default=0) >= 0,
            "one or several, 0 or more",
        )


def main(options: Config) -> None:
    """Judge every preset on every data set; write the table after every row."""
    check_names("--presets", options.presets, NAMES)
    check_names("--splits", options.splits, SPLITS)
    if options.page is not None:
        _parts_of(options.page)  # before hours of work
    for data, directory in (one.split("=", 1) for one in options.data):
        for split in options.splits:
            for fold in options.folds:
                manifest = options.out / data / split / f"fold{fold}.parquet"
                _deal(manifest, directory, split, fold)
                for preset in options.presets:
                    for seed in options.seeds if preset != LINEAR else (0,):
                        judged(
                            manifest.with_suffix("") / f"{preset}_seed{seed}",
                            directory,
                            manifest,
                            preset,
                            options,
                        )
                        table = gather(options.out)
                        write_table(table, as_markdown(table), options.out)
                        if options.page is not None:
                            write_page(options.page, table)
    print((options.out / "scores.md").read_text())


def _deal(manifest: Path, directory: str, split: str, fold: int) -> None:
    if not manifest.exists():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        flags = ("--policy", split, "--folds", 5, "--fold", fold)
        command("perturbjax.cli", "split", "--data", directory, "--out", manifest, *flags)


def judged(run: Path, directory: str, manifest: Path, preset: str, options: Config) -> None:
    """Train and judge one run, unless it was judged before."""
    if _scores_file(run) is not None:
        return
    flags = ("--data", directory, "--split-file", manifest)
    if preset == LINEAR:
        command("perturbjax.cli", "classify", "--preset", LINEAR, *flags, "--out", run)
    else:
        seed = run.name.rpartition("seed")[2]
        train_and_judge(run, "--preset", preset, *flags, "--seed", seed, *options.flags.split())


def _scores_file(run: Path) -> Path | None:
    return next(
        (file for file in (run / SCORES, *run.glob("evaluation/*/scores.json")) if file.is_file()),
        None,
    )


def gather(out: Path) -> pd.DataFrame:
    """One row a judged run that lies in `out`, of this call and of earlier ones."""
    rows = []
    for run in sorted(out.glob("*/*/fold*/*_seed*")):
        if (file := _scores_file(run)) is None:
            continue
        preset, _, seed = run.name.rpartition("_seed")
        place = {
            "data": run.parts[-4],
            "split": run.parts[-3],
            "fold": int(run.parts[-2].removeprefix("fold")),
        }
        rows.append(
            {
                **place,
                "preset": preset,
                "seed": int(seed),
                **scores_of(file),
                "minutes": _minutes(run),
            }
        )
    return pd.DataFrame(rows)


def _minutes(run: Path) -> float:
    """What training, or fitting, took."""
    if (run / "table.csv").is_file():
        return float(pd.read_csv(run / "table.csv")["seconds"].dropna().sum()) / 60
    rows = pd.read_json(run / "metrics.jsonl", lines=True)
    return float(rows.loc[rows["split"] == "train", "seconds"].sum()) / 60


def summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a data set, split and preset: means over folds and seeds, baselines first."""
    rows = []
    for (data, split), part in table.groupby(["data", "split"], sort=False):
        base = part[part["preset"] == LINEAR].set_index("fold")
        first = part.drop_duplicates("fold")
        for name in ("majority", "position"):
            means = {metric: first[f"{name}_{metric}"].mean() for metric in METRICS[:2]}
            rows.append(
                {"data": data, "split": split, "recipe": name, "folds": len(first), **means}
            )
        for preset in sorted(part["preset"].unique(), key=NAMES.index):
            own = part[part["preset"] == preset]
            means = {metric: own[metric].mean() for metric in METRICS}
            shared = own[own["fold"].isin(base.index)]
            lead = shared["balanced_accuracy"] - shared["fold"].map(base["balanced_accuracy"])
            rows.append(
                {
                    "data": data,
                    "split": split,
                    "recipe": preset,
                    "folds": own["fold"].nunique(),
                    **means,
                }
                | {
                    "seeds": own["seed"].nunique(),
                    "lead": None if preset == LINEAR or lead.empty else lead.mean(),
                }
                | {
                    "worst": None if preset == LINEAR or lead.empty else lead.min(),
                    "minutes": own["minutes"].mean(),
                }
            )
    return rows


def as_markdown(table: pd.DataFrame) -> str:
    """The summary as a Markdown table."""
    heads = (
        "data",
        "split",
        "recipe",
        "folds",
        "seeds",
        "accuracy",
        "balanced accuracy",
        "macro-F1",
    )
    heads += ("balanced, over linear", "least of the folds", "minutes a fold")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in summary(table):
        numbers = [_number(row.get(metric), ".3f") for metric in METRICS]
        leads = [_number(row.get(name), "+.3f") for name in ("lead", "worst")]
        place = (row["data"], row["split"], row["recipe"], row["folds"], row.get("seeds", ""))
        lines.append(
            "| "
            + " | ".join([*map(str, place), *numbers, *leads, _number(row.get("minutes"), ".1f")])
            + " |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


def write_page(page: Path, table: pd.DataFrame) -> None:
    """Put the table between the page's marks, with the machine it was measured on."""
    before, after = _parts_of(page)
    with atomic(page) as temporary:
        temporary.write_text(
            f"{before}{MARKS[0]}\n{as_markdown(table)}\n{where(machine())}.\n{MARKS[1]}{after}"
        )


def _parts_of(page: Path) -> tuple[str, str]:
    """What stands before and after the table.

    Raises:
        InputError: the page is missing or has no place for a table.
    """
    text = page.read_text() if page.is_file() else ""
    found = re.fullmatch(rf"(.*){MARKS[0]}.*{MARKS[1]}(.*)", text, re.DOTALL)
    if found is None:
        raise InputError(
            f"--page {page}: has no lines {MARKS[0]} and {MARKS[1]}; write them where the table is to be"
        )
    return found[1], found[2]


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
