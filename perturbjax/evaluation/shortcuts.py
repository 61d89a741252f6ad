"""What a split lets a model know without understanding cells, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation.wells import well_ids


@dataclass(frozen=True)
class Overlap:
    """Shares, in [0, 1], of the test sites whose … is in training too."""

    well: float
    """Well: other sites of the same (plate, well)."""
    plate: float
    """Plate."""
    position: float
    """Label at the same place of a plate: a plate map learned by heart answers these."""
    label: float
    """Label: the others cannot be answered."""

    def warnings(self, policy: str) -> list[str]:
        """What a reader of a score has to know of this split, most damaging first; empty if nothing was found.

        Args:
            policy: how the split was made (a policy of `perturbjax.data.splits`, or any other name).
        """
        found = []
        if self.well > 0:
            found.append(
                f"split '{policy}': {self.well:.0%} of the test sites come from wells that are in training too; "
                "this score says which well, not which treatment"
            )
        if self.label < 1:
            found.append(
                f"{1 - self.label:.1%} of the test sites have a label without training sites: never right"
            )
        if self.position > 0.5 and self.well == 0:
            found.append(
                f"{self.position:.0%} of the test sites have their label at the same place of a training plate: "
                "position alone can answer; `perturbjax audit` says whether this data allows a split where it cannot"
            )
        return found


def overlap(train: pd.DataFrame, test: pd.DataFrame) -> Overlap:
    """What stands on both sides of a split; both tables need `Metadata_Plate`, `Metadata_Well` and `label`."""
    wells = well_ids(pd.concat([train, test], ignore_index=True))
    places = [
        table[WELL].astype(str) + "\0" + table["label"].astype(str) for table in (train, test)
    ]
    return Overlap(
        well=float(np.isin(wells[len(train) :], wells[: len(train)]).mean()),
        plate=float(test[PLATE].isin(train[PLATE]).mean()),
        position=float(places[1].isin(places[0]).mean()),
        label=float(test["label"].isin(train["label"]).mean()),
    )
