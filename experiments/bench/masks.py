"""How right are the masks of each engine, on real nuclei that none of them was trained on?

    python -m experiments.bench.masks [--quick]

The 40 images of `dsb2018_nuclei/test` (2,146 nuclei): average precision TP / (TP + FP + FN) at IoU 0.5, 0.75 and 0.9
against the truth, the mean over images; `AP 0.9 of package` is each way's masks against the package's. `missed` are
images with nothing found where there is something. The package and the JAX engine have the same weights,
`nuclei_dsb2018`, at their own diameter. Needs the data folder named by PERTURBJAX_SHARED.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tifffile

from data_prep.segment.nuclei import Nuclei
from data_prep.segment.watershed import Watershed
from experiments.bench.segmentation import shared_data
from experiments.bench.tables import CannotRun, Row, markdown
from perturbjax.segmentation import Segmenter
from perturbjax.segmentation import average_precision as precision
from perturbjax.segmentation.api import Precision

Masks = list[np.ndarray]
#: All there are.
IMAGES = 40


def run(quick: bool) -> Iterator[list[Row]]:
    """One row per engine, all there are so far after each.

    Raises:
        CannotRun: the real data or the cellpose package is not there.
    """
    shared = shared_data()
    images, truths = read(shared, 4 if quick else IMAGES)
    rows: list[Row] = []
    package: Masks = []
    for name, engine in engines(shared / "weights/nuclei_dsb2018").items():
        start = time.perf_counter()
        found = engine(images)
        seconds = time.perf_counter() - start
        package = package or found
        pairs = list(zip(truths, found, strict=True))
        average = precision.mean([precision.match(truth, masks) for truth, masks in pairs])
        same = precision.mean(
            [precision.match(theirs, masks) for theirs, masks in zip(package, found, strict=True)]
        )
        rows.append(
            {
                "engine": name,
                **{
                    f"AP {iou:g}": float(value)
                    for iou, value in zip(precision.THRESHOLDS, average, strict=True)
                },
                "AP 0.9 of package": float(same[-1]),
                "missed": sum(bool(truth.any()) and not masks.any() for truth, masks in pairs),
                "s an image": seconds / len(images),
            }
        )
        yield rows


def read(shared: Path, count: int) -> tuple[Masks, Masks]:
    """That many images, evenly spread over those there are, and their true masks."""
    files = sorted((shared / "dsb2018_nuclei/test").glob("*_labels.tif"))
    files = [files[k] for k in np.linspace(0, len(files) - 1, count).round().astype(int)]
    images = [tifffile.imread(file.with_name(file.name.replace("_labels", ""))) for file in files]
    return images, [tifffile.imread(file).astype(int) for file in files]


def engines(weights: Path) -> dict[str, Callable[[Masks], Masks]]:
    """Each engine's name → images to masks.

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
    nuclei, watershed = Nuclei(), Watershed("", 0.0)

    def ours(how: Precision) -> Callable[[Masks], Masks]:
        return lambda images: [
            found.labels for found in Segmenter(weights, precision=how).masks(images)
        ]

    return {
        "package": lambda images: [package.eval(image, channels=[0, 0])[0] for image in images],
        "cellpose float32": ours("float32"),
        "cellpose bf16": ours("bfloat16"),
        "nuclei (shipped)": lambda images: list(
            nuclei.segment_all([image[..., None] for image in images])
        ),
        "watershed": lambda images: [watershed.segment(image[..., None]) for image in images],
    }


def main() -> None:
    *_, rows = run(quick="--quick" in sys.argv[1:])
    print(markdown(rows))


if __name__ == "__main__":
    main()
