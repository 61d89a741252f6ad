"""Does evening the light work on real images? The background at the edge of each beside that at its centre.

    python -m experiments.illumination --images DIR/sbs_transfluor --out runs/illumination

builds the 72 images of SBS Transfluor (GFP, one plate, 512 × 512 pixels, 8 bit) twice, as anyone would: as they are,
and with `--illumination estimate`. `ratios.csv` holds the ratio of each image before and after, and after division by a
function estimated from the other half of the images; `ratios.png` draws them beside the median image before and after.
25 s on one core.

Measured (median over images of the ratio; 1 is even light; mean of |ln ratio| in brackets):

    before 0.543 (0.597), after 0.954 (0.100), by the other half's function 0.967 (0.100)

What is left is not only light: cells lie unevenly too, and 8 bits leave the dark corner 10 to 20 levels.
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

#: Row, column and field of an image, in its name.
NAME = re.compile(r"_([A-P]\d\d)f(\d\d)d2\.TIF$")
PLATE, CHANNEL = "AS_09047", "GFP"


@dataclass(frozen=True)
class Config:
    images: Path
    """Folder of the 72 images."""
    out: Path
    """Folder for datasets, table and figure."""

    def __post_init__(self) -> None:
        require_sound(self)


def write_table(images: Path, path: Path) -> None:
    """The load_data.csv of the folder."""
    rows = [
        {
            "Metadata_Plate": PLATE,
            "Metadata_Well": found[1],
            "Metadata_Site": int(found[2]),
            "FileName": file.name,
        }
        for file in sorted(images.glob("*.TIF"))
        if (found := NAME.search(file.name))
    ]
    pd.DataFrame(rows).rename(columns={"FileName": f"FileName_Orig{CHANNEL}"}).to_csv(
        path, index=False
    )


def built(options: Config, how: str, name: str) -> np.ndarray:
    """(n, H, W): the stored images of a build."""
    config = BuildConfig(
        load_data=options.out / "load_data.csv",
        images=options.images,
        out=options.out / name,
        segmenter="watershed",
        label_column="none",
        illumination=how,
    )
    build(config)
    dataset = open_dataset(config.out)
    return dataset.read(np.arange(len(dataset)))[0][..., 0]


def by_other_half(before: np.ndarray, files: list[Path], out: Path) -> np.ndarray:
    """The images, each divided by the function of those it was not among: even ones by that of the odd, and so on."""
    after = np.empty_like(before)
    for half in (0, 1):
        sites = tuple(
            Site(file.name, str(file), (Plane(str(file)),), ()) for file in files[1 - half :: 2]
        )
        path = out / f"half_{half}.npy"
        estimate_function(EstimateTask(PLATE, CHANNEL, sites, before.shape[1:], path))
        after[half::2] = [divide(image, read_function(path)) for image in before[half::2]]
    return after


def draw(ratios: pd.DataFrame, before: np.ndarray, after: np.ndarray, path: Path) -> None:
    """Ratios of all images in the order of those before, and the median of all images before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(2, 1, 1)
    )
    order = ratios.sort_values("before").reset_index(drop=True)
    for name, marker in (("before", "o"), ("after", "s"), ("after, by the other half", "x")):
        axes[0].plot(order[name], marker, markersize=3.5, label=name)
    axes[0].axhline(1, color="0.6", linewidth=0.8)
    axes[0].set(xlabel="image", ylabel="background, edge / centre", ylim=(0, None))
    axes[0].legend(frameon=False, loc="lower right")
    for axis, images, title in ((axes[1], before, "before"), (axes[2], after, "after")):
        median = np.median(images / np.median(images, axis=(1, 2), keepdims=True), axis=0)
        axis.imshow(median, cmap="gray", vmin=0, vmax=1.5)
        axis.set(title=f"median image, {title}", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(options: Config) -> pd.DataFrame:
    """Build, measure and draw; the ratios, a row an image."""
    make_folder(options.out)
    write_table(options.images, options.out / "load_data.csv")
    before, after = built(options, "", "as_they_are"), built(options, "estimate", "evened")
    files = [
        options.images / name
        for name in pd.read_csv(options.out / "load_data.csv")[f"FileName_Orig{CHANNEL}"]
    ]
    held_out = by_other_half(before, files, options.out)
    columns = {"before": before, "after": after, "after, by the other half": held_out}
    ratios = pd.DataFrame(
        {
            name: [edge_to_center_ratio(image) for image in images]
            for name, images in columns.items()
        }
    )
    write_csv(options.out / "ratios.csv", ratios.assign(image=[file.name for file in files]))
    draw(ratios, before, after, options.out / "ratios.png")
    for name, values in ratios.items():
        console.print(
            f"{name}: median {values.median():.3f}, mean |ln ratio| {np.abs(np.log(values)).mean():.3f}"
        )
        console.print(f"    from {values.min():.3f} to {values.max():.3f}")
    return ratios


def main() -> None:
    run_command(lambda: run(parse_options(Config)))


if __name__ == "__main__":
    main()
