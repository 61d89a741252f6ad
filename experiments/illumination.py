"""Measure illumination correction on real images: background at the edge divided by the center.

    python -m experiments.illumination --images DIR/sbs_transfluor --out runs/illumination

Builds the 72 images of SBS Transfluor (GFP, one plate, 512 x 512 pixels, 8 bit) without correction
and with `--illumination estimate`. `ratios.csv` has the ratio of each image before and after, and
after division by a function that was estimated from the other half of the images. `ratios.png`
shows the ratios and the median images.

Cost: 25 s (one core). Result, median of the ratio (1 is uniform) and mean of |ln ratio|:

    before 0.543 (0.597), after 0.954 (0.100), function of the other half 0.967 (0.100)

The remaining difference is partly due to cells, which are unevenly distributed, and to 8 bits: the
dark corner has only 10 to 20 gray levels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.build import BuildConfig, build
from data_prep.illumination import (
    EstimateTask,
    divide,
    edge_to_center_ratio,
    estimate_function,
    read_function,
)
from data_prep.site import Site
from data_prep.sources import Plane
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.files import make_folder, write_csv
from perturbjax.core.messages import console
from perturbjax.core.options import require_sound
from perturbjax.dataset import open_dataset

#: Well and field in the name of an image.
NAME = re.compile(r"_([A-P]\d\d)f(\d\d)d2\.TIF$")
PLATE, CHANNEL = "AS_09047", "GFP"


@dataclass(frozen=True)
class Config:
    images: Path
    """Folder with the 72 images."""
    out: Path
    """Folder for the datasets, the table and the figure."""

    def __post_init__(self) -> None:
        require_sound(self)


def write_table(images: Path, path: Path) -> None:
    """Write the load_data.csv of the images."""
    rows = [
        {
            "Metadata_Plate": PLATE,
            "Metadata_Well": match[1],
            "Metadata_Site": int(match[2]),
            "FileName": file.name,
        }
        for file in sorted(images.glob("*.TIF"))
        if (match := NAME.search(file.name))
    ]
    pd.DataFrame(rows).rename(columns={"FileName": f"FileName_Orig{CHANNEL}"}).to_csv(
        path, index=False
    )


def build_images(options: Config, illumination: str, name: str) -> np.ndarray:
    """Build a dataset and return its stored images (n, H, W)."""
    config = BuildConfig(
        load_data=options.out / "load_data.csv",
        images=options.images,
        out=options.out / name,
        segmenter="watershed",
        label_column="none",
        illumination=illumination,
    )
    build(config)
    dataset = open_dataset(config.out)
    return dataset.read(np.arange(len(dataset)))[0][..., 0]


def correct_by_other_half(before: np.ndarray, files: list[Path], out: Path) -> np.ndarray:
    """Divide even images by the function of the odd ones, and odd images by that of the even."""
    after = np.empty_like(before)
    for half in (0, 1):
        sites = tuple(
            Site(file.name, str(file), (Plane(str(file)),), ()) for file in files[1 - half :: 2]
        )
        path = out / f"half_{half}.npy"
        estimate_function(EstimateTask(PLATE, CHANNEL, sites, before.shape[1:], path))
        after[half::2] = [divide(image, read_function(path)) for image in before[half::2]]
    return after


def plot(ratios: pd.DataFrame, before: np.ndarray, after: np.ndarray, path: Path) -> None:
    """Plot the sorted ratios, and the median of all images before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(2, 1, 1)
    )
    order = ratios.sort_values("before").reset_index(drop=True)
    for name, marker in zip(ratios.columns, "osx", strict=True):
        axes[0].plot(order[name], marker, markersize=3.5, label=name)
    axes[0].axhline(1, color="0.6", linewidth=0.8)
    axes[0].set(xlabel="image", ylabel="background, edge / center", ylim=(0, None))
    axes[0].legend(frameon=False, loc="lower right")
    for axis, images, title in ((axes[1], before, "before"), (axes[2], after, "after")):
        median = np.median(images / np.median(images, axis=(1, 2), keepdims=True), axis=0)
        axis.imshow(median, cmap="gray", vmin=0, vmax=1.5)
        axis.set(title=f"median image, {title}", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(options: Config) -> pd.DataFrame:
    """Build, measure and plot; return the ratios, one row per image."""
    make_folder(options.out)
    write_table(options.images, options.out / "load_data.csv")
    before = build_images(options, "", "uncorrected")
    after = build_images(options, "estimate", "corrected")
    files = [
        options.images / name
        for name in pd.read_csv(options.out / "load_data.csv")[f"FileName_Orig{CHANNEL}"]
    ]
    other_half = correct_by_other_half(before, files, options.out)
    columns = {"before": before, "after": after, "after, other half": other_half}
    ratios = pd.DataFrame(
        {
            name: [edge_to_center_ratio(image) for image in images]
            for name, images in columns.items()
        }
    )
    write_csv(options.out / "ratios.csv", ratios.assign(image=[file.name for file in files]))
    plot(ratios, before, after, options.out / "ratios.png")
    for name, values in ratios.items():
        console.print(
            f"{name}: median {values.median():.3f} ({values.min():.3f} to {values.max():.3f}), "
            f"mean |ln ratio| {np.abs(np.log(values)).mean():.3f}"
        )
    return ratios


if __name__ == "__main__":
    run_command(lambda: run(parse_options(Config, description=__doc__.split("\n\n")[0])))
