"""The wells of a screen: profiles, plates, treatments, doses and negative controls."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from sklearn.decomposition import PCA

from perturbjax.core.errors import InputError
from perturbjax.core.plates import CONTROL_TYPE, PLATE
from perturbjax.evaluation.negative_controls import negative_controls

#: Value of `CONTROL_TYPE` that marks positive controls.
POSITIVE = "poscon"
#: Factor from the median absolute deviation to the standard deviation of a normal distribution.
SD_PER_MAD = 1.4826
#: Scaled values are cut off at this many standard deviations, so that single wells do not dominate.
CLIP = 10.0
#: Principal components kept; MorphoHELM (arXiv 2605.15383) uses 64.
COMPONENTS = 64
#: Index and profile columns that hold the number of cells of a well.
COUNT_COLUMNS = ("n_cells", "Metadata_Count_Cells", "Cells_Number_Object_Number", "Count_Cells")


@dataclass(frozen=True)
class Wells:
    """Well profiles of a screen.

    Attributes:
        metadata: one row per well with `Metadata_Plate`, `Metadata_Well` and further columns, as
        text. values: profiles, one row per well, NaN where a value is missing.
        features: names of the columns of `values`.
        treatment: name of the treatment of each well.
        control: negative control wells.
        positive: positive control wells.
        cell_count: number of cells of each well, or None if the table does not say.
        compound: treatment of each well without its dose; None if treatments have no dose.
    """

    metadata: pd.DataFrame
    values: Float[np.ndarray, "n d"]
    features: tuple[str, ...]
    treatment: pd.Series
    control: Bool[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    cell_count: Float[np.ndarray, " n"] | None
    compound: pd.Series | None = None

    @property
    def compounds(self) -> pd.Series:
        """Compound of each well: the treatment without its dose."""
        return self.treatment if self.compound is None else self.compound

    @property
    def plates(self) -> Int[np.ndarray, " n"]:
        """Plate number of each well."""
        return pd.factorize(self.metadata[PLATE])[0]


def find_controls(
    metadata: pd.DataFrame, label_column: str, control: str = ""
) -> Bool[np.ndarray, " n"]:
    """Find the negative control wells.

    Args:
        metadata: one row per well.
        label_column: column with the name of the treatment.
        control: `COLUMN=VALUE`, see `negative_controls`.

    Raises:
        InputError: no well is a negative control; the message says how to name one.
    """
    marked = negative_controls(metadata, label_column, control)
    if marked.any():
        return marked
    raise InputError(
        "--negcon: no well is a negative control. Name them as COLUMN=VALUE, for example "
        "Metadata_pert_iname=DMSO."
    )


def find_positive_controls(metadata: pd.DataFrame, poscon: str = "") -> Bool[np.ndarray, " n"]:
    """Find the positive control wells.

    Args:
        metadata: one row per well.
        poscon: `COLUMN=VALUE`; by default values of `Metadata_control_type` that start with poscon.

    Raises:
        InputError: `poscon` is given and no well matches.
    """
    column, _, value = poscon.partition("=")
    if not poscon:
        if CONTROL_TYPE not in metadata.columns:
            return np.zeros(len(metadata), dtype=bool)
        return metadata[CONTROL_TYPE].str.startswith(POSITIVE).to_numpy(dtype=bool)
    if column not in metadata.columns or not (marked := (metadata[column] == value)).any():
        raise InputError(
            f"--poscon {poscon}: no well matches. Pass COLUMN=VALUE of a metadata column."
        )
    return marked.to_numpy()


def treatment_values(wells: Wells, column: str, rows: Bool[np.ndarray, " n"]) -> dict[str, str]:
    """Return the value of a metadata column for each treatment; of several values the last.

    Args:
        wells: wells of a screen.
        column: metadata column.
        rows: wells to read.
    """
    return dict(zip(wells.treatment[rows], wells.metadata[column][rows], strict=True))


def scale_to_controls(wells: Wells) -> Float[np.ndarray, "n d"]:
    """Features relative to the control median of the plate, in robust standard deviations.

    The standard deviation is that of the controls within plates. A plate without controls is
    centered on the median of all its wells.

    Args:
        wells: wells of a screen.
    """
    values, plates = wells.values.astype(float), wells.plates
    centered = np.empty_like(values)
    with warnings.catch_warnings():
        # Features that are missing on a whole plate stay missing.
        warnings.simplefilter("ignore", RuntimeWarning)
        for plate in np.unique(plates):
            rows = plates == plate
            reference = rows & wells.control
            own = values[reference if reference.any() else rows]
            centered[rows] = values[rows] - column_medians(own)
        spread = SD_PER_MAD * column_medians(np.abs(centered[wells.control]))
        spread = np.where(spread > 0, spread, np.nanstd(centered[wells.control], axis=0))
        # Controls without spread: use that of all wells.
        spread = np.where(spread > 0, spread, np.nanstd(centered, axis=0))
    return centered / np.where(spread > 0, spread, 1)


def column_medians(values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """Median of each column without missing values; NaN for a column without values.

    `np.median` is several times faster than `np.nanmedian`, so only columns with missing values use
    the latter.

    Args:
        values: may contain NaN.
    """
    missing = np.isnan(values).any(axis=0)
    medians = np.empty(values.shape[1])
    medians[~missing] = np.median(values[:, ~missing], axis=0)
    if missing.any():
        medians[missing] = np.nanmedian(values[:, missing], axis=0)
    return medians


def reduce_profiles(
    values: Float[np.ndarray, "n d"], plates: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n k"]:
    """Scale and reduce profiles without using any label.

    Missing values become the plate's median; features missing in over half of the wells or without
    spread are dropped. Each feature is centered on the median of its plate, divided by 1.4826 times
    its median absolute deviation over all wells, and cut off at 10. At most 64 principal
    components are kept.

    Args:
        values: one row per well; infinite values count as missing.
        plates: plate number of each well.

    Raises:
        InputError: no feature varies.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    values = values[:, np.isnan(values).mean(axis=0) <= 0.5]
    # Replaces the plate median of features that are missing on a whole plate.
    overall = column_medians(values)
    centered = np.empty_like(values)
    # Center each feature on the median of the plate; missing values follow below.
    for plate in np.unique(plates):
        rows = plates == plate
        present = ~np.isnan(values[rows]).all(axis=0)
        center = overall.copy()
        center[present] = column_medians(values[rows][:, present])
        centered[rows] = values[rows] - center
    # After centering, 0 is the median of the plate.
    centered[np.isnan(centered)] = 0
    spread = SD_PER_MAD * np.median(np.abs(centered), axis=0)
    # The MAD is 0 if more than half of the values are equal to the median.
    spread = np.where(spread > 0, spread, centered.std(axis=0))
    # A spread that is tiny relative to the median is a rounding error of a constant feature.
    varies = spread > 1e-9 * np.maximum(np.abs(overall), 1e-12)
    if not varies.any():
        raise InputError("features: every feature is constant or missing; nothing can be tested")
    # Clip before the principal components, which a single extreme well could dominate.
    scaled = np.clip(centered[:, varies] / spread[varies], -CLIP, CLIP)
    components = min(COMPONENTS, scaled.shape[1], max(len(scaled) - 1, 1))
    # All components together would only rotate the data.
    if components == scaled.shape[1]:
        return scaled
    return PCA(components, svd_solver="randomized", random_state=0).fit_transform(scaled)


_DOSE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(pM|nM|uM|µM|μM|mM|M)?\s*")
#: Micromolar per unit.
_UNITS = {"pM": 1e-6, "nM": 1e-3, "uM": 1.0, "µM": 1.0, "μM": 1.0, "mM": 1e3, "M": 1e6}


def metadata_column(metadata: pd.DataFrame, name: str, flag: str) -> pd.Series:
    """Return a column of the metadata of wells.

    Raises:
        InputError: it does not exist; the message names the flag and the `Metadata_*` columns.
    """
    if name not in metadata.columns:
        available = ", ".join(c for c in metadata.columns if c.startswith("Metadata_"))
        raise InputError(f"--{flag} {name}: not found (available: {available})")
    return metadata[name]


def parse_doses(column: pd.Series) -> Float[np.ndarray, " n"]:
    """Read concentrations in micromolar.

    A unit in the value (`10 nM`) counts; otherwise the unit at the end of the column's name
    (`Metadata_concentration_nM`); otherwise micromolar.

    Args:
        column: concentrations as text; an empty value is NaN.

    Raises:
        InputError: a value is not a concentration, or some values have a unit and others do not.
    """
    suffix = str(column.name).rpartition("_")[2]
    # A column name without a unit means micromolar.
    default = _UNITS.get(suffix, 1.0)
    doses = np.full(len(column), np.nan)
    with_unit = unitless = ""
    for row, text in enumerate(column.astype(str)):
        if not text.strip():
            continue
        match = _DOSE.fullmatch(text)
        if match is None:
            raise InputError(
                f"{column.name}: row {row}, {text!r} is not a concentration. Write a number, or a "
                "number with pM, nM, uM, mM or M."
            )
        # Store one example of each form for the error message.
        with_unit, unitless = (text, unitless) if match[2] else (with_unit, text)
        doses[row] = float(match[1]) * (_UNITS[match[2]] if match[2] else default)
    if with_unit and unitless:
        raise InputError(
            f"{column.name}: {with_unit!r} has a unit and {unitless!r} has none. Give every value "
            "the same form."
        )
    return doses
