"""Screens whose truth is known: plates of wells of sites, features made of effect, place, plate and brightness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.audit.command import audit_features
from perturbjax.audit.findings import Audit
from perturbjax.audit.settings import AuditConfig
from perturbjax.audit.sources import material_of
from perturbjax.features.profiles import Profiles
from perturbjax.plates import well_name

FEATURES = 48


def screen(
    *,
    effect: float = 0.0,
    gradient: float = 0.0,
    brightness: float = 0.0,
    plates: int = 4,
    layouts: int | None = None,
    wells: int = 48,
    sites: int = 3,
    classes: int = 6,
    well_noise: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """A row a site, as a table of features with what a dataset's index measures.

    Args:
        effect: how far the treatments' centres lie apart, in deviations between wells.
        gradient: deviation from one edge of the plate to the other.
        brightness: as effect, of the channel's mean, which is a feature too.
        layouts: plates of one layout have the same treatment in each well; by default each has its own.
        well_noise: deviation between wells; that between the sites of a well is half of it.
    """
    rng = np.random.default_rng(seed)
    layouts = plates if layouts is None else layouts
    centres = effect / FEATURES**0.5 * rng.normal(size=(classes, FEATURES))
    bright = brightness * rng.normal(size=classes)
    direction = rng.normal(size=(2, FEATURES))
    of_layout = [rng.permutation(np.resize(np.arange(classes), wells)) for _ in range(layouts)]
    columns = {48: 8, 96: 12, 384: 24}[wells]
    spots = np.stack(np.divmod(np.arange(wells), columns), axis=1)
    place = gradient * (spots / spots.max(axis=0) - 0.5) @ direction
    tables = []
    for plate in range(plates):
        kinds = of_layout[plate % layouts]
        of_well = centres[kinds] + place + well_noise * rng.normal(size=(wells, FEATURES)) + rng.normal(size=FEATURES)
        light = np.repeat(bright[kinds] + rng.normal(size=wells), sites) + 0.5 * rng.normal(size=wells * sites)
        values = np.repeat(of_well, sites, axis=0) + 0.5 * well_noise * rng.normal(size=(wells * sites, FEATURES))
        names = np.repeat([well_name(*spot) for spot in spots], sites)
        table = pd.DataFrame(np.c_[values, light], columns=[f"f{number}" for number in range(FEATURES + 1)])
        table = table.assign(
            Metadata_Plate=f"P{plate}",
            Metadata_Well=names,
            Metadata_Site=np.tile(np.arange(sites), wells),
            Metadata_pert_iname=np.repeat([f"compound {kind}" for kind in kinds], sites),
            mean_DNA=1000 * np.exp(0.2 * light),
            n_cells=rng.integers(20, 60, wells * sites),
        )
        tables.append(table.assign(mask_area=table["n_cells"] * 100))
    return pd.concat(tables, ignore_index=True)


def audit_of(table: pd.DataFrame, **changes: object) -> Audit:
    """The audit of such a screen, quick."""
    names = [column for column in table.columns if column[0] == "f"]
    metadata = table[[column for column in table.columns if column.startswith("Metadata_")]].astype(str)
    ids = metadata["Metadata_Plate"] + "_" + metadata["Metadata_Well"] + "_" + metadata["Metadata_Site"]
    profiles = Profiles(metadata.assign(site_id=ids), table[names].to_numpy(np.float32), tuple(names))
    index = profiles.metadata.join(table[["mean_DNA", "n_cells", "mask_area"]])
    config = AuditConfig(**{"out": Path("audit"), "features": (Path("screen"),), "replicates": 200, **changes})
    label = "Metadata_pert_iname"
    return audit_features(material_of("screen", label, index, profiles, config), config, config.model)
