"""Speed of `perturbjax build` on real images, by segmentation engine and number of workers.

    python -m experiments.bench --only data_prep --out runs/bench [--quick]

Each row is one run of the command in a separate process, on small sites (68 x 68 pixels, three
channels, from bbbc021_cells) or on large ones (1080 x 1080, three channels, copies of one JUMP
field). `segment/s` and `write/s` are sites per second of the two stages. `build s` is the whole
command, including imports and start of the workers; `processor s` its CPU time on all cores, which
other jobs hardly affect; `peak MB` the memory of its largest process. Needs the data folder named
by PERTURBJAX_SHARED.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.bench.commands import run_measured, stage_seconds
from experiments.bench.tables import CannotRun
from perturbjax.core.messages import console

#: (data, engine) -> number of sites in the full and in the quick benchmark.
SITES = {
    ("cells 68 px", "watershed"): (400, 60),
    ("cells 68 px", "cellpose-torch"): (100, 20),
    ("field 1080 px", "watershed"): (8, 3),
    ("field 1080 px", "cellpose-torch"): (2, 2),
}
#: Diameter of a typical nucleus in pixels.
DIAMETER = {"cells 68 px": 45, "field 1080 px": 35}


def run(quick: bool) -> list[dict[str, Any]]:
    """Build every dataset with every engine and number of workers.

    Raises:
        CannotRun: the data does not exist.
    """
    shared = (
        Path(os.environ.get("PERTURBJAX_SHARED", Path(__file__).resolve().parents[3] / "shared"))
        / "data"
    )
    if not shared.is_dir():
        raise CannotRun(
            f"no data in {shared}: set PERTURBJAX_SHARED to the folder that contains data/"
        )
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for (data, engine), (full, short) in SITES.items():
            table = _table(shared, data, short if quick else full)
            table.to_csv(work / "load_data.csv", index=False)
            for workers in (1,) if quick else (1, 2):
                rows.append(_build(work, shared, data, engine, workers, len(table)))
                console.print(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    return rows


def _table(shared: Path, data: str, sites: int) -> pd.DataFrame:
    """Make a load_data.csv with the given number of sites."""
    if data.startswith("cells"):
        table = pd.read_csv(shared / "bbbc021_cells" / "load_data.csv", dtype=str, nrows=sites)
        paths = [column for column in table.columns if column.startswith("PathName")]
        return table.assign(**{column: "bbbc021_cells/" + table[column] for column in paths})
    table = pd.DataFrame({"Metadata_Site": range(1, sites + 1)})
    table = table.assign(Metadata_Plate="field", Metadata_Well="A01", Metadata_pert_iname="DMSO")
    for channel, number in {"DNA": 4, "Actin": 5, "Other": 1}.items():
        table[f"FileName_Orig{channel}"] = f"r01c02f01p01-ch{number}sk1fk1fl1.tiff"
        table[f"PathName_Orig{channel}"] = "jump_fov"
    return table


def _build(
    work: Path, shared: Path, data: str, engine: str, workers: int, sites: int
) -> dict[str, Any]:
    """Run one build and return its row."""
    words: list[Any] = ["build", "--load-data", work / "load_data.csv", "--images", shared]
    words += ["--out", work / "dataset", "--overwrite", "--aggregate", "none"]
    words += ["--segment-channels", "DNA", "--diameter", DIAMETER[data]]
    words += ["--workers", workers, "--segmenter", engine]
    if engine == "cellpose-torch":
        words += ["--weights", shared / "weights" / "nuclei_dsb2018"]
    result = run_measured(words, work / "build.log")
    shutil.rmtree(work / "dataset")
    seconds = {
        stage: max(stage_seconds(result["log"], stage), 0.1) for stage in ("Segmenting", "Writing")
    }
    return {
        "data": data,
        "engine": engine,
        "workers": workers,
        "sites": sites,
        "segment/s": round(sites / seconds["Segmenting"], 2),
        "write/s": round(sites / seconds["Writing"], 2),
        "build s": result["s"],
        "processor s": result["processor s"],
        "peak MB": max(result["main MB"], result["worker MB"]),
    }
