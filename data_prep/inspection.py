"""`perturbjax inspect`: summarize a load_data.csv and its images, and warn about problems."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from data_prep.layout_warnings import bit_depth_warnings, layout_warnings
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
from perturbjax.core.plates import PLATE, SITE, WELL
from perturbjax.core.progress import track

#: Number of sites (evenly spaced in the table) whose file headers are read.
SAMPLE = 48
#: Width in columns of the report in a file or pipe.
PLAIN_WIDTH = 120
#: Mean number of sites per class below which a column contains names rather than classes.
MIN_SITES_PER_CLASS = 2
#: Names of nuclear stains; the suggested build command segments the first channel with such a name.
NUCLEAR_STAINS = ("dna", "dapi", "hoechst", "nuc", "draq")


@dataclass(frozen=True)
class InspectConfig:
    """Summarize load_data.csv and its images, and warn about designs that limit the evaluation."""

    images: str | Path
    """Folder of the paths in the CSV, Zarr store (NAME.zarr), folder of stores, or URL (s3://, https://)."""
    load_data: Path | None = None
    """CSV with one row per site: FileName_Orig<CHANNEL>, PathName_Orig<CHANNEL>, Metadata_*."""
    label_column: str = ""
    """Label column, or none. Default: Metadata_pert_iname, _broad_sample or _moa."""
    platemap: Path | None = None
    """Plate map with the treatments (CSV, TSV, XLSX), if the CSV has none."""
    compounds: Path | None = None
    """TSV of compounds (broad_sample, pert_iname, …), joined to the plate map."""

    def __post_init__(self) -> None:
        require_sound(self)


def inspect(options: InspectConfig) -> None:
    """Print a summary, warnings and the suggested build command to stdout.

    Raises:
        InputError: The table cannot be used, or files are missing or unreadable (after the
            summary).
    """
    table = _read_table(options)
    label_column = choose_label(table.sites, options.label_column, table.source)
    # The report is the output of the command, so it is printed to stdout; messages use stderr.
    out = PlainConsole()
    if not out.is_terminal:
        out.width = PLAIN_WIDTH
    out.print(_summary_table(table))
    headers = _read_headers(table)
    out.print(_channel_table(table, headers))
    out.print(_label_table(table, label_column))
    warnings = layout_warnings(table.sites, label_column) if label_column else []
    warnings += merged_identities(table.sites, label_column)
    warnings += _image_warnings(headers)
    for warning in warnings:
        out.print(Text.assemble(("warning", "yellow"), f": {terminal_text(warning)}"))
    # Missing files are an error only after the complete report.
    _refuse_missing(table)
    out.print(f"Next step: {build_command(options, table.channels, headers)}")


def suggest_build(options: InspectConfig) -> tuple[str, ...]:
    """Return the words of the suggested `perturbjax build`, without the command and --out.

    Raises:
        InputError: the table cannot be used, or files are missing or unreadable.
    """
    table = _read_table(options)
    headers = _read_headers(table)
    _refuse_missing(table)
    return build_words(options, table.channels, headers)


def _read_table(options: InspectConfig) -> SiteTable:
    return read_sites(
        options.load_data,
        options.images,
        platemap=options.platemap,
        compounds=options.compounds,
        must_exist=False,
        project="middle",  # accept stacks; only headers are read
    )


def build_command(options: InspectConfig, channels: tuple[str, ...], headers: pd.DataFrame) -> str:
    """Return the `perturbjax build` command for the inspected table and images."""
    words = build_words(options, channels, headers)
    return shlex.join(["perturbjax", "build", *words, "--out", "dataset"])


def build_words(
    options: InspectConfig, channels: tuple[str, ...], headers: pd.DataFrame
) -> tuple[str, ...]:
    """Return the words of the `perturbjax build` command for the inspected table and images."""
    flags: dict[str, object] = {
        "load-data": options.load_data,
        "images": options.images,
        "platemap": options.platemap,
        "compounds": options.compounds,
        "label-column": options.label_column,
    }
    # Nuclei are easier to segment than an aggregate of all channels.
    nuclear = [name for name in channels if any(s in name.lower() for s in NUCLEAR_STAINS)]
    if len(channels) > 1 and nuclear:
        flags |= {"aggregate": "none", "segment-channels": nuclear[0]}
    if headers["depth"].max() > 1:
        flags["project"] = "max"
    if headers["shape"].nunique() > 1:
        # The smallest side, so that no image is enlarged.
        flags["resize"] = min(map(min, headers["shape"]))
    return tuple(
        word for flag, value in flags.items() if value for word in (f"--{flag}", str(value))
    )


def _image_warnings(headers: pd.DataFrame) -> list[str]:
    warnings = [
        text
        for channel, rows in headers.groupby("channel", sort=False)
        for text in bit_depth_warnings(rows["plate"], rows["dtype"], f"images of channel {channel}")
    ]
    if headers["shape"].nunique() > 1:
        warnings.append(
            "sites differ in size, but training requires one size: build with --resize N"
        )
    if headers["depth"].max() > 1:
        warnings.append(
            f"files contain stacks of up to {headers['depth'].max()} planes: build with "
            "--project max, mean or middle"
        )
    return warnings


def _summary_table(table: SiteTable) -> Table:
    sites = table.sites
    wells = sites.drop_duplicates([PLATE, WELL])
    per_plate, per_well = wells.groupby(PLATE).size(), sites.groupby([PLATE, WELL]).size()
    rows = {
        "plates": str(sites[PLATE].nunique()),
        "wells": f"{len(wells)} ({_range(per_plate)} per plate)",
        "sites": f"{len(sites)} ({_range(per_well)} per well, {sites[SITE].nunique()} numbers)",
        "channels": ", ".join(table.channels),
        "metadata": ", ".join(name.removeprefix("Metadata_") for name in table.metadata_columns),
    }
    summary = Table(title=str(table.source), title_justify="left", show_header=False)
    summary.add_column()
    # Long names continue on the next line; without this they end in "…".
    summary.add_column(overflow="fold")
    for name, text in rows.items():
        summary.add_row(name, text)
    return summary


def _range(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return str(low) if low == high else f"{low} to {high}"


def _read_headers(table: SiteTable) -> pd.DataFrame:
    """Read the file headers of a sample of the sites.

    Returns:
        One row per plane: `channel`, `plate`, `shape` (height, width), `dtype` and `depth` (number
        of planes in its stack).
    """
    # Evenly spaced over the table, so that all plates are likely to occur.
    sample = np.unique(np.linspace(0, len(table) - 1, SAMPLE).astype(int))
    sites = table.sites.iloc[sample].to_dict("records")
    headers = []
    for site in track(sites, total=len(sites), label="Reading image headers", unit="sites"):
        planes = {channel: site[FILE + channel] for channel in table.channels}
        probes = probe_planes([p for p in planes.values() if p.file], table.where(site))
        headers += [
            (
                channel,
                site[PLATE],
                probes[plane].shape,
                probes[plane].dtype.name,
                probes[plane].depth,
            )
            for channel, plane in planes.items()
            if plane.file
        ]
    return pd.DataFrame(headers, columns=["channel", "plate", "shape", "dtype", "depth"])


def _missing(table: SiteTable, channel: str) -> pd.Series:
    return table.sites[FILE + channel].map(lambda plane: not plane.file)


def _channel_table(table: SiteTable, headers: pd.DataFrame) -> Table:
    rows = Table(title="Channels", title_justify="left")
    rows.add_column("channel", no_wrap=True, overflow="fold")
    for heading in ("files", "missing", "height x width, data type (sample)"):
        rows.add_column(heading, overflow="fold")
    for channel in table.channels:
        missing = int(_missing(table, channel).sum())
        counts = headers.loc[headers["channel"] == channel, ["shape", "dtype"]].value_counts()
        sizes = ", ".join(
            f"{height} x {width} {dtype} ({count})"
            for ((height, width), dtype), count in counts.head(4).items()
        )
        rows.add_row(
            channel,
            str(len(table) - missing),
            Text(str(missing), "red" if missing else ""),
            sizes or "-",
        )
    return rows


def _label_table(table: SiteTable, label_column: str) -> Table:
    """One row per possible label column: number of classes and size of the largest class."""
    sites = table.sites
    rows = Table(title="Possible label columns (* selected)", title_justify="left")
    # On a narrow terminal the other columns are wrapped first.
    rows.add_column("column", no_wrap=True, overflow="fold")
    for heading in ("classes", "sites per class", "wells per class", "largest class"):
        rows.add_column(heading, overflow="fold")
    identities = [column for column in IDENTITY_COLUMNS if column in sites.columns]
    columns = dict.fromkeys([label_column, *identities] if label_column else identities)
    wells = sites.drop_duplicates([PLATE, WELL])
    for column in columns:
        counts = sites[column].value_counts()
        # Fewer than two sites for each value on average: an identifier, not a class.
        if column != label_column and len(counts) * MIN_SITES_PER_CLASS > len(sites):
            continue
        largest = f"{counts.index[0] or '(empty)'}: {counts.iloc[0] / len(sites):.1%} of sites"
        name = f"* {column}" if column == label_column else f"  {column}"
        per_well = wells.groupby(column).size()
        rows.add_row(name, str(len(counts)), _spread(counts), _spread(per_well), largest)
    return rows


def _spread(counts: pd.Series) -> str:
    if counts.min() == counts.max():
        return str(counts.min())
    return f"{counts.min()} to {counts.max()}, median {counts.median():g}"


def _refuse_missing(table: SiteTable) -> None:
    missing = {
        channel: table.sites.loc[_missing(table, channel), "row"] for channel in table.channels
    }
    for channel, rows in missing.items():
        if len(rows):
            raise InputError(
                f"{table.source}, row {rows.iloc[0]}, channel {channel}: the file does not exist "
                f"({sum(map(len, missing.values()))} missing files); check --images"
            )
