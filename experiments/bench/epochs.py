"""What does an epoch on a whole plate cost, resident in memory and streamed from disk?

    python -m experiments.bench --only epochs --out runs/bench

One epoch of `perturbjax train` on the plate that `plates` built, the real command in a process of its own: crops of
128² from fields of 1080² with three channels, `attention`, batches of 64, and once the judging of the sites that were
held out. `train s` is what the command reports of the epoch, `command s` all of it: start, compilation, for a resident
feed the reading of the plate, and the checkpoint. `main MB` is the peak of the process, which computes on the CPU;
`own MB` leaves out the shards that it has mapped, which are the page cache's.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.bench.commands import measured, seconds_of
from experiments.bench.plates import dataset_of, place
from experiments.bench.tables import CannotRun, Row, markdown
from perturbjax.core.messages import console
from perturbjax.dataset import open_dataset


def run(quick: bool, folder: Path | None = None) -> Iterator[list[Row]]:
    """One row a feed.

    Raises:
        CannotRun: there is no such dataset.
    """
    folder = folder or place(quick)
    data, out = dataset_of(folder, "plate"), folder / "run"
    if not data.is_dir():
        raise CannotRun(f"no dataset at {data}: run the benchmark plates first")
    rows: list[Row] = []
    for feed in ("resident", "streamed"):
        shutil.rmtree(out, ignore_errors=True)
        words = [
            "train",
            "--data",
            data,
            "--out",
            out,
            "--epochs",
            1,
            "--feed",
            feed,
            "--split",
            "well",
        ]
        words += ["--folds", 4, "--batch-size", 64, "--crop", 32 if quick else 128]
        found = measured(words, folder / "train.log")
        row = {
            "feed": feed,
            "sites": len(open_dataset(data)),
            "train s": seconds_of(found["said"], "train"),
        }
        row |= {
            "command s": found["s"],
            **{name: found[name] for name in ("processor s", "main MB", "own MB")},
        }
        rows = [*rows, row]
        console.print(", ".join(f"{name} {value}" for name, value in row.items()))
        yield rows
    shutil.rmtree(out)


def main() -> None:
    *_, rows = run(quick="--quick" in sys.argv[1:])
    print(markdown(rows))


if __name__ == "__main__":
    main()
