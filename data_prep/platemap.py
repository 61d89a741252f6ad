"""Which perturbation stands in which well, where load_data.csv itself does not say (as in JUMP)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from data_prep.csv_tables import SOLVENT, read_table
from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, SITE, WELL, normalize_well


def join_platemap(
    sites: pd.DataFrame, platemap: pd.DataFrame, source: Path, compounds: Path | None
) -> pd.DataFrame:
    """Add the platemap's columns, and the compounds' where given, as `Metadata_*`; an empty sample is DMSO.

    Args:
        sites: with `Metadata_Well` and `row`.
        platemap: `well_position`, `broad_sample` (needed where there are compounds) and any more columns.
        source: the platemap's file, for messages.
        compounds: TSV with `broad_sample`, `pert_iname`, `InChIKey` and any more columns.

    Raises:
        InputError: a column is missing, a well stands twice or not at all, or a sample is not among the compounds.
    """
    _need(
        platemap,
        ("well_position",) if compounds is None else ("well_position", "broad_sample"),
        source,
    )
    platemap = platemap.assign(well_position=platemap["well_position"].map(normalize_well))
    _need_once(platemap, "well_position", source)
    _leave_positions(platemap, source)
    if "broad_sample" in platemap.columns:
        platemap["broad_sample"] = platemap["broad_sample"].replace("", SOLVENT)
    if compounds is not None:
        known = read_table(compounds, sep="\t")
        _need(known, ("broad_sample",), compounds)
        known = known[known["broad_sample"] != ""]
        _need_once(known, "broad_sample", compounds)
        if SOLVENT not in set(known["broad_sample"]):
            solvent = {
                "broad_sample": SOLVENT,
                "pert_iname": SOLVENT,
                "pert_type": "control",
                "control_type": "negcon",
            }
            row = {column: solvent.get(column, "") for column in known.columns}
            known = pd.concat([known, pd.DataFrame([row])], ignore_index=True)
        _leave_positions(known, compounds)
        unknown = sorted(set(platemap["broad_sample"]) - set(known["broad_sample"]))
        if unknown:
            raise InputError(
                f"{compounds}: broad_sample {unknown[0]} of {source} is missing ({len(unknown)} such)"
            )
        overlap = [
            column
            for column in known.columns
            if column in platemap.columns and column != "broad_sample"
        ]
        platemap = platemap.merge(
            known.drop(columns=overlap), on="broad_sample", how="left", validate="many_to_one"
        )

    absent = sites.loc[~sites[WELL].isin(platemap["well_position"]), ["row", WELL]]
    if len(absent):
        raise InputError(
            f"{source}: well {absent[WELL].iloc[0]} of row {absent['row'].iloc[0]} is not in the platemap"
        )
    added = platemap.rename(columns=lambda column: f"Metadata_{column}").rename(
        columns={"Metadata_well_position": WELL}
    )
    replaced = [column for column in added.columns if column in sites.columns and column != WELL]
    return sites.drop(columns=replaced).merge(added, on=WELL, how="left", validate="many_to_one")


def _need(table: pd.DataFrame, columns: tuple[str, ...], source: Path) -> None:
    for column in columns:
        if column not in table.columns:
            raise InputError(
                f"{source}: column {column} is missing; it has {', '.join(table.columns)}"
            )


def _need_once(table: pd.DataFrame, column: str, source: Path) -> None:
    twice = table.loc[table[column].duplicated(), column]
    if len(twice):
        raise InputError(f"{source}: {column} {twice.iloc[0]} stands twice")


def _leave_positions(table: pd.DataFrame, source: Path) -> None:
    for column in (PLATE, WELL, SITE):
        if (name := column.removeprefix("Metadata_")) in table.columns:
            raise InputError(
                f"{source}: column {name} would replace {column} of every site; rename or drop it"
            )
