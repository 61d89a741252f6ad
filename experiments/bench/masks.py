"""Accuracy of the masks of each engine, on real nuclei that none of them was trained on.

    python -m experiments.bench.masks [--quick]

Data: the 40 images of `dsb2018_nuclei/test` (2,146 nuclei). Columns: average precision TP / (TP +
    FP + FN) at IoU 0.5,
0.75 and 0.9, averaged over images; `AP 0.9 of package` compares the masks with those of the
cellpose package; `missed` counts images with an empty mask. The package and the engine `cellpose`
use the weights `nuclei_dsb2018` with their training diameter. Needs the data folder in
PERTURBJAX_SHARED."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tifffile

from data_prep.segment.watershed import Watershed
from experiments.bench.segmentation import shared_data
from experiments.bench.tables import CannotRun, Row, markdown
from perturbjax.segmentation import Segmenter, segment
from perturbjax.segmentation import average_precision as precision
from perturbjax.segmentation.api import Precision

Masks = list[np.ndarray]
#: Number of test images.
IMAGES = 40


def run(quick: bool) -> Iterator[list[Row]]:
    """Yield the rows of all engines so far, after each engine.

    Raises:
        CannotRun: the real data or the cellpose package is missing.
    """
    shared = shared_data()
    images, truths = read(shared, 4 if quick else IMAGES)
    rows: list[Row] = []
    package: Masks = []
    for name, engine in engines(shared / "weights/nuclei_dsb2018").items():
        start = time.perf_counter()
        masks = engine(images)
        seconds = time.perf_counter() - start
        package = package or masks
        pairs = list(zip(truths, masks, strict=True))
        average = precision.mean([precision.match(truth, labels) for truth, labels in pairs])
        same = precision.mean([precision.match(a, b) for a, b in zip(package, masks, strict=True)])
        rows.append(
            {
                "engine": name,
                **{
                    f"AP {iou:g}": float(value)
                    for iou, value in zip(precision.THRESHOLDS, average, strict=True)
                },
                "AP 0.9 of package": float(same[-1]),
                "missed": sum(bool(truth.any()) and not labels.any() for truth, labels in pairs),
                "s per image": seconds / len(images),
            }
        )
        yield rows


def read(shared: Path, count: int) -> tuple[Masks, Masks]:
    """Read `count` evenly spaced images and their true masks."""
    files = sorted((shared / "dsb2018_nuclei/test").glob("*_labels.tif"))
    files = [files[k] for k in np.linspace(0, len(files) - 1, count).round().astype(int)]
    images = [tifffile.imread(file.with_name(file.name.replace("_labels", ""))) for file in files]
    return images, [tifffile.imread(file).astype(int) for file in files]


def engines(weights: Path) -> dict[str, Callable[[Masks], Masks]]:
    """Return the engines by name, as functions from images to masks.

    Raises:
        CannotRun: the cellpose package is not installed.
    """
    try:
        from cellpose import models
    except ImportError as error:
        raise CannotRun(
            "the cellpose package is not installed: pip install 'perturbjax[test]'"
        ) from error
    package = models.CellposeModel(gpu=False, pretrained_model=str(weights))
    watershed = Watershed()

    def in_jax(how: Precision) -> Callable[[Masks], Masks]:
        return lambda images: [
            result.labels for result in Segmenter(weights, precision=how).masks(images)
        ]

    return {
        "package": lambda images: [package.eval(image, channels=[0, 0])[0] for image in images],
        "cellpose float32": in_jax("float32"),
        "cellpose bf16": in_jax("bfloat16"),
        "nuclei (shipped)": lambda images: segment(images),
        "watershed": lambda images: [watershed.segment(image[..., None]) for image in images],
    }


def main() -> None:
    *_, rows = run(quick="--quick" in sys.argv[1:])
    print(markdown(rows))


if __name__ == "__main__":
    main()
