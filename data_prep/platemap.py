"""Join treatments to sites by a plate map, for tables that list images only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from data_prep.platemap_files import PLATE_NAME, POSITION
from perturbjax.core.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE, SITE, SOLVENT, WELL, normalize_well, normalize_wells

#: Name of wells without a treatment on plates with named negative controls.
UNTREATED = "untreated"
_SAMPLE = "broad_sample"


def join_platemap(
    sites: pd.DataFrame, platemap: pd.DataFrame, source: Path, compounds: Path | None
) -> pd.DataFrame:
    """Add the columns of a plate map, and of a table of compounds, as `Metadata_*`.

    A well with an empty `broad_sample` received the solvent only: it becomes `DMSO`, a negative
    control. If the table of compounds marks further samples of the map as negative controls
    (`control_type` negcon, as in JUMP's ORF and CRISPR plates), the well becomes `untreated`. The
    number of these wells is printed.

    Args:
        sites: Table with `Metadata_Plate`, `Metadata_Well` and `row`.
        platemap: Table of `platemap_files.read_platemap`; `broad_sample` is required with
            `compounds`. Without a column of plates, it applies to all plates.
        source: File of the plate map, for messages.
        compounds: Table with `broad_sample`, and optionally `pert_iname`, `InChIKey` and more.

    Raises:
        InputError: A column is missing, a well occurs twice or is missing, or a sample is not in
            the table of compounds.
    """
    if compounds is not None:
        _require_columns(platemap, (_SAMPLE,), source)
    keys = _check_positions(sites, platemap, source)
    wells = normalize_wells(platemap[POSITION], platemap.get(PLATE_NAME), source)
    platemap = platemap.assign(**{POSITION: wells})
    _require_unique(platemap, keys, source)
    _refuse_positions(platemap, source)
    table = None if compounds is None else _read_compounds(compounds)
    if _SAMPLE in platemap.columns:
        name = _name_of_empty_samples(platemap, table)
        empty = platemap[_SAMPLE] == ""
        if empty.any():
            console.print(
                f"info: {source}: broad_sample is empty in {int(empty.sum())} of {len(platemap)} "
                f"wells; they are labeled {name}"
            )
        platemap[_SAMPLE] = platemap[_SAMPLE].mask(empty, name)
    if compounds is not None and table is not None:
        platemap = _join_compounds(platemap, table, source, compounds)

    added = platemap.rename(columns=lambda column: f"Metadata_{column}")
    added = added.rename(columns={f"Metadata_{name}": column for name, column in keys.items()})
    # Every site needs a treatment; wells of the map without images are ignored.
    columns = list(keys.values())
    absent = sites[~in_platemap(sites, platemap)]
    if len(absent):
        plate = f" of plate {absent[PLATE].iloc[0]}" if PLATE in columns else ""
        raise InputError(
            f"{source}: well {absent[WELL].iloc[0]}{plate} of row {absent['row'].iloc[0]} is not "
            "in "
            "the plate map; add the well to it, or remove its rows"
        )
    # Columns of the plate map replace those of the table.
    replaced = [name for name in added.columns if name in sites.columns and name not in columns]
    return sites.drop(columns=replaced).merge(added, on=columns, how="left", validate="many_to_one")


def in_platemap(sites: pd.DataFrame, platemap: pd.DataFrame) -> pd.Series:
    """Return for each site whether its well (and plate) is in a plate map, as booleans."""
    wells = platemap[POSITION].map(normalize_well)
    if PLATE_NAME not in platemap.columns:
        return sites[WELL].isin(wells)
    pairs = pd.MultiIndex.from_arrays([platemap[PLATE_NAME], wells])
    positions = pd.MultiIndex.from_frame(sites[[PLATE, WELL]])
    return pd.Series(positions.isin(pairs), index=sites.index)


def _check_positions(sites: pd.DataFrame, platemap: pd.DataFrame, source: Path) -> dict[str, str]:
    """Return the columns that a plate map and a table have in common: name -> name in the table."""
    plates = sites[PLATE].unique()
    if PLATE_NAME not in platemap.columns:
        if len(plates) > 1:
            console.print(
                f"info: {source}: has no column of plates, so it applies to all {len(plates)} "
                "plates"
            )
        return {POSITION: WELL}
    if not set(plates) & set(platemap[PLATE_NAME]):
        raise InputError(
            f"{source}: has none of the plates {', '.join(plates[:3])}; its plates are "
            f"{', '.join(platemap[PLATE_NAME].unique()[:3])}. Use the same names, or drop its "
            "column "
            "of plates"
        )
    return {PLATE_NAME: PLATE, POSITION: WELL}


def _read_compounds(path: Path) -> pd.DataFrame:
    table = read_table(path)
    _require_columns(table, (_SAMPLE,), path)
    table = table[table[_SAMPLE] != ""]
    _require_unique(table, [_SAMPLE], path)
    _refuse_positions(table, path)
    return table


def _name_of_empty_samples(platemap: pd.DataFrame, compounds: pd.DataFrame | None) -> str:
    """Label wells without a sample: the solvent, unless the map names negative controls."""
    if compounds is None or "control_type" not in compounds.columns:
        return SOLVENT
    negative = compounds.loc[compounds["control_type"] == "negcon", _SAMPLE]
    # Negative controls that the plate map names, other than the solvent.
    named = set(negative) & set(platemap[_SAMPLE]) - {SOLVENT}
    return UNTREATED if named else SOLVENT


def _join_compounds(
    platemap: pd.DataFrame, table: pd.DataFrame, source: Path, compounds: Path
) -> pd.DataFrame:
    # Rows for the two labels of wells without a sample, if the table does not list them.
    control = {"pert_type": "control", "control_type": "negcon"}
    extra = [
        {_SAMPLE: name, "pert_iname": name, **facts}
        for name, facts in ((SOLVENT, control), (UNTREATED, {}))
        if name not in set(table[_SAMPLE])
    ]
    rows = [{column: row.get(column, "") for column in table.columns} for row in extra]
    table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
    missing = sorted(set(platemap[_SAMPLE]) - set(table[_SAMPLE]))
    if missing:
        raise InputError(
            f"{compounds}: broad_sample {missing[0]} of {source} is missing ({len(missing)} in "
            "total)"
        )
    # Columns of the plate map take precedence over those of the compound table.
    overlap = [name for name in table.columns if name in platemap.columns and name != _SAMPLE]
    table = table.drop(columns=overlap)
    return platemap.merge(table, on=_SAMPLE, how="left", validate="many_to_one")


def _require_columns(table: pd.DataFrame, columns: tuple[str, ...], source: Path) -> None:
    for column in columns:
        if column not in table.columns:
            raise InputError(
                f"{source}: column {column} is missing; available: {', '.join(table.columns)}"
            )


def _require_unique(table: pd.DataFrame, columns: Iterable[str], source: Path) -> None:
    names = list(columns)
    repeated = table.loc[table.duplicated(names), names]
    if len(repeated):
        values = ", ".join(f"{name} {repeated[name].iloc[0]}" for name in reversed(names))
        raise InputError(f"{source}: {values} occurs twice; remove one row")


def _refuse_positions(table: pd.DataFrame, source: Path) -> None:
    for column in (PLATE, WELL, SITE):
        if (name := column.removeprefix("Metadata_")) in table.columns:
            raise InputError(
                f"{source}: column {name} would replace {column} of every site; rename or drop it"
            )
