"""How fast are masks made, beside the cellpose package with the same weights?

    python -m experiments.bench.segmentation [--quick]

One real field of 1080 × 1080 pixels, and 64 cells of 68 × 68, with the weights `nuclei_dsb2018` (the published widths):
the package as it comes, and at its best (channels last, bfloat16 autocast), beside `Segmenter` in float32 and bfloat16,
and the small network that comes with perturbjax. Ways take turns; `network s` (normalising, tiles and network) and
`masks s` (dynamics to masks) are medians of an image, `spread` the least and greatest of their sum over it, `x package`
the median over turns of the package's time as it comes over a way's, and `masks x package` that of the masks alone.
`peak MB` is of a process of its own that segments the same images once. Needs the data folder named by
PERTURBJAX_SHARED.
"""

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

#: Pixels: the typical nucleus of each kind of image.
DIAMETER = {"field 1080 px": 35.0, "64 cells 68 px": 45.0}
CELLS, BATCH = 64, 32
AS_IT_COMES = "package"


class Took(NamedTuple):
    """Seconds an image."""

    network: float
    masks: float


Way = Callable[[], Took]


def run(quick: bool) -> list[Row]:
    """One row per kind of image and way.

    Raises:
        CannotRun: the real data or the cellpose package is not there.
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


def _ways(shared: Path, kind: str) -> dict[str, Callable[[], Way]]:
    weights, images, diameter = (
        shared / "weights/nuclei_dsb2018",
        read(shared, kind),
        DIAMETER[kind],
    )
    return {
        AS_IT_COMES: lambda: _package(weights, images, diameter, best=False),
        "package, channels last, bf16": lambda: _package(weights, images, diameter, best=True),
        "perturbjax float32": lambda: _ours(str(weights), images, diameter, "float32"),
        "perturbjax bf16": lambda: _ours(str(weights), images, diameter, "bfloat16"),
        "perturbjax, shipped network": lambda: _ours("nuclei_small", images, diameter, "float32"),
    }


def _compare(shared: Path, kind: str, rounds: int) -> list[Row]:
    ways = {name: make() for name, make in _ways(shared, kind).items()}
    for way in ways.values():  # compiled, and memory fetched
        way()
    turns = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    count = len(read(shared, kind))
    rows = []
    for name in ways:
        sums = [sum(turn[name]) for turn in turns]
        middle = statistics.median(sums)
        ratio = [sum(turn[AS_IT_COMES]) / sum(turn[name]) for turn in turns]
        of_masks = [turn[AS_IT_COMES].masks / turn[name].masks for turn in turns]
        rows.append(
            {
                "images": kind,
                "way": name,
                "network s": statistics.median(turn[name].network for turn in turns),
                "masks s": statistics.median(turn[name].masks for turn in turns),
                "images/s": 1 / middle,
                "x package": statistics.median(ratio),
                "masks x package": statistics.median(of_masks),
                "spread": f"{min(sums) / middle:.2f} to {max(sums) / middle:.2f}",
                "peak MB": _peak(shared, kind, name, count),
            }
        )
    return rows


def _package(weights: Path, images: list[np.ndarray], diameter: float, *, best: bool) -> Way:
    import torch
    from cellpose import dynamics, models

    package = models.CellposeModel(gpu=False, pretrained_model=str(weights))
    if best:
        package.net.mkldnn = False
        package.net = package.net.to(memory_format=torch.channels_last)
        # The package hands the network's output to NumPy, which has no bfloat16.
        package.net.register_forward_hook(
            lambda net, inputs, outputs: tuple(each.float() for each in outputs[:2])
        )
    steps = int(200 / (package.diam_mean / diameter))

    def took() -> Took:
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
        return Took((between - start) / len(images), (end - between) / len(images))

    return took


def _ours(weights: str, images: list[np.ndarray], diameter: float, precision: Any) -> Way:
    from perturbjax.segmentation import Segmenter

    segmenter = Segmenter(weights, diameter, precision)

    def took() -> Took:
        """The stages overlap in use; here the one waits for the other, as in the package."""
        start = time.perf_counter()
        shaped = [segmenter._with_channels(image) for image in images]
        maps = [
            each for batch in segmenter._batches(shaped) for each in segmenter._timed_maps(batch)
        ]
        between = time.perf_counter()
        for image, each in zip(images, maps, strict=True):
            segmenter._objects(each, (image.shape[0], image.shape[1]))
        end = time.perf_counter()
        return Took((between - start) / len(images), (end - between) / len(images))

    return took


def _peak(shared: Path, kind: str, name: str, count: int) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (shared, kind, name))


def _measure_peak(shared: Path, kind: str, name: str) -> int:
    _ways(shared, kind)[name]()()
    # Not getrusage: its peak survives exec, so that a child starts with its parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    print(markdown(run(quick="--quick" in sys.argv[1:])))


if __name__ == "__main__":
    main()
