"""How fast is `perturbjax build`, by engine and number of workers, on real images?

    python -m experiments.bench.data_prep [--quick]

Each row is one run of the real command in its own process: small sites (68 x 68 pixels, three channels, from
bbbc021_cells) and large ones (1080 x 1080, three channels, one JUMP field of view counted several times). `segment/s`
and `write/s` are sites a second of the two stages as the command reports them; `build s` is the whole command,
imports and worker start included, and `processor s` what it took of all cores together, which a busy machine does not
lengthen; `peak MB` is the largest of its processes. Needs the data folder named by
PERTURBJAX_SHARED.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.bench.tables import CannotRun, markdown
from perturbjax.core.messages import console

#: (data, engine) → sites to build, in the full and in the quick benchmark.
SITES = {
    ("cells 68 px", "watershed"): (400, 60),
    ("cells 68 px", "cellpose-torch"): (100, 20),
    ("field 1080 px", "watershed"): (8, 3),
    ("field 1080 px", "cellpose-torch"): (2, 2),
}
#: Typical diameter of a nucleus in pixels in each kind of image.
DIAMETER = {"cells 68 px": 45, "field 1080 px": 35}


def run(quick: bool) -> list[dict[str, Any]]:
    """One row per data, engine and number of workers.

    Raises:
        CannotRun: the real data is not there.
    """
    shared = (
        Path(os.environ.get("PERTURBJAX_SHARED", Path(__file__).resolve().parents[3] / "shared"))
        / "data"
    )
    if not shared.is_dir():
        raise CannotRun(
            f"no real data at {shared.parent}: set PERTURBJAX_SHARED to the folder that holds it"
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
    """A load_data.csv of that many sites."""
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
    """Run one build; its row."""
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        "--load-data",
        str(work / "load_data.csv"),
    ]
    command += [
        "--images",
        str(shared),
        "--out",
        str(work / "dataset"),
        "--overwrite",
        "--aggregate",
        "none",
    ]
    command += [
        "--segment-channels",
        "DNA",
        "--diameter",
        str(DIAMETER[data]),
        "--workers",
        str(workers),
    ]
    command += ["--segmenter", engine]
    if engine == "cellpose-torch":
        command += ["--weights", str(shared / "weights" / "nuclei_dsb2018")]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"the build failed: {said}")
    subprocess.run(["rm", "-r", str(work / "dataset")], check=True)
    return {
        "data": data,
        "engine": engine,
        "workers": workers,
        "sites": sites,
        "segment/s": round(sites / _stage(said, "segmenting"), 2),
        "write/s": round(sites / _stage(said, "writing"), 2),
        "build s": round(seconds, 1),
        "processor s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak MB": round(usage.ru_maxrss / 1024),
    }


def _stage(said: str, label: str) -> float:
    """Seconds of a stage, from the line it ends with: `label: n/n sites in 12.3 s` or `… in 1:02`."""
    took = re.search(rf"^{label}: \S+ sites in (?:(\d+):)?([\d.]+)", said, re.MULTILINE)
    return max(60 * float(took[1] or 0) + float(took[2]), 0.1)


def main() -> None:
    print(markdown(run(quick="--quick" in sys.argv[1:])))


if __name__ == "__main__":
    main()
