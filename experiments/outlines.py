"""Draw outlines of real nuclei: ground truth, the cellpose package, and every engine, side by side.

    python -m experiments.outlines --out outlines.png [--images 6]

Images are from `dsb2018_nuclei/test`, and engines are those of `experiments.bench.masks`, which
measures their scores. Needs the data folder in PERTURBJAX_SHARED, and the cellpose package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.bench.masks import engines, read
from experiments.bench.segmentation import shared_data
from experiments.bench.tables import CannotRun
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic
from perturbjax.core.options import require, require_output, require_sound
from perturbjax.core.progress import track

#: Size in pixels of the upper left part that is drawn.
CROP = 256
#: Color of outlines, distinguishable from gray with any color vision.
COLOR = (1.0, 0.55, 0.0)


@dataclass(frozen=True)
class Config:
    out: Path
    """PNG to write."""
    images: int = 6
    """Number of images, evenly spaced among 40."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".png")
        require("images", self.images, 1 <= self.images <= 40, "1 to 40")


def main(options: Config) -> None:
    """Segment the images and draw one row per image."""
    try:
        shared = shared_data()
        makers = engines(shared / "weights/nuclei_dsb2018")
    except CannotRun as reason:
        raise InputError(str(reason)) from reason
    images, truths = read(shared, options.images)
    columns = {"truth": truths}
    for name, engine in track(
        makers.items(), total=len(makers), label="Segmenting", unit="engines"
    ):
        columns[name] = engine(images)
    draw(images, columns, options.out)


def draw(images: list[np.ndarray], columns: dict[str, list[np.ndarray]], out: Path) -> None:
    """Draw one row per image and one column per engine, with the number of objects."""
    import matplotlib.pyplot as plt
    from skimage.segmentation import find_boundaries

    figure, axes = plt.subplots(len(images), len(columns), squeeze=False)
    figure.set_size_inches(3 * len(columns), 3 * len(images))
    for row, image in zip(range(len(images)), images, strict=True):
        low, high = np.percentile(image, [1, 99.5])
        grey = np.clip((image - low) / max(high - low, 1), 0, 1)
        for axis, (name, masks) in zip(axes[row], columns.items(), strict=True):
            colors = np.stack([grey] * 3, -1)
            colors[find_boundaries(masks[row], mode="inner")] = COLOR
            axis.imshow(colors[:CROP, :CROP], interpolation="nearest")
            axis.set_title(f"{name}: {len(np.unique(masks[row])) - 1}", fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    with atomic(out) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
