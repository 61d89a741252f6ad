"""`perturbjax inspect`: what a load_data.csv holds, and what will make its scores hard to trust."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from data_prep.site_table import (
    FILE,
    IDENTITY_COLUMNS,
    SiteTable,
    choose_label,
    merged_identities,
    read_sites,
)
from data_prep.sources import probe_planes
from perturbjax.core.errors import InputError
from perturbjax.core.messages import PlainConsole, terminal_text
from perturbjax.core.options import require_sound
from perturbjax.core.plates import COMPOUND_COLUMNS, PLATE, SITE, WELL, shared_layouts
from perturbjax.core.progress import track

#: Sites whose files are opened to learn sizes and types.
SAMPLE = 48
#: Columns of text where the output is a file or a pipe.
PLAIN_WIDTH = 120
#: A label column has at least this many sites in a class, on average; else it is a name and not a class.
LEAST_PER_CLASS = 2


@dataclass(frozen=True)
class InspectConfig:
    """Summarize load_data.csv and its images, and warn about designs that limit the evaluation."""

    images: str | Path
    """Folder of the paths in the CSV, a Zarr store (NAME.zarr), a folder of stores, or a URL (s3://, https://)."""
    load_data: Path | None = None
    """CSV with FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL> and Metadata_* columns, one row per site. Optional for
    Zarr stores."""
    label_column: str = ""
    """Label column, or none; by default Metadata_pert_iname, Metadata_broad_sample or Metadata_moa."""
    platemap: Path | None = None
    """TSV with well_position and broad_sample, if the CSV has no treatments."""
    compounds: Path | None = None
    """TSV with broad_sample, pert_iname, InChIKey, …, joined to the plate map."""

    def __post_init__(self) -> None:
        require_sound(self)


def inspect(options: InspectConfig) -> None:
    """Print the report to stdout.

    Raises:
        InputError: the table cannot be used, or files are missing or unreadable (after the report).
    """
    table = read_sites(
        options.load_data,
        options.images,
        platemap=options.platemap,
        compounds=options.compounds,
        must_exist=False,
        project="middle",  # nothing is read; a stack is told of below
    )
    label_column = choose_label(table.sites, options.label_column, table.source)
    out = PlainConsole()
    if not out.is_terminal:
        out.width = PLAIN_WIDTH
    out.print(_counts(table))
    sizes, deepest = _sizes(table)
    out.print(_channels(table, sizes))
    out.print(_labels(table, label_column))
    found = warnings(table.sites, label_column) if label_column else []
    found += merged_identities(table.sites, label_column)
    if len({shape for counts in sizes.values() for shape, _ in counts}) > 1:
        found.append("sites differ in size; training needs one size: build with --resize N")
    if deepest > 1:
        found.append(
            f"files hold stacks of up to {deepest} planes: build with --project max, mean or middle"
        )
    for warning in found:
        out.print(Text.assemble(("warning", "yellow"), f": {terminal_text(warning)}"))
    _refuse_missing(table)


def warnings(sites: pd.DataFrame, label_column: str) -> list[str]:
    """What about the layout of the plates makes a score hard to trust; one sentence each."""
    found = []
    wells = sites.drop_duplicates([PLATE, WELL])
    per_class = wells.groupby(label_column).size()
    single = int((per_class == 1).sum())
    if single * 2 > len(per_class):
        found.append(
            f"{single} of {len(per_class)} classes of {label_column} stand in one well only: a split over sites asks "
            "which well it is, and a split over wells cannot judge them at all"
        )
    places = wells.groupby(label_column)[WELL].nunique()
    plates = wells.groupby(label_column)[PLATE].nunique()
    fixed = int(((places == 1) & (plates > 1)).sum())
    if fixed * 2 > len(places):
        found.append(
            f"{fixed} of {len(places)} classes of {label_column} stand in the same well on every plate: "
            "compound and position cannot be told apart"
        )
    for group in shared_layouts(wells) if set(COMPOUND_COLUMNS) & set(wells.columns) else []:
        found.append(
            f"{len(group)} plates share one layout ({', '.join(group[:4])}{' …' if len(group) > 4 else ''}): "
            "split by layout, not by plate"
        )
    share = sites[label_column].value_counts(normalize=True)
    if share.iloc[0] >= 1 / 3:
        found.append(
            f"{share.index[0]} is {share.iloc[0]:.1%} of all sites: always answering it scores that much"
        )
    if len(per_class) == 1:
        found.append(f"{label_column} has a single class: there is nothing to predict")
    return found


def _counts(table: SiteTable) -> Table:
    sites = table.sites
    wells = sites.drop_duplicates([PLATE, WELL])
    per_plate, per_well = wells.groupby(PLATE).size(), sites.groupby([PLATE, WELL]).size()
    shown = Table(title=str(table.source), title_justify="left", show_header=False)
    shown.add_row("plates", str(sites[PLATE].nunique()))
    shown.add_row("wells", f"{len(wells)}  ({_span(per_plate)} a plate)")
    shown.add_row(
        "sites", f"{len(sites)}  ({_span(per_well)} a well, {sites[SITE].nunique()} site numbers)"
    )
    shown.add_row("channels", ", ".join(table.channels))
    shown.add_row(
        "metadata", ", ".join(column.removeprefix("Metadata_") for column in table.metadata_columns)
    )
    return shown


def _span(counts: pd.Series) -> str:
    least, most = counts.min(), counts.max()
    return str(least) if least == most else f"{least} to {most}"


def _sizes(table: SiteTable) -> tuple[dict[str, Counter], int]:
    """Channel → how many of the sampled planes have each ((height, width), type), and the deepest stack's planes."""
    picked = np.unique(np.linspace(0, len(table) - 1, SAMPLE).astype(int))
    sizes: dict[str, Counter] = {channel: Counter() for channel in table.channels}
    deepest = 1
    rows = table.sites.iloc[picked].to_dict("records")
    for row in track(rows, total=len(rows), label="sampling files", unit="sites"):
        planes = {
            channel: row[FILE + channel] for channel in table.channels if row[FILE + channel].file
        }
        probes = probe_planes(planes.values(), table.where(row))
        for channel, plane in planes.items():
            sizes[channel][probes[plane].shape, probes[plane].dtype.name] += 1
            deepest = max(deepest, probes[plane].depth)
    return sizes, deepest


def _missing(table: SiteTable, channel: str) -> pd.Series:
    return table.sites[FILE + channel].map(lambda plane: not plane.file)


def _channels(table: SiteTable, sizes: dict[str, Counter]) -> Table:
    shown = Table(title="Channels", title_justify="left")
    for heading in ("channel", "files", "missing", "height x width, type (sampled)"):
        shown.add_column(heading)
    for channel in table.channels:
        missing = int(_missing(table, channel).sum())
        kinds = ", ".join(
            f"{h} x {w} {dtype} ({n})" for ((h, w), dtype), n in sizes[channel].most_common(4)
        )
        shown.add_row(
            channel,
            str(len(table) - missing),
            Text(str(missing), "red" if missing else ""),
            kinds or "-",
        )
    return shown


def _labels(table: SiteTable, label_column: str) -> Table:
    """One row per column that could be a label: its classes, and what always answering the largest scores."""
    sites = table.sites
    shown = Table(title="Columns to predict (* the label)", title_justify="left")
    for heading in ("column", "classes", "sites a class", "wells a class", "largest class"):
        shown.add_column(heading)
    known = [column for column in IDENTITY_COLUMNS if column in sites.columns]
    columns = dict.fromkeys([label_column, *known] if label_column else known)
    wells = sites.drop_duplicates([PLATE, WELL])
    for column in columns:
        counts = sites[column].value_counts()
        if column != label_column and len(counts) * LEAST_PER_CLASS > len(sites):
            continue
        largest = f"{counts.index[0] or '(empty)'}: {counts.iloc[0] / len(sites):.1%} of sites"
        name = f"* {column}" if column == label_column else f"  {column}"
        per_well = wells.groupby(column).size()
        shown.add_row(name, str(len(counts)), _spread(counts), _spread(per_well), largest)
    return shown


def _spread(counts: pd.Series) -> str:
    return f"{counts.min()} to {counts.max()}, median {counts.median():g}"


def _refuse_missing(table: SiteTable) -> None:
    for channel in table.channels:
        missing = table.sites.loc[_missing(table, channel), "row"]
        if len(missing):
            total = sum(int(_missing(table, other).sum()) for other in table.channels)
            raise InputError(
                f"{table.source}, row {missing.iloc[0]}, channel {channel}: the file is missing ({total} such files); "
                "check --images"
            )
