"""`perturbjax table`: write load_data.csv from a folder of images and a plate map.

The steps are: recognize the images (`layouts`), choose one focal plane and the only time point,
name the channels, list the sites that have an image of every channel, join the plate map, and write
the table.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
from rich.table import Table

from data_prep.inspection import PLAIN_WIDTH
from data_prep.layouts import LAYOUTS, Recognized, recognize
from data_prep.layouts.file_names import ImageFile
from data_prep.platemap import in_platemap, join_platemap
from data_prep.platemap_files import TREATMENT, read_platemap
from data_prep.site_table import LABEL_COLUMNS, NO_LABEL
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import PlainConsole, console
from perturbjax.core.options import names_in, require_output, require_sound
from perturbjax.core.plates import (
    COMPOUND,
    CONTROL_TYPE,
    NEGATIVE,
    PLATE,
    SITE,
    SOLVENT,
    VEHICLES,
    WELL,
)

if TYPE_CHECKING:
    LayoutChoice = str
else:  # the names of layouts come from their table alone
    LayoutChoice = Literal["auto", *LAYOUTS]
#: Number of rows of the table that are printed, and of examples in messages.
_HEAD, _EXAMPLES = 5, 3


@dataclass(frozen=True)
class TableConfig:
    """Write load_data.csv from a folder of images and a plate map."""

    images: Path
    """Folder of the images, with one or several plates."""
    out: Path
    """Table to write (.csv), for inspect and build."""
    platemap: Path | None = None
    """Plate map: CSV, TSV or XLSX with columns well, compound, ... or in the shape of the plate."""
    layout: LayoutChoice = "auto"
    """Microscope: phenix, imagexpress, cv8000, scanr, incucyte, cellomics or incell; auto: the one
    with the most matching file names."""
    pattern: str = ""
    """File names in place of --layout: {plate}_{well}_s{site}_w{channel}.tif; also {row}, {column},
    {z}, {time}, * and folders."""
    channels: str = ""
    """Channels to use, renamed: DNA=1,AGP=2. By default all, named by the microscope, or Ch1."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".csv")


def make_table(options: TableConfig) -> pd.DataFrame:
    """Write load_data.csv; print the recognized fields, the first rows and the next command.

    Returns:
        The table: `Metadata_Plate`, `Metadata_Well`, `Metadata_Site`, the columns of the plate map
        as `Metadata_*`, and `FileName_Orig<CHANNEL>` and `PathName_Orig<CHANNEL>` (relative to the
        images folder) for each channel.

    Raises:
        InputError: The images are not recognized, several images have one position, no site is
            complete, or the plate map does not fit.
    """
    recognized = recognize(options.images, options.layout, options.pattern)
    images = pd.DataFrame(
        [tuple(vars(image).values()) for image in recognized.images],
        columns=[field.name for field in fields(ImageFile)],
    )
    _refuse_duplicates(images)
    _require_one_time(images, recognized)
    images = _name_channels(_choose_plane(images, recognized), options.channels)
    channels = _channel_order(images, options.channels)
    table, incomplete = _site_rows(images, channels)
    if options.platemap is not None:
        table = _join_treatments(table, options.platemap)
    table = table.drop(columns="row").reset_index(drop=True)
    with atomic(options.out) as temporary:
        table.to_csv(temporary, index=False)
    _print_summary(options, recognized, images, table, incomplete)
    return table


def _require_one_time(images: pd.DataFrame, recognized: Recognized) -> None:
    times = sorted(images["time"].unique())
    if len(times) > 1:
        row = images[images["time"] == times[-1]].iloc[0]
        example = recognized.pattern_with_fixed("time", ImageFile(**row))
        raise InputError(
            f"the images have {len(times)} time points ({times[0]} to {times[-1]}), but a site has "
            f"one. Choose it by --pattern, for example --pattern {shlex.quote(example)}, with the "
            "folder of the time point in front if the name does not contain it"
        )


def _choose_plane(images: pd.DataFrame, recognized: Recognized) -> pd.DataFrame:
    """Use the middle focal plane of each site and channel; of an even number, the upper one."""
    if images["z"].nunique() == 1:
        return images
    key = ["plate", "well", "site", "channel"]
    numbers = images.assign(number=pd.to_numeric(images["z"]))
    numbers = numbers.sort_values([*key, "number"], kind="stable")
    groups = numbers.groupby(key, sort=False)
    chosen = groups.cumcount() == groups["number"].transform("size") // 2
    example = recognized.pattern_with_fixed("z", ImageFile(**images.iloc[0]))
    console.print(
        f"info: the images have {images['z'].nunique()} focal planes; the middle one of each site "
        f"is used. Choose another one by --pattern, for example --pattern {shlex.quote(example)}"
    )
    return images[chosen.reindex(images.index)]


def _name_channels(images: pd.DataFrame, requested: str) -> pd.DataFrame:
    """Add the column `name` and leave out channels that are not requested.

    Names come from the metadata, from the file names, or are `Ch` and the number. Characters that
    are inconvenient on a command line become `_`.
    """
    words = images["channel_name"].where(images["channel_name"] != "", images["channel"])
    numbers = words.str.isdecimal()
    names = words.str.replace(r"[^A-Za-z0-9.+-]+", "_", regex=True).str.strip("_")
    names = names.where(~numbers, "Ch" + words)
    # One name for two channels of a plate, such as two brightfield images.
    several = images.groupby([images["plate"], names])["channel"].transform("nunique") > 1
    names = names.mask(several, names + "_Ch" + images["channel"])
    images = images.assign(name=names)
    if not requested:
        return images
    chosen = {}
    for entry in names_in(requested):
        name, _, key = entry.rpartition("=")
        keys = images["channel"].eq(key) | names.eq(key) | images["channel_name"].eq(key)
        if not keys.any():
            pairs = images[["channel", "name"]].drop_duplicates().sort_values("channel")
            channels = ", ".join(
                f"{row.name}={row.channel}" for row in pairs.itertuples(index=False)
            )
            raise InputError(f"--channels {entry}: no channel {key}; the images have {channels}")
        if name in chosen:
            raise InputError(f"--channels {requested}: two channels have the name {name}")
        chosen[name or images.loc[keys, "name"].iloc[0]] = keys
    parts = [images[keys].assign(name=name) for name, keys in chosen.items()]
    return pd.concat(parts, ignore_index=True)


def _channel_order(images: pd.DataFrame, requested: str) -> list[str]:
    """Channels as requested, or by their numbers in the file names."""
    firsts = images.drop_duplicates("name")
    if not requested and firsts["channel"].str.isdecimal().all():
        firsts = firsts.iloc[firsts["channel"].astype(int).argsort(kind="stable")]
    return list(firsts["name"])


def _refuse_duplicates(images: pd.DataFrame) -> None:
    key = ["plate", "well", "site", "channel", "z", "time"]
    repeated = images[images.duplicated(key, keep=False)]
    if not len(repeated):
        return
    first = repeated.iloc[0]
    same = repeated[(repeated[key] == first[key]).all(axis=1)]["path"]
    raise InputError(
        f"{same.iloc[0]} and {same.iloc[1]} are both plate {first['plate']}, well {first['well']}, "
        f"site {first['site']}, channel {first['channel']} ({len(repeated):,} such images). Pass "
        "--images with the folder of one of them, or --pattern with a folder as {plate}/..."
    )


def _site_rows(images: pd.DataFrame, channels: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per complete site, and the sites without an image of some channel."""
    position = ["plate", "well", "site"]
    paths = images.pivot(index=position, columns="name", values="path")[channels]
    paths = paths.sort_index(key=lambda level: pd.Index([_natural(text) for text in level]))
    is_complete = paths.notna().all(axis=1)
    if not is_complete.any():
        counts = ", ".join(f"{name}: {count}" for name, count in paths.notna().sum().items())
        raise InputError(
            f"no site has an image of every channel (sites: {counts}); choose channels by "
            "--channels"
        )
    complete = paths[is_complete]
    table = complete.index.to_frame(index=False)
    table.columns = pd.Index([PLATE, WELL, SITE])
    table.insert(0, "row", range(2, 2 + len(table)))
    for channel in channels:
        parts = complete[channel].str.rpartition("/")
        table[f"FileName_Orig{channel}"] = parts[2].to_numpy()
        table[f"PathName_Orig{channel}"] = parts[0].mask(parts[0] == "", ".").to_numpy()
    return table, paths[~is_complete]


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sort key with numbers by value: site 2 comes before site 10."""
    parts = re.split(r"(\d+)", str(text))
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts if part)


def _join_treatments(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Join the plate map; leave out wells that it does not list or that have no treatment."""
    platemap = read_platemap(path)
    if TREATMENT in platemap.columns:
        platemap = platemap[platemap[TREATMENT] != ""]
    listed = in_platemap(table, platemap)
    if listed.any() and not listed.all():
        absent = table[~listed].drop_duplicates([PLATE, WELL])
        wells = ", ".join(absent[WELL].head(_EXAMPLES))
        console.print(
            f"warning: {path}: {int((~listed).sum())} sites of {len(absent)} wells have no "
            "treatment in the plate map and are left out "
            f"({wells}{', ...' if len(absent) > _EXAMPLES else ''})"
        )
        table = table[listed]
    table = join_platemap(table, platemap, path, None)
    # Descriptions of the site in front of the file names.
    metadata = [name for name in table.columns if name.startswith("Metadata_")]
    return table[[*metadata, *(name for name in table.columns if name not in metadata)]]


def _print_summary(
    options: TableConfig,
    recognized: Recognized,
    images: pd.DataFrame,
    table: pd.DataFrame,
    incomplete: pd.DataFrame,
) -> None:
    """Print what was recognized, the first rows of the table and the next command."""
    out = PlainConsole()
    if not out.is_terminal:
        out.width = PLAIN_WIDTH
    for name, text in _summary(recognized, images, table, incomplete).items():
        out.print(f"{name:11}{text}")
    files = [name for name in table.columns if name.startswith("FileName_")]
    columns = [*(name for name in table.columns if name.startswith("Metadata_")), files[0]]
    title = f"First rows of {options.out}, 1 of {len(files)} channels"
    rows = Table(title=title, title_justify="left")
    for name in columns:
        rows.add_column(name.removeprefix("Metadata_"), overflow="fold")
    for row in table[columns].head(_HEAD).itertuples(index=False):
        rows.add_row(*map(str, row))
    out.print(rows)
    words = ["--load-data", str(options.out), "--images", str(options.images)]
    if not any(name in table.columns for name in LABEL_COLUMNS):
        words += ["--label-column", NO_LABEL]
    out.print(f"Next step: {shlex.join(['perturbjax', 'inspect', *words])}")


def _summary(
    recognized: Recognized, images: pd.DataFrame, table: pd.DataFrame, incomplete: pd.DataFrame
) -> dict[str, str]:
    plates = list(table[PLATE].unique())
    wells = table.drop_duplicates([PLATE, WELL])
    pairs = images.drop_duplicates(["channel", "name"])
    names = [
        name if name == f"Ch{key}" or name == key else f"{name} ({key})"
        for key, name in zip(pairs["channel"], pairs["name"], strict=True)
    ]
    lines = {
        "layout": f"{recognized.title}, {len(recognized.images):,} images",
        "plates": f"{len(plates)}: {_some(plates)}",
        "wells": f"{len(wells)} ({_range(wells.groupby(PLATE).size())} per plate)",
        "sites": f"{len(table)} ({_range(table.groupby([PLATE, WELL]).size())} per well)",
        "channels": ", ".join(names),
    }
    if COMPOUND in table.columns:
        counts = wells[COMPOUND].value_counts()
        texts = [f"{name} ({count} wells)" for name, count in counts.items()]
        lines |= {"treatments": f"{len(counts)}: {_some(texts)}", "controls": _controls(wells)}
    elif not any(name in table.columns for name in LABEL_COLUMNS):
        lines["treatments"] = "none; add them with --platemap to train and evaluate"
    lines["missing"] = _missing(recognized, incomplete)
    if recognized.unmatched:
        lines["ignored"] = (
            f"{len(recognized.unmatched):,} images with other names: {_some(recognized.unmatched)}"
        )
    for number, note in enumerate(recognized.notes, 1):
        lines[f"note {number}"] = note
    return lines


def _controls(wells: pd.DataFrame) -> str:
    """Describe the negative controls by the rule of `evaluation.negative_controls`."""
    marked = wells.get(CONTROL_TYPE, pd.Series("", wells.index)) == NEGATIVE
    if not marked.any():
        marked = wells[COMPOUND].str.lower().isin(VEHICLES)
    if not marked.any():
        return f"no negative control wells; name them {SOLVENT} in the plate map"
    names = sorted(wells.loc[marked, COMPOUND].unique())
    return f"{marked.sum()} negative control wells ({_some(names)})"


def _missing(recognized: Recognized, incomplete: pd.DataFrame) -> str:
    parts = []
    if recognized.absent:
        parts.append(
            f"{len(recognized.absent):,} images that the metadata list do not exist "
            f"({_some(recognized.absent)})"
        )
    if len(incomplete):
        plate, well, site = incomplete.index[0]
        absent = incomplete.columns[incomplete.isna().iloc[0]]
        parts.append(
            f"{len(incomplete):,} sites without an image of some channel are left out (plate "
            f"{plate}, well {well}, site {site}: no {', '.join(absent)})"
        )
    return "; ".join(parts) or "none"


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:_EXAMPLES]) + (", ..." if len(texts) > _EXAMPLES else "")


def _range(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return str(low) if low == high else f"{low} to {high}"
