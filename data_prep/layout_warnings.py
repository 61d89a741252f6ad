"""Warnings about plate layouts, labels and bit depths that make scores misleading."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from perturbjax.core.plates import COMPOUND_COLUMNS, PLATE, WELL, shared_layouts
from perturbjax.core.position import position_warnings

#: Columns with the dose of a treatment.
DOSE_COLUMN = re.compile(r"^Metadata_.*(dose|concentration)", re.IGNORECASE)


def layout_warnings(sites: pd.DataFrame, label_column: str) -> list[str]:
    """List all properties of layout and labels that make scores misleading.

    Args:
        sites: One row per site with `Metadata_Plate`, `Metadata_Well` and the label.
        label_column: Column to predict.

    Returns:
        One message per problem.
    """
    wells = sites.drop_duplicates([PLATE, WELL])
    return [
        *_class_warnings(sites, wells, label_column),
        *_shared_layout_warnings(wells, label_column),
        *design_warnings(sites, label_column),
    ]


def design_warnings(sites: pd.DataFrame, label_column: str) -> list[str]:
    """List confounding of label or dose and well position, and labels that differ by case only."""
    return [
        *position_warnings(sites, label_column),
        *_dose_warnings(sites, label_column),
        *_case_warnings(sites, label_column),
    ]


def _dose_warnings(sites: pd.DataFrame, label_column: str) -> list[str]:
    """Warn if the position predicts the dose of the treated wells."""
    doses = [name for name in sites.columns if DOSE_COLUMN.search(name) and name != label_column]
    return [
        warning
        for dose in doses
        # Wells without a dose are controls, which are not part of a dose series.
        for warning in position_warnings(sites[~sites[dose].isin(["", "0", "0.0"])], dose)
    ]


def _class_warnings(sites: pd.DataFrame, wells: pd.DataFrame, label_column: str) -> list[str]:
    messages = []
    per_class = wells.groupby(label_column).size()
    if len(per_class) == 1:
        messages.append(f"{label_column} has only one class; there is nothing to predict")
    single = int((per_class == 1).sum())
    # More than half of the classes.
    if single * 2 > len(per_class):
        messages.append(
            f"{single} of {len(per_class)} classes of {label_column} occur in one well only: a "
            "split by site then recognizes wells instead of treatments, and a split by well "
            "cannot evaluate these classes"
        )
    fractions = sites[label_column].value_counts(normalize=True)
    if fractions.iloc[0] >= 1 / 3:
        messages.append(
            f"{fractions.index[0]} is the label of {fractions.iloc[0]:.1%} of all sites; a "
            "constant prediction reaches this accuracy. Use balanced accuracy"
        )
    return messages


def _shared_layout_warnings(wells: pd.DataFrame, label_column: str) -> list[str]:
    messages = []
    positions = wells.groupby(label_column)[WELL].nunique()
    plates = wells.groupby(label_column)[PLATE].nunique()
    # Classes with several plates but only one well position.
    fixed = int(((positions == 1) & (plates > 1)).sum())
    if fixed * 2 > len(positions):
        messages.append(
            f"{fixed} of {len(positions)} classes of {label_column} are in the same well on every "
            "plate: treatment and position effects cannot be distinguished"
        )
    for group in shared_layouts(wells) if set(COMPOUND_COLUMNS) & set(wells.columns) else []:
        names = ", ".join(group[:4]) + (" …" if len(group) > 4 else "")
        # A split by layout needs another layout.
        advice = (
            "split by layout, not by plate"
            if len(group) < wells[PLATE].nunique()
            else "a score on a held-out plate includes position effects"
        )
        messages.append(f"{len(group)} plates share one layout ({names}): {advice}")
    return messages


def _case_warnings(sites: pd.DataFrame, label_column: str) -> list[str]:
    labels = pd.Series(sites[label_column].unique())
    groups = [sorted(group) for _, group in labels.groupby(labels.str.casefold()) if len(group) > 1]
    return [
        f"{label_column}: {', '.join(group)} differ only in upper and lower case, and are separate "
        "classes; use one spelling in the table"
        for group in groups
    ]


def bit_depth_warnings(plates: Iterable[str], dtypes: Iterable[str], images: str) -> list[str]:
    """Warn if 8-bit and 16-bit images are mixed.

    Args:
        plates: Plate of each image.
        dtypes: Name of the data type of each image.
        images: Description of the images, start of the message.
    """
    table = pd.DataFrame({"plate": list(plates), "dtype": list(dtypes)}).drop_duplicates()
    if table["dtype"].nunique() < 2:
        return []
    parts = [
        f"{dtype} on plate {rows['plate'].iloc[0]}" + (" and more" if len(rows) > 1 else "")
        for dtype, rows in table.groupby("dtype")
    ]
    return [
        f"{images} have different data types ({', '.join(parts)}), so their intensities are not "
        "comparable; export all images with the same bit depth, or build the plates separately"
    ]
