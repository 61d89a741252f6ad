"""What the Cell Painting Gallery holds and where, and what is known to be wrong there.

The layout (its documentation: https://broadinstitute.github.io/cellpainting-gallery/data_structure.html), below
`ACCESSION/SOURCE`:

    workspace/load_data_csv/BATCH/PLATE/load_data.csv[.gz]
    workspace/metadata/platemaps/BATCH/barcode_platemap.csv          plate → name of its platemap
    workspace/metadata/platemaps/BATCH/platemap/NAME.txt             well → what it got
    workspace/metadata/external_metadata/….tsv                       broad_sample → compound
    images/BATCH/images/FULL_PLATE_NAME/….tiff                       named by the load_data.csv
    images/BATCH/illum/PLATE/PLATE_Illum<CHANNEL>.npy

JUMP's production data (cpg0016) have no platemaps there: `well.csv.gz` and its neighbours in JUMP's repository say what
each well got (jump-cellpainting/datasets#175).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from data_prep.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, WELL, normalize_well

GALLERY = "https://cellpainting-gallery.s3.amazonaws.com"
JUMP_METADATA = "https://raw.githubusercontent.com/jump-cellpainting/datasets/main/metadata"
#: Accessions whose platemaps lie in JUMP's repository, and what of it tells of wells, perturbations and controls.
IN_JUMP_METADATA = "cpg0016-jump"
JUMP_TABLES = ("well.csv.gz", "compound.csv.gz", "perturbation_control.csv")
JUMP_ID = "Metadata_JCP2022"
#: Accessions by their number, the source that is taken where none is named, and the batch.
ACCESSIONS: dict[str, tuple[str, str, str]] = {
    "cpg0000": ("cpg0000-jump-pilot", "source_4", "2020_11_04_CPJUMP1"),
    "cpg0001": ("cpg0001-cellpainting-protocol", "source_4", ""),
    "cpg0002": ("cpg0002-jump-scope", "source_4", ""),
    "cpg0012": ("cpg0012-wawer-bioactivecompoundprofiling", "broad", ""),
    "cpg0016": (IN_JUMP_METADATA, "", ""),
}
#: Channels in the order in which microscopes of cpg0016 number them, of the sources on which both of JUMP's catalogues
#: agree (jump-cellpainting/datasets#164, and its channel_mapping.csv, which was withdrawn).
ORDERS = {
    **dict.fromkeys(
        ("source_2", "source_5", "source_6", "source_10"), ("DNA", "ER", "RNA", "AGP", "Mito")
    ),
    **dict.fromkeys(("source_3", "source_4", "source_8"), ("Mito", "AGP", "RNA", "ER", "DNA")),
    "source_9": ("ER", "Mito", "AGP", "DNA", "RNA"),
}
#: Number of the channel in names of Opera Phenix (`-ch5sk1`), CV8000 (`…A01Z01C05.tif`) and ImageXpress (`_w5…`).
NUMBER = re.compile(r"-ch(\d+)sk|C(\d\d)\.tiff?$|_w(\d)")
#: In cpg0012 AGP and Mito name one file (jump-cellpainting/datasets#33): the numbers that their files have.
CPG0012 = {"AGP": "4", "Mito": "5"}


def named(accession: str, source: str, batch: str) -> tuple[str, str, str]:
    """Full names of accession, source and batch, with what is taken where nothing is said.

    Raises:
        InputError: source or batch must be named.
    """
    known = next(
        (names for key, names in ACCESSIONS.items() if accession in (key, names[0])),
        (accession, "broad", ""),
    )
    found = (known[0], source or known[1], batch or known[2])
    for flag, name in zip(("accession", "source", "batch"), found, strict=True):
        if not name:
            raise InputError(
                f"--{flag}: say which of {accession}; its folders are listed at {GALLERY}/index.html"
            )
    return found


def jump_perturbations(
    folder: Path, sites: pd.DataFrame, source: str
) -> tuple[pd.DataFrame, list[str]]:
    """Sites of cpg0016 with what JUMP's tables say of their wells, and the wells of which they say nothing.

    Some wells have images and stand in no table (jump-cellpainting/datasets#24 and #75): those are given back by name.

    Raises:
        InputError: a table is damaged, or knows no well of the plate.
    """
    wells, compounds, controls = (read_table(folder / name) for name in JUMP_TABLES)
    for table, name, columns in (
        (wells, JUMP_TABLES[0], ("Metadata_Source", PLATE, WELL, JUMP_ID)),
        (compounds, JUMP_TABLES[1], (JUMP_ID,)),
        (controls, JUMP_TABLES[2], (JUMP_ID,)),
    ):
        for column in columns:
            if column not in table.columns:
                raise InputError(
                    f"{folder / name}: column {column} is missing; delete the file and try again"
                )
    plate = sites[PLATE].iloc[0]
    wells = wells[(wells["Metadata_Source"] == source) & (wells[PLATE] == plate)]
    if wells.empty:
        raise InputError(
            f"--plate {plate}: {JUMP_TABLES[0]} of JUMP knows no well of it in {source}"
        )
    told = wells.assign(**{WELL: wells[WELL].map(normalize_well)})[[WELL, JUMP_ID]].drop_duplicates(
        WELL
    )
    for table in (compounds, controls):
        told = told.merge(table.drop_duplicates(JUMP_ID), on=JUMP_ID, how="left")
    told = told.fillna("").rename(columns={"Metadata_Name": "Metadata_pert_iname"})
    told["Metadata_pert_iname"] = told["Metadata_pert_iname"].where(
        told["Metadata_pert_iname"] != "", told[JUMP_ID]
    )
    unknown = sorted(set(sites[WELL]) - set(told[WELL]))
    kept = sites[~sites[WELL].isin(unknown)]
    replaced = [column for column in told.columns if column in kept.columns and column != WELL]
    return kept.drop(columns=replaced).merge(
        told, on=WELL, how="left", validate="many_to_one"
    ), unknown


def twins(names: dict[str, pd.Series]) -> tuple[str, str] | None:
    """Two channels that name the same file in some site, if there are."""
    channels = list(names)
    for at, first in enumerate(channels):
        for second in channels[at + 1 :]:
            if (names[first] == names[second]).any():
                return first, second
    return None


def untwinned(name: str, channel: str, listed: Iterable[str]) -> str | None:
    """The file of AGP or of Mito in cpg0012, among what is listed, where the table gives one name to both.

    Their names differ in the number after `_w` and in a random end, so that only the folder's list can tell.
    """
    found = re.fullmatch(r"(.*_w)\d(.*)", name)
    if found is None or channel not in CPG0012:
        return None
    candidates = [one for one in listed if one.startswith(found[1] + CPG0012[channel])]
    return candidates[0] if len(candidates) == 1 else None


def order_note(source: str, names: dict[str, pd.Series]) -> str:
    """A sentence where file names number channels otherwise than JUMP's catalogues say; else empty."""
    order, wrong = ORDERS.get(source, ()), []
    for channel, files in names.items():
        numbers = {
            next(filter(None, found.groups())) for name in files if (found := NUMBER.search(name))
        }
        if (
            channel in order
            and numbers
            and {int(number) for number in numbers} != {order.index(channel) + 1}
        ):
            wrong.append(
                f"{channel} is {', '.join(sorted(numbers))} and not {order.index(channel) + 1}"
            )
    if not wrong:
        return ""
    return (
        f"channels of this plate are numbered otherwise than JUMP's catalogue of {source} says ({'; '.join(wrong)}); "
        "the names in load_data.csv are followed: look at the preview"
    )
