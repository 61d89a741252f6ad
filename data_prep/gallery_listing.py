"""Layout of the Cell Painting Gallery, and faults of its tables.

Keys below `ACCESSION/SOURCE`:

    workspace/load_data_csv/BATCH/PLATE/load_data.csv[.gz]
    workspace/metadata/platemaps/BATCH/barcode_platemap.csv          plate → name of its plate map
    workspace/metadata/platemaps/BATCH/platemap/NAME.txt             well → treatment
    workspace/metadata/external_metadata/….tsv                       broad_sample → compound
    images/BATCH/images/FULL_PLATE_NAME/….tiff                       named by load_data.csv
    images/BATCH/illum/PLATE/PLATE_Illum<CHANNEL>.npy

Source: https://broadinstitute.github.io/cellpainting-gallery/data_structure.html

Plates of JUMP's production data (cpg0016) have no plate maps in the gallery; `well.csv.gz` and
related tables in JUMP's repository list their treatments (jump-cellpainting/datasets#175).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pandas as pd

from perturbjax.core.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, WELL, normalize_well

GALLERY = "https://cellpainting-gallery.s3.amazonaws.com"
JUMP_METADATA = "https://raw.githubusercontent.com/jump-cellpainting/datasets/main/metadata"
#: Accession with plate maps in JUMP's repository, and its tables of wells, compounds and controls.
IN_JUMP_METADATA = "cpg0016-jump"
JUMP_TABLES = ("well.csv.gz", "compound.csv.gz", "perturbation_control.csv")
JUMP_ID = "Metadata_JCP2022"
#: Number of an accession → full name, default source, default batch.
ACCESSIONS: dict[str, tuple[str, str, str]] = {
    "cpg0000": ("cpg0000-jump-pilot", "source_4", "2020_11_04_CPJUMP1"),
    "cpg0001": ("cpg0001-cellpainting-protocol", "source_4", ""),
    "cpg0002": ("cpg0002-jump-scope", "source_4", ""),
    "cpg0012": ("cpg0012-wawer-bioactivecompoundprofiling", "broad", ""),
    "cpg0016": (IN_JUMP_METADATA, "", ""),
}
#: Channels of cpg0016 in the order of their numbers, for sources on which both catalogs of JUMP
#: agree (jump-cellpainting/datasets#164, and its channel_mapping.csv, which was withdrawn).
ORDERS = {
    **dict.fromkeys(
        ("source_2", "source_5", "source_6", "source_10"), ("DNA", "ER", "RNA", "AGP", "Mito")
    ),
    **dict.fromkeys(("source_3", "source_4", "source_8"), ("Mito", "AGP", "RNA", "ER", "DNA")),
    "source_9": ("ER", "Mito", "AGP", "DNA", "RNA"),
}
#: Channel number in file names of Opera Phenix (`-ch5sk1`), CV8000 (`…A01Z01C05.tif`) and
#: ImageXpress (`_w5…`).
NUMBER = re.compile(r"-ch(\d+)sk|C(\d\d)\.tiff?$|_w(\d)")
#: In cpg0012 the table names one file for AGP and Mito (jump-cellpainting/datasets#33). These are
#: the channel numbers in the names of the correct files.
CPG0012 = {"AGP": "4", "Mito": "5"}


def full_names(accession: str, source: str, batch: str) -> tuple[str, str, str]:
    """Return the full names of accession, source and batch; defaults replace empty values.

    Raises:
        InputError: The source or batch is required.
    """
    defaults = next(
        (names for key, names in ACCESSIONS.items() if accession in (key, names[0])),
        (accession, "broad", ""),
    )
    names = (defaults[0], source or defaults[1], batch or defaults[2])
    for flag, name in zip(("accession", "source", "batch"), names, strict=True):
        if not name:
            raise InputError(
                f"--{flag}: is required for {accession}; its folders are listed at "
                f"{GALLERY}/index.html"
            )
    return names


def jump_perturbations(
    folder: Path, sites: pd.DataFrame, source: str
) -> tuple[pd.DataFrame, list[str]]:
    """Join the treatments of JUMP's tables to sites of cpg0016.

    Some wells with images are in no table (jump-cellpainting/datasets#24 and #75).

    Args:
        folder: Folder of `JUMP_TABLES`.
        sites: Sites of one plate.
        source: Imaging site, such as source_4.

    Returns:
        Sites with treatments, and the names of wells that are in no table.

    Raises:
        InputError: A table is damaged, or has no well of the plate.
    """
    wells, compounds, controls = (read_table(folder / name) for name in JUMP_TABLES)
    for table, name, columns in (
        (wells, JUMP_TABLES[0], ("Metadata_Source", PLATE, WELL, JUMP_ID)),
        (compounds, JUMP_TABLES[1], (JUMP_ID,)),
        (controls, JUMP_TABLES[2], (JUMP_ID,)),
    ):
        require_columns(table, folder / name, columns)
    plate = sites[PLATE].iloc[0]
    wells = wells[(wells["Metadata_Source"] == source) & (wells[PLATE] == plate)]
    if wells.empty:
        raise InputError(
            f"--plate {plate}: {JUMP_TABLES[0]} of JUMP lists no well of this plate in {source}"
        )
    wells = wells.assign(**{WELL: wells[WELL].map(normalize_well)})
    # Duplicate rows of a well would multiply its sites in the merge below.
    treatments = wells[[WELL, JUMP_ID]].drop_duplicates(WELL)
    for table in (compounds, controls):
        treatments = treatments.merge(table.drop_duplicates(JUMP_ID), on=JUMP_ID, how="left")
    treatments = treatments.fillna("").rename(columns={"Metadata_Name": "Metadata_pert_iname"})
    name = treatments["Metadata_pert_iname"]
    # Only controls have a name in these tables; compounds get their JUMP number as label.
    treatments["Metadata_pert_iname"] = name.where(name != "", treatments[JUMP_ID])
    unknown = sorted(set(sites[WELL]) - set(treatments[WELL]))
    sites = sites[~sites[WELL].isin(unknown)]
    replaced = [name for name in treatments.columns if name in sites.columns and name != WELL]
    sites = sites.drop(columns=replaced)
    return sites.merge(treatments, on=WELL, how="left", validate="many_to_one"), unknown


def require_columns(table: pd.DataFrame, path: Path, columns: Iterable[str]) -> None:
    """Raise InputError if a downloaded table lacks a column."""
    for column in columns:
        if column not in table.columns:
            raise InputError(f"{path}: column {column} is missing; delete the file and try again")


def find_duplicates(names: dict[str, pd.Series]) -> tuple[str, str] | None:
    """Return two channels that name the same file in some site, or None."""
    for first, second in combinations(names, 2):
        if (names[first] == names[second]).any():
            return first, second
    return None


def find_cpg0012_file(name: str, channel: str, files: Iterable[str]) -> str | None:
    """Return the correct file of AGP or Mito in cpg0012, where the table names one file for both.

    File names differ in the channel number after `_w` and in a random suffix, so that only a
    listing of the folder identifies them.

    Args:
        name: File name in the table.
        channel: AGP or Mito.
        files: Names of the files in the folder.
    """
    match = re.fullmatch(r"(.*_w)\d(.*)", name)
    if match is None or channel not in CPG0012:
        return None
    # The random suffix is unknown, so files are matched by the part before it.
    candidates = [file for file in files if file.startswith(match[1] + CPG0012[channel])]
    return candidates[0] if len(candidates) == 1 else None


def order_note(source: str, names: dict[str, pd.Series]) -> str:
    """Compare channel numbers in file names with JUMP's catalog; return a warning or ""."""
    order, wrong = ORDERS.get(source, ()), []
    for channel, files in names.items():
        matches = filter(None, map(NUMBER.search, files))
        # Each microscope has a separate group in the pattern; only one of them matches.
        numbers = {int(next(filter(None, match.groups()))) for match in matches}
        if channel in order and numbers and numbers != {order.index(channel) + 1}:
            listed = ", ".join(map(str, sorted(numbers)))
            wrong.append(f"{channel} is {listed}, not {order.index(channel) + 1}")
    if not wrong:
        return ""
    return (
        f"channel numbers of this plate differ from JUMP's catalog of {source} "
        f"({'; '.join(wrong)}); the channel names of load_data.csv are used: check the preview"
    )
