"""Results of the four screening commands, with their conclusions in sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbjax.screening import hit_tests
from perturbjax.screening import hits as hit_calling
from perturbjax.screening.doses import DoseResponse
from perturbjax.screening.wells import Wells


@dataclass(frozen=True)
class HitsResult:
    """Result of `hits`.

    Attributes:
        wells: the wells that were tested.
        table: see `hits.hit_table`.
        control_rates: see `hits.control_test`.
        fdr: false discovery rate.
    """

    wells: Wells
    table: pd.DataFrame
    control_rates: dict[str, float]
    fdr: float

    def sentences(self) -> list[str]:
        """Verdict, positive controls and calibration, one sentence each."""
        verdict = hit_calling.verdict(self.table, self.fdr)
        positive = hit_calling.describe_positive_controls(self.table)
        return [verdict, *positive, describe_calibration(self.control_rates)]


@dataclass(frozen=True)
class DosesResult:
    """Result of `doses`.

    Attributes:
        wells: the wells of the screen.
        table: one row per treatment, see `compute_doses`.
        values: dose and response of every well, see `well_responses`.
        responses: treatment -> fitted curve and tests.
        response: name of the response.
    """

    wells: Wells
    table: pd.DataFrame
    values: pd.DataFrame
    responses: dict[str, DoseResponse]
    response: str

    def sentences(self) -> list[str]:
        """Number of treatments that respond."""
        count = int(self.table["outcome"].str.startswith("response").sum())
        return [f"{count} of {len(self.table)} treatments respond to the dose (FDR 5%)."]


#: Treatments among which the nearest neighbor was searched.
AMONG = {
    "NSC": "among other compounds",
    "NSCB": "among other compounds of other batches",
    "Reference": "in the reference",
}


@dataclass(frozen=True)
class SimilarResult:
    """Result of `similar`.

    Attributes:
        wells: the wells of the screen.
        neighbors: see `similarity.neighbor_table`.
        matrix: similarities; rows and columns in the order of the dendrogram.
        tree: SciPy linkage of the rows of `matrix`; None for fewer than 3 treatments or with a
            reference.
        mechanism: treatment -> mechanism; empty without labels.
        enrichment: see `similarity.mechanism_enrichment`; empty without labels.
        scores: see `similarity.mechanism_scores`; with a reference, "Reference" instead.
        restriction: pairs of wells that were left out.
        has_reference: the columns of `matrix` are treatments of a reference table.
    """

    wells: Wells
    neighbors: pd.DataFrame
    matrix: pd.DataFrame
    tree: np.ndarray | None
    mechanism: dict[str, str]
    enrichment: pd.DataFrame
    scores: dict[str, tuple[int, float, float]]
    restriction: str
    has_reference: bool = False

    def sentences(self) -> list[str]:
        """Number of significant pairs, and fraction of treatments with a matching neighbor."""
        words = [
            f"{name}: {matched:.1%} of {counted} treatments have a nearest neighbor with the same "
            f"mechanism {AMONG[name]} ({chance:.1%} by chance)."
            for name, (counted, matched, chance) in self.scores.items()
            if counted
        ]
        pairs = int((self.neighbors["q"] <= hit_calling.FDR).sum())
        words.append(
            f"{pairs} of {len(self.neighbors)} listed neighbor pairs are more similar than random "
            "controls (FDR 5%)."
        )
        return words


@dataclass(frozen=True)
class DifferencesResult:
    """Result of `differences`.

    Attributes:
        wells: the wells of the screen.
        summary: one row per treatment: `treatment`, `changed` (fraction of features with
            q <= 0.05) and `description`.
        features: see `differences.difference_table`, with a column `treatment`.
        groups: see `differences.group_table`, with a column `treatment`.
    """

    wells: Wells
    summary: pd.DataFrame
    features: pd.DataFrame
    groups: pd.DataFrame

    def sentences(self) -> list[str]:
        """The treatments with most changed features, in words."""
        rows = self.summary.head(10).itertuples()
        return [f"{row.treatment}: {row.description}" for row in rows]


def describe_calibration(rates: dict[str, float]) -> str:
    """State how often random control wells were called different."""
    count = int(rates["draws"])
    if not count:
        return "info: too few controls to check the calibration on this screen"
    parts = [
        f"{hit_tests.NAMES[name]} {rates[name]:.0%}"
        for name in hit_tests.METHODS
        if math.isfinite(rates[name])
    ]
    return (
        f"info: calibration on {count} random sets of control wells: p <= 0.05 in "
        f"{', '.join(parts)} (expected 5%)"
    )
