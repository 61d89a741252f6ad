"""Speed of segmentation compared with the cellpose package with the same weights.

    python -m experiments.bench.segmentation [--quick]

Images: one field of 1080 x 1080 pixels, and 64 single-cell crops of 68 x 68. Engines: the package
    with default settings
and with its fastest ones (channels last, bfloat16 autocast), `Segmenter` in float32 and bfloat16
with the weights `nuclei_dsb2018`, and the included small network. Engines take turns. Columns per
image: `network s` (normalization, tiles, network) and `masks s` (flows to masks) are medians over
turns, `spread` is the range of their sum relative to the median, `x package` the median speedup
over the package with default settings, and `masks x package` that of the masks. `peak MB` is the
memory of a separate process that segments the images once. Needs the data folder in
PERTURBJAX_SHARED."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile

from experiments.bench.tables import CannotRun, Row, markdown

#: Typical diameter of a nucleus in pixels, by kind of image.
DIAMETER = {"field 1080 px": 35.0, "64 cells 68 px": 45.0}
CELLS, BATCH = 64, 32
DEFAULT_PACKAGE = "package"


class Times(NamedTuple):
    """Seconds per image."""

    network: float
    masks: float


Engine = Callable[[], Times]


def run(quick: bool) -> list[Row]:
    """Return one row per kind of image and engine.

    Raises:
        CannotRun: the real data or the cellpose package is missing.
    """
    try:
        import cellpose  # noqa: F401
    except ImportError as error:
        raise CannotRun(
            "the cellpose package is not installed: pip install 'perturbjax[test]'"
        ) from error
    shared = shared_data()
    return [row for kind in DIAMETER for row in _compare(shared, kind, 1 if quick else 3)]


def shared_data() -> Path:
    """The folder of real data.

    Raises:
        CannotRun: it is not there.
    """
    shared = (
        Path(os.environ.get("PERTURBJAX_SHARED", Path(__file__).resolve().parents[3] / "shared"))
        / "data"
    )
    if not shared.is_dir():
        raise CannotRun(
            f"no real data at {shared.parent}: set PERTURBJAX_SHARED to the folder that holds it"
        )
    return shared


def read(shared: Path, kind: str) -> list[np.ndarray]:
    """The images of a kind, one channel each."""
    if kind.startswith("field"):
        return [tifffile.imread(shared / "jump_fov/r01c02f01p01-ch4sk1fk1fl1.tiff")]
    import pandas as pd

    table = pd.read_csv(shared / "bbbc021_cells/load_data.csv", dtype=str, nrows=CELLS)
    files = shared / "bbbc021_cells" / table["PathName_OrigDNA"] / table["FileName_OrigDNA"]
    return [tifffile.imread(file) for file in files]


def _make_engines(shared: Path, kind: str) -> dict[str, Callable[[], Engine]]:
    weights, images, diameter = (
        shared / "weights/nuclei_dsb2018",
        read(shared, kind),
        DIAMETER[kind],
    )
    return {
        DEFAULT_PACKAGE: lambda: _package(weights, images, diameter, best=False),
        "package, channels last, bf16": lambda: _package(weights, images, diameter, best=True),
        "perturbjax float32": lambda: _perturbjax(str(weights), images, diameter, "float32"),
        "perturbjax bf16": lambda: _perturbjax(str(weights), images, diameter, "bfloat16"),
        "perturbjax, shipped network": lambda: _perturbjax(
            "nuclei_small", images, diameter, "float32"
        ),
    }


def _compare(shared: Path, kind: str, rounds: int) -> list[Row]:
    engines = {name: make() for name, make in _make_engines(shared, kind).items()}
    for engine in engines.values():  # compile, and allocate memory
        engine()
    turns = [{name: engine() for name, engine in engines.items()} for _ in range(rounds)]
    count = len(read(shared, kind))
    rows = []
    for name in engines:
        sums = [sum(turn[name]) for turn in turns]
        median = statistics.median(sums)
        ratio = [sum(turn[DEFAULT_PACKAGE]) / sum(turn[name]) for turn in turns]
        masks_ratio = [turn[DEFAULT_PACKAGE].masks / turn[name].masks for turn in turns]
        rows.append(
            {
                "images": kind,
                "engine": name,
                "network s": statistics.median(turn[name].network for turn in turns),
                "masks s": statistics.median(turn[name].masks for turn in turns),
                "images/s": 1 / median,
                "x package": statistics.median(ratio),
                "masks x package": statistics.median(masks_ratio),
                "spread": f"{min(sums) / median:.2f} to {max(sums) / median:.2f}",
                "peak MB": _peak(shared, kind, name, count),
            }
        )
    return rows


def _package(weights: Path, images: list[np.ndarray], diameter: float, *, best: bool) -> Engine:
    import torch
    from cellpose import dynamics, models

    package = models.CellposeModel(gpu=False, pretrained_model=str(weights))
    if best:
        package.net.mkldnn = False
        package.net = package.net.to(memory_format=torch.channels_last)
        # The package converts the output to NumPy, which has no bfloat16.
        package.net.register_forward_hook(
            lambda net, inputs, outputs: tuple(each.float() for each in outputs[:2])
        )
    steps = int(200 / (package.diam_mean / diameter))

    def measure() -> Times:
        half = torch.autocast("cpu", torch.bfloat16) if best else nullcontext()
        start = time.perf_counter()
        maps = []
        for image in images:
            with half:
                _, flows, _ = package.eval(
                    image, channels=[0, 0], diameter=diameter, compute_masks=False, batch_size=BATCH
                )
            maps.append((flows[1], flows[2]))
        between = time.perf_counter()
        for flow, logits in maps:
            dynamics.resize_and_compute_masks(flow, logits, niter=steps)
        end = time.perf_counter()
        return Times((between - start) / len(images), (end - between) / len(images))

    return measure


def _perturbjax(weights: str, images: list[np.ndarray], diameter: float, precision: Any) -> Engine:
    from perturbjax.segmentation import Segmenter

    segmenter = Segmenter(weights, diameter, precision)

    def measure() -> Times:
        """Run the stages one after the other, as in the package; in use they overlap."""
        start = time.perf_counter()
        inputs, maps = [], []
        for batch in segmenter._batches(images):
            inputs += batch
            maps += list(segmenter._timed_maps(batch))[: len(batch)]
        between = time.perf_counter()
        for item, each in zip(inputs, maps, strict=True):
            segmenter._objects(item, each)
        end = time.perf_counter()
        return Times((between - start) / len(images), (end - between) / len(images))

    return measure


def _peak(shared: Path, kind: str, name: str, count: int) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (shared, kind, name))


def _measure_peak(shared: Path, kind: str, name: str) -> int:
    _make_engines(shared, kind)[name]()()
    # Not getrusage: its peak survives exec, so a child would start with that of its parent.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    print(markdown(run(quick="--quick" in sys.argv[1:])))


if __name__ == "__main__":
    main()
