"""Overlap of training and test set: shortcuts that a split leaves to a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbjax.core.plates import normalize_well
from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation.wells import well_ids


@dataclass(frozen=True)
class Overlap:
    """Fractions, in [0, 1], of the test sites that share a property with the training set."""

    well: float
    """Other sites of the same (plate, well) are in the training set."""
    plate: float
    """The plate is in the training set."""
    position: float
    """A training well at the same plate position has the same label."""
    label: float
    """The label occurs in the training set; other sites cannot be predicted correctly."""

    def warnings(self, split: str) -> list[str]:
        """Describe the shortcuts, the most important first.

        Args:
            split: name of the split for the text.
        """
        warnings = []
        if self.well > 0:
            warnings.append(
                f"split '{split}': {self.well:.0%} of the test sites come from training wells, so "
                "the score measures recognition of wells, not of treatments"
            )
        if self.label < 1:
            warnings.append(
                f"{1 - self.label:.1%} of the test sites have a label without training sites and "
                "count as errors"
            )
        if self.position > 0.5 and self.well == 0:
            warnings.append(
                f"{self.position:.0%} of the test sites have the same label as a training well at "
                "the same position, so the position predicts the label; `perturbjax audit` checks "
                "whether these data allow a split without this shortcut"
            )
        return warnings


def overlap(train: pd.DataFrame, test: pd.DataFrame) -> Overlap:
    """Measure the overlap of two tables with `Metadata_Plate`, `Metadata_Well` and `label`."""
    wells = well_ids(pd.concat([train, test], ignore_index=True))
    train_keys, test_keys = (
        # NUL does not occur in names, so different pairs of well and label give different keys.
        table[WELL].astype(str).map(normalize_well) + "\0" + table["label"].astype(str)
        for table in (train, test)
    )
    return Overlap(
        well=float(np.isin(wells[len(train) :], wells[: len(train)]).mean()),
        plate=float(test[PLATE].isin(train[PLATE]).mean()),
        position=float(test_keys.isin(train_keys).mean()),
        label=float(test["label"].isin(train["label"]).mean()),
    )
