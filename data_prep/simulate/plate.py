"""`perturbjax simulate`: plates of known truth as 16-bit TIFFs and load_data.csv."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from data_prep.output import tidy, work_folder
from data_prep.simulate.cells import CHANNELS, draw_site
from data_prep.simulate.layout import (
    PLATE_SPREAD,
    SITE_SPREAD,
    TRAITS,
    assign_wells,
    perturbations,
    position_gradient,
    trait_values,
    well_names,
)
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import require, require_output, require_seed, require_sound
from perturbjax.core.plates import FORMATS
from perturbjax.core.progress import track

#: What a folder of plates was drawn with; written last.
SETTINGS = "truth/settings.json"


@dataclass(frozen=True)
class SimulateConfig:
    """Simulate plates with ground truth, as TIFF files and load_data.csv."""

    out: Path
    """Output folder: images/, truth/ and load_data.csv."""
    plates: int = 2
    """Number of plates."""
    wells: int = 96
    """Wells of a plate."""
    sites: int = 4
    """Sites of a well."""
    compounds: int = 8
    """Number of compounds, without DMSO."""
    size: int = 128
    """Height and width of a site in pixels."""
    effect: float = 1.0
    """Effect of a compound on a trait, in standard deviations between wells."""
    aspects: tuple[Literal["count", "size", "shape", "intensity", "texture"], ...] = ()
    """Traits that compounds change, each by -2 to 2 effects; by default three traits for each compound."""
    position_gradient: float = 0.0
    """Change of every trait from one plate edge to the other, in standard deviations."""
    shared_layout: bool = False
    """Use the same plate layout on all plates, as JUMP does."""
    seed: int = 0
    """Random seed; the same seed writes the same files."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        gradient, compounds = self.position_gradient, self.compounds
        require("plates", self.plates, self.plates >= 1, "at least 1")
        require("wells", self.wells, 2 <= self.wells <= max(FORMATS), f"from 2 to {max(FORMATS)}")
        require("sites", self.sites, self.sites >= 1, "at least 1")
        require("compounds", compounds, compounds >= 1, "at least 1")
        limit = f"less than --wells, {self.wells}: DMSO needs a well too"
        require("compounds", compounds, compounds < self.wells, limit)
        require("size", self.size, self.size >= 32, "at least 32 pixels")
        require("effect", self.effect, self.effect >= 0, "0 or more")
        require("position-gradient", gradient, gradient >= 0, "0 or more")
        require_seed(self.seed)


def simulate(options: SimulateConfig) -> None:
    """Write the plates; the folder appears complete or not at all. Plates of the same settings are left as they are.

    Raises:
        InputError: a number makes no sense, or the output is something else or cannot be written.
    """
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings["aspects"] = list(options.aspects)  # as JSON has it
    if (options.out / SETTINGS).is_file() and read_json(options.out / SETTINGS) == settings:
        console.print(f"{options.out}: is already there, drawn with these settings")
        tidy(options.out, "simulating")
        return
    if options.out.exists():
        raise InputError(f"--out {options.out}: exists already; choose another name or remove it")
    make_folder(options.out.parent)
    truth = plan(options)
    with work_folder(options.out, "simulating") as work:
        plate = work / "plate"
        shutil.rmtree(plate, ignore_errors=True)
        make_folder(plate / "truth")
        for name in truth["Metadata_Plate"].unique():
            make_folder(plate / "images" / name)
        rows = [_write_site(plate, site, options) for site in _tracked(truth)]
        pd.DataFrame(rows).to_csv(plate / "load_data.csv", index=False)
        truth.to_parquet(plate / "truth" / "parameters.parquet", index=False)
        write_json(plate / SETTINGS, settings)
        os.rename(plate, options.out)
        shutil.rmtree(work)
    console.print(
        f"{options.out}: {len(rows)} sites of {options.plates} plates, {options.compounds} compounds and DMSO"
    )


def plan(options: SimulateConfig) -> pd.DataFrame:
    """The truth of every site: where it is, what it got, and its traits' values.

    Every plate, well and site draws from its own stream, so that more plates change nothing about the first ones.
    """
    names = well_names(options.wells)
    treatments = perturbations(options.compounds, options.effect, _rng(options, 0), options.aspects)
    direction = _rng(options, 1).choice((-1.0, 1.0), (2, len(TRAITS)))
    gradient = position_gradient(options.wells, options.position_gradient, direction)
    shifts = treatments[list(TRAITS)].to_numpy()
    rows: list[dict[str, Any]] = []
    for plate in range(options.plates):
        layout = assign_wells(
            options.wells,
            options.compounds,
            _rng(options, 2, 0 if options.shared_layout else plate),
        )
        rng = _rng(options, 3, plate)
        of_plate = PLATE_SPREAD * rng.standard_normal(len(TRAITS))
        of_well = rng.standard_normal((options.wells, len(TRAITS)))
        of_site = SITE_SPREAD * rng.standard_normal((options.wells, options.sites, len(TRAITS)))
        well = shifts[layout] + gradient + of_plate + of_well
        values = trait_values(well[:, None] + of_site)
        for place, site in np.ndindex(options.wells, options.sites):
            given = treatments.iloc[layout[place]]
            rows.append(
                {
                    "Metadata_Plate": f"SIM{plate + 1:03d}",
                    "Metadata_Well": names[place],
                    "Metadata_Site": site + 1,
                    **{
                        f"Metadata_{name}": given[name]
                        for name in given.index
                        if name not in TRAITS
                    },
                    "stream": f"{plate},{place},{site}",
                    **dict(zip(TRAITS, values[place, site], strict=True)),
                    **{f"shift_{name}": given[name] for name in TRAITS},
                }
            )
    return pd.DataFrame(rows)


def _write_site(work: Path, site: dict[str, Any], options: SimulateConfig) -> dict[str, Any]:
    """Draw and write one site; its row of load_data.csv."""
    import tifffile

    stream = [int(part) for part in site["stream"].split(",")]
    drawing = draw_site(
        {name: site[name] for name in TRAITS}, options.size, _rng(options, 4, *stream)
    )
    plate, well = site["Metadata_Plate"], site["Metadata_Well"]
    name = f"{plate}_{well}_s{site['Metadata_Site']:02d}"
    row = {key: value for key, value in site.items() if key.startswith("Metadata_")}
    for channel, plane in zip(CHANNELS, np.moveaxis(drawing.image, -1, 0), strict=True):
        row[f"FileName_Orig{channel}"] = f"{name}_{channel}.tiff"
        row[f"PathName_Orig{channel}"] = f"images/{plate}"
        tifffile.imwrite(work / "images" / plate / f"{name}_{channel}.tiff", plane, metadata=None)
    for part, mask in (("nuclei", drawing.nuclei), ("cells", drawing.cells)):
        tifffile.imwrite(
            work / "truth" / f"{name}_{part}_mask.tiff", mask, compression="zlib", metadata=None
        )
    return row


def _tracked(truth: pd.DataFrame) -> Iterator[dict[str, Any]]:
    return track(truth.to_dict("records"), total=len(truth), label="drawing", unit="sites")


def _rng(options: SimulateConfig, *stream: int) -> np.random.Generator:
    return np.random.default_rng([options.seed, *stream])
