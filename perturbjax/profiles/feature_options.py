"""Options of the extraction of features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perturbjax.core.config import DEFAULT_SUMMARY, Pool, Precision, Summary
from perturbjax.core.errors import InputError
from perturbjax.core.options import (
    only_flags,
    python_only,
    require,
    require_output,
    require_sound,
)
from perturbjax.data.cells import CropConfig
from perturbjax.models import BACKBONES
from perturbjax.profiles.cellprofiler import CELLPROFILER
from perturbjax.profiles.image_inputs import AdaptConfig
from perturbjax.profiles.profile_table import METADATA
from perturbjax.profiles.spatial_data import ZARR
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.processes import HostsConfig

Level = Literal["cell", "site", "well"]
Unit = Literal["site", "tile", "cell"]
Aggregate = Literal["auto", "mean", "median", "mean-std"]


@dataclass(frozen=True)
class FeaturesConfig:
    """Extract features of every cell, site or well of a dataset."""

    data: tuple[Path, ...]
    """Dataset directories with the same channels."""
    out: Path
    """Table to write: .parquet, .csv, .h5ad (AnnData), or .zarr (SpatialData, --level cell). The
    same command resumes an interrupted extraction."""
    backbone: str = "resnet50"
    """Network, or cellprofiler for CellProfiler measurements of the cells."""
    weights: str = ""
    """Pretrained weights: FILE (.pth, .safetensors), hf:OWNER/REPOSITORY[@REVISION] or
    package:NAME."""
    run: Path | None = None
    """Trained run, in place of --backbone and --weights."""
    adapt: AdaptConfig = AdaptConfig()
    pool: Pool = "last"
    """last: output of the backbone. stages: mean, mean over cells and standard deviation of each
    stage but the last."""
    augmentations: int = 1
    """Number of flips and rotations that features are averaged over, 1 to 8."""
    precision: Precision = "float32"
    """Number format of activations."""
    batch_size: int = python_only(0)
    """Sites or windows in a device call, over all devices; 0 chooses it by their size."""
    prefix: str = python_only("")
    """Prefix of the feature names; empty: Cells_ with --level cell, as pycytominer expects."""
    workers: int = python_only(0)
    """Processes for --backbone cellprofiler; 0 uses every core."""
    level: Level = "site"
    """Row of the table; well: mean of the sites of a well."""
    unit: Unit = "site"
    """Network input. site: whole site, resized to --size. tile, cell: windows of native resolution;
    --level cell implies cell."""
    aggregate: Aggregate = "auto"
    """Summary of the cells or tiles of a site. auto: mean; median for --backbone cellprofiler."""
    crops: CropConfig = only_flags(CropConfig(), "crop_size", "background", "max_cells")
    compute: ComputeConfig = ComputeConfig()
    hosts: HostsConfig = HostsConfig()

    def __post_init__(self) -> None:
        require_sound(self)
        stores = (ZARR,) if self.level == "cell" else ()
        require_output(self.out, ".parquet", ".csv", ".h5ad", *stores)
        if self.run is None and not self.weights and self.backbone != CELLPROFILER:
            backbone = BACKBONES.get(self.backbone)
            source = f", such as {backbone.source}, {backbone.license}" if backbone else ""
            example = source if backbone and backbone.source else ""
            raise InputError(
                f"--weights: is required (a file, hf:OWNER/REPOSITORY or package:NAME{example}), "
                "or else --run"
            )
        prefix = not self.prefix.startswith(METADATA)
        require("augmentations", self.augmentations, 1 <= self.augmentations <= 8, "1 to 8")
        require("batch-size", self.batch_size, self.batch_size >= 0, "0 (automatic) or more")
        require("workers", self.workers, self.workers >= 0, "0 (every core) or more")
        require("prefix", self.prefix, prefix, f"text that does not start with {METADATA}")
        by_cell = self.level == "cell"
        require("unit", self.unit, not (by_cell and self.unit == "tile"), "cell with --level cell")

    @property
    def windows(self) -> Literal["site", "tile", "cell"]:
        """The unit: cells with `level="cell"`, else `unit`."""
        return "cell" if self.level == "cell" else self.unit

    @property
    def summary(self) -> Summary:
        """The summary of the cells or tiles of a site."""
        if self.aggregate != "auto":
            return self.aggregate
        return "median" if self.run is None and self.backbone == CELLPROFILER else DEFAULT_SUMMARY
