"""`perturbjax simulate`: write plates with ground truth as 16-bit TIFF files and load_data.csv."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from data_prep.output import remove_work_folder, work_folder
from data_prep.simulate.cells import CHANNELS, draw_site
from data_prep.simulate.layout import (
    ORGANIZATION,
    PLATE_SPREAD,
    SITE_SPREAD,
    TRAITS,
    assign_wells,
    organization_values,
    perturbations,
    position_gradient,
    trait_values,
    well_names,
)
from data_prep.simulate.screen import EMPTY_FRACTION, SCREEN, screen_treatments
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_json
from perturbjax.core.messages import console, counted
from perturbjax.core.options import require, require_output, require_seed, require_sound
from perturbjax.core.plates import EMPTY, FORMATS
from perturbjax.core.progress import track

#: Settings of a simulation, written last: a folder with this file is complete.
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
    design: Literal["random", "screen"] = "random"
    """Treatments. random: compounds with random effects. screen: seven with named effects, one of
    them toxic and one inactive, and empty wells."""
    effect: float = 1.0
    """Effect of a compound on a trait, in standard deviations between wells."""
    aspects: tuple[Literal["count", "size", "shape", "intensity", "texture"], ...] = ()
    """Traits that compounds change, each by -2 to 2 effects; default: three per compound."""
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
        if self.design == "screen":
            require("aspects", self.aspects, not self.aspects, "left out with --design screen")
            least = 3 * len(SCREEN)
            require("wells", self.wells, self.wells >= least, f"at least {least} with this design")
        require("size", self.size, self.size >= 32, "at least 32 pixels")
        require("effect", self.effect, self.effect >= 0, "0 or more")
        require("position-gradient", gradient, gradient >= 0, "0 or more")
        require_seed(self.seed)


def simulate(options: SimulateConfig) -> None:
    """Write simulated plates. The folder appears complete or not at all.

    A folder that exists with the same settings remains unchanged.

    Raises:
        InputError: The output exists with other contents, or cannot be written.
    """
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings["aspects"] = list(options.aspects)  # JSON has no tuples
    if (options.out / SETTINGS).is_file() and read_json(options.out / SETTINGS) == settings:
        console.print(f"info: {options.out} already contains this simulation")
        remove_work_folder(options.out, "simulating")
        return
    if options.out.exists():
        raise InputError(f"--out {options.out}: already exists; choose another name or remove it")
    make_folder(options.out.parent)
    truth = plan(options)
    with work_folder(options.out, "simulating") as work:
        folder = work / "plate"
        # A killed simulation is drawn from scratch.
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder / "truth")
        for name in truth["Metadata_Plate"].unique():
            make_folder(folder / "images" / name)
        sites = track(truth.to_dict("records"), total=len(truth), label="Drawing", unit="sites")
        rows = [_write_site(folder, site, options) for site in sites]
        pd.DataFrame(rows).to_csv(folder / "load_data.csv", index=False)
        truth.to_parquet(folder / "truth" / "parameters.parquet", index=False)
        write_json(folder / SETTINGS, settings)
        # One rename makes the complete simulation visible.
        os.rename(folder, options.out)
        shutil.rmtree(work)
    treated = truth["Metadata_control_type"] == "trt"
    treatments = truth["Metadata_pert_iname"][treated].nunique()
    console.print(
        f"{options.out}: {counted(len(rows), 'site')} on {counted(options.plates, 'plate')}, "
        f"{counted(treatments, 'treatment')} and DMSO"
    )


def plan(options: SimulateConfig) -> pd.DataFrame:
    """Draw the ground truth of all sites.

    Every plate, well and site uses its own random stream, so additional plates do not change the
    first ones.

    Returns:
        One row per site: position, treatment, trait values and shifts.
    """
    names = well_names(options.wells)
    treatments, empty = _treatments(options)
    all_traits = (*TRAITS, *ORGANIZATION)
    metadata = [column for column in treatments.columns if column not in all_traits]
    # Random signs of the gradient along rows and columns, (2, traits).
    direction = _rng(options, 1).choice((-1.0, 1.0), (2, len(TRAITS)))
    gradient = position_gradient(options.wells, options.position_gradient, direction)
    shifts = treatments[list(TRAITS)].to_numpy()
    organization = organization_values(treatments[list(ORGANIZATION)].to_numpy())
    compounds = (treatments["control_type"] == "trt").sum()
    rows: list[dict[str, Any]] = []
    for plate in range(options.plates):
        # With a shared layout, all plates use the stream of plate 0.
        layout_stream = _rng(options, 2, 0 if options.shared_layout else plate)
        layout = assign_wells(options.wells, compounds, layout_stream, empty)
        rng = _rng(options, 3, plate)
        plate_effect = PLATE_SPREAD * rng.standard_normal(len(TRAITS))
        well_effect = rng.standard_normal((options.wells, len(TRAITS)))
        site_effect = SITE_SPREAD * rng.standard_normal((options.wells, options.sites, len(TRAITS)))
        wells = shifts[layout] + gradient + plate_effect + well_effect
        # (wells, sites, traits).
        values = trait_values(wells[:, None] + site_effect)
        is_empty = (treatments["control_type"] == EMPTY).to_numpy()[layout]
        values[is_empty, :, list(TRAITS).index("count")] = 0
        for well, site in np.ndindex(options.wells, options.sites):
            treatment = treatments.iloc[layout[well]]
            rows.append(
                {
                    "Metadata_Plate": f"SIM{plate + 1:03d}",
                    "Metadata_Well": names[well],
                    "Metadata_Site": site + 1,
                    **{f"Metadata_{name}": treatment[name] for name in metadata},
                    "stream": f"{plate},{well},{site}",
                    **dict(zip(TRAITS, values[well, site], strict=True)),
                    **dict(zip(ORGANIZATION, organization[layout[well]], strict=True)),
                    **{f"shift_{name}": treatment[name] for name in all_traits},
                }
            )
    return pd.DataFrame(rows)


def _treatments(options: SimulateConfig) -> tuple[pd.DataFrame, int]:
    """The table of treatments, and the number of empty wells of a plate."""
    if options.design == "screen":
        return screen_treatments(options.effect), max(round(options.wells * EMPTY_FRACTION), 1)
    rng = _rng(options, 0)
    return perturbations(options.compounds, options.effect, rng, options.aspects), 0


def _write_site(folder: Path, site: dict[str, Any], options: SimulateConfig) -> dict[str, Any]:
    """Draw and write one site; return its row of load_data.csv."""
    import tifffile

    stream = [int(part) for part in site["stream"].split(",")]
    traits = {name: site[name] for name in (*TRAITS, *ORGANIZATION)}
    drawing = draw_site(traits, options.size, _rng(options, 4, *stream))
    plate, well = site["Metadata_Plate"], site["Metadata_Well"]
    name = f"{plate}_{well}_s{site['Metadata_Site']:02d}"
    row = {key: value for key, value in site.items() if key.startswith("Metadata_")}
    for channel, plane in zip(CHANNELS, np.moveaxis(drawing.image, -1, 0), strict=True):
        row[f"FileName_Orig{channel}"] = f"{name}_{channel}.tiff"
        row[f"PathName_Orig{channel}"] = f"images/{plate}"
        tifffile.imwrite(folder / "images" / plate / f"{name}_{channel}.tiff", plane, metadata=None)
    for part, mask in (("nuclei", drawing.nuclei), ("cells", drawing.cells)):
        path = folder / "truth" / f"{name}_{part}_mask.tiff"
        tifffile.imwrite(path, mask, compression="zlib", metadata=None)
    return row


def _rng(options: SimulateConfig, *stream: int) -> np.random.Generator:
    # The first number of a stream is its purpose: treatments, gradient, layout, effects or drawing.
    return np.random.default_rng([options.seed, *stream])
