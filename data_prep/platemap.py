"""Join treatments to sites by a plate map, for tables that list images only (as in JUMP)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from data_prep.csv_tables import SOLVENT, read_table
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE, SITE, WELL, normalize_well

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
        sites: Table with `Metadata_Well` and `row`.
        platemap: Table with `well_position`, `broad_sample` (required with `compounds`) and
            more columns.
        source: File of the plate map, for messages.
        compounds: Table with `broad_sample`, and optionally `pert_iname`, `InChIKey` and more.

    Raises:
        InputError: A column is missing, a well occurs twice or is missing, or a sample is not in
            the table of compounds.
    """
    required = ("well_position",) if compounds is None else ("well_position", _SAMPLE)
    _require_columns(platemap, required, source)
    platemap = platemap.assign(well_position=platemap["well_position"].map(normalize_well))
    _require_unique(platemap, "well_position", source)
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

    # Every site needs a treatment; wells of the map without images are ignored.
    absent = sites.loc[~sites[WELL].isin(platemap["well_position"]), ["row", WELL]]
    if len(absent):
        raise InputError(
            f"{source}: well {absent[WELL].iloc[0]} of row {absent['row'].iloc[0]} is not in the "
            "plate map"
        )
    added = platemap.rename(columns=lambda column: f"Metadata_{column}")
    added = added.rename(columns={"Metadata_well_position": WELL})
    # Columns of the plate map replace those of the table.
    replaced = [column for column in added.columns if column in sites.columns and column != WELL]
    return sites.drop(columns=replaced).merge(added, on=WELL, how="left", validate="many_to_one")


def _read_compounds(path: Path) -> pd.DataFrame:
    table = read_table(path)
    _require_columns(table, (_SAMPLE,), path)
    table = table[table[_SAMPLE] != ""]
    _require_unique(table, _SAMPLE, path)
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


def _require_unique(table: pd.DataFrame, column: str, source: Path) -> None:
    repeated = table.loc[table[column].duplicated(), column]
    if len(repeated):
        raise InputError(f"{source}: {column} {repeated.iloc[0]} occurs twice; remove one row")


def _refuse_positions(table: pd.DataFrame, source: Path) -> None:
    for column in (PLATE, WELL, SITE):
        if (name := column.removeprefix("Metadata_")) in table.columns:
            raise InputError(
                f"{source}: column {name} would replace {column} of every site; rename or drop it"
            )
