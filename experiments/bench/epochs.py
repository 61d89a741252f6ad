"""Time and memory of one epoch on a whole plate, resident in memory or streamed from disk.

    python -m experiments.bench --only epochs --out runs/bench

One epoch of `perturbjax train` in a separate process, on the plate that benchmark `plates` built:
crops of 128 pixels from fields of 1080 pixels with three channels, `attention`, batches of 64, one
evaluation. `train s` is the duration of the epoch, `command s` that of the command, including
start, compilation, loading of a resident dataset and the checkpoint. `main MB` is the peak of the
process on the CPU; `private MB` excludes mapped shards, which belong to the page cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.bench.commands import run_measured, stage_seconds
from experiments.bench.plates import dataset_path, work_folder
from experiments.bench.tables import CannotRun, Row
from perturbjax.core.messages import console
from perturbjax.dataset import open_dataset


def run(quick: bool, folder: Path | None = None) -> Iterator[list[Row]]:
    """Train one epoch with each batch pipeline.

    Raises:
        CannotRun: the dataset does not exist.
    """
    folder = folder or work_folder(quick)
    data, out = dataset_path(folder, "plate"), folder / "run"
    if not data.is_dir():
        raise CannotRun(f"no dataset {data}: run the benchmark plates first")
    rows: list[Row] = []
    for feed in ("resident", "streamed"):
        shutil.rmtree(out, ignore_errors=True)
        words = ["train", "--data", data, "--out", out, "--epochs", 1, "--feed", feed]
        words += ["--preset", "paper"]
        words += ["--split", "well", "--folds", 4]
        words += ["--batch-size", 64, "--crop", 32 if quick else 128]
        result = run_measured(words, folder / "train.log")
        row = {
            "pipeline": feed,
            "sites": len(open_dataset(data)),
            "train s": stage_seconds(result["log"], "Training"),
            "command s": result["s"],
            **{name: result[name] for name in ("processor s", "main MB", "private MB")},
        }
        rows = [*rows, row]
        console.print(", ".join(f"{name} {value}" for name, value in row.items()))
        yield rows
    shutil.rmtree(out)
