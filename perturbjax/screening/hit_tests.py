"""Tests of the treatments of a screen: shared settings, and the row of each treatment."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from perturbjax.core.plates import PLATE, WELL, parse_wells, plate_layouts, smallest_plate_shape
from perturbjax.screening.activity import (
    average_precision_statistic,
    center_by_plate,
    energy_statistic,
    mahalanobis_statistic,
)
from perturbjax.screening.permutations import (
    Draws,
    Pool,
    Statistic,
    make_pool,
    permutation_tests,
)
from perturbjax.screening.wells import Wells, reduce_profiles

#: Method -> statistic. Each gives the columns NAME, NAME_p and NAME_q.
METHODS = {
    "map": average_precision_statistic,
    "energy_distance": energy_statistic,
    "mahalanobis": mahalanobis_statistic,
}
#: Method -> its name in messages and pages.
NAMES = {
    "map": "mAP",
    "energy_distance": "energy distance",
    "mahalanobis": "Mahalanobis distance",
}
#: False discovery rate at which a method calls a treatment active.
FDR = 0.05
#: A treatment that halves the number of cells, with p below FDR, is flagged as toxic.
TOXIC_RATIO = 0.5
#: Value of the column `role`.
POSITIVE_CONTROL = "positive control"
#: Power and level of the minimum detectable effect.
_POWER, LEVEL = 0.8, 0.05


@dataclass(frozen=True)
class Settings:
    """How treatments are tested.

    Attributes:
        permutations: largest number of permutations per test.
        fdr: false discovery rate, Benjamini-Hochberg per method.
        seed: of the permutations.
    """

    permutations: int = 20_000
    fdr: float = FDR
    seed: int = 0


class Screen:
    """Reduced profiles and everything else that the tests of all treatments share.

    Args:
        wells: profiles of a screen.
        settings: permutations, false discovery rate and seed.
    """

    def __init__(self, wells: Wells, settings: Settings):
        self.wells, self.settings = wells, settings
        self.plates = wells.plates
        # Scaling and reduction use no labels, as the permutation tests require.
        self.reduced = reduce_profiles(wells.values, self.plates)
        self.draws = Draws(settings.seed)
        self.names = wells.treatment.to_numpy()
        self.positions = wells.metadata[WELL].to_numpy()
        self.layouts = _layouts(wells)
        spots = parse_wells(pd.Series(np.unique(self.positions))).clip(0)
        # (rows, columns) of the plates, to recognize wells at the edge.
        self.shape = smallest_plate_shape(spots)
        self.log_count = (
            # 0.5 avoids the logarithm of 0 for empty wells.
            None if wells.cell_count is None else np.log2(np.maximum(wells.cell_count, 0.5))
        )

    def with_permutations(self, permutations: int) -> Screen:
        """The same screen with another number of permutations."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, permutations=permutations)
        return other

    def pool(self, treated: np.ndarray, control: np.ndarray) -> Pool | None:
        """Collect treated and control wells, see `permutations.make_pool`."""
        return make_pool(treated, control, self.plates, self.positions, self.layouts)

    def pool_of(self, name: str) -> Pool | None:
        """Wells of a treatment and their controls; None without controls on its plates."""
        treated = (self.names == name) & ~self.wells.control
        return self.pool(treated, self.wells.control) if treated.any() else None

    def p_values(self, pool: Pool) -> dict[str, tuple[float, float]]:
        """Statistic and p-value of every method."""
        values = center_by_plate(self.reduced[pool.wells], pool.plates)
        return self._tests({name: make(values, pool) for name, make in METHODS.items()}, pool)

    def _tests(
        self, statistics: Mapping[str, Statistic], pool: Pool
    ) -> dict[str, tuple[float, float]]:
        count = self.settings.permutations
        return permutation_tests(statistics, pool, permutations=count, draws=self.draws)

    def test(self, name: str, pool: Pool) -> dict[str, object]:
        """Test one treatment and return its row of the table."""
        row: dict[str, object] = {
            "treatment": name,
            "role": POSITIVE_CONTROL if self.wells.positive[pool.wells[0]] else "treatment",
            "wells": pool.treated,
            "plates": len(np.unique(pool.plates[: pool.treated])),
            "unit": pool.unit,
        }
        values = center_by_plate(self.reduced[pool.wells], pool.plates)
        statistics = {name: make(values, pool) for name, make in METHODS.items()}
        statistics |= self._count_statistics(values, pool)
        for method, (value, p) in self._tests(statistics, pool).items():
            row |= {method: value, f"{method}_p": p}
        row |= self._count_columns(pool, row)
        row["replicate_correlation"] = _replicate_correlation(values[: pool.treated])
        row["min_detectable_effect"] = _min_detectable_effect(pool, values.shape[1])
        row["note"] = "; ".join(self._notes(pool))
        return row

    def _centered_count(self, pool: Pool) -> Float[np.ndarray, "n 1"]:
        assert self.log_count is not None
        return center_by_plate(self.log_count[pool.wells][:, None], pool.plates)

    def _count_statistics(self, values: np.ndarray, pool: Pool) -> dict[str, Statistic]:
        """Tests of the cell count, and of the part of the profile that does not follow it."""
        if self.log_count is None:
            return {}
        count = self._centered_count(pool)
        total = float((count**2).sum())
        # Least-squares projection: subtract the part of each feature that is proportional to the
        # centered log count.
        residual = values - count @ (count.T @ values) / total if total > 0 else values
        return {
            # Counts are centered, so the treated mean determines the control mean.
            "cell_count": lambda treated: np.abs(count[treated, 0].mean(axis=1)),
            "beyond_count": energy_statistic(residual, pool),
        }

    def _count_columns(self, pool: Pool, row: dict[str, Any]) -> dict[str, object]:
        """Cell count relative to the controls, and the toxicity flag."""
        if self.log_count is None:
            missing = ("cell_count_ratio", "cell_count_p", "beyond_count_p")
            return dict.fromkeys(missing, math.nan) | {"toxic": pd.NA}
        count, n, p = self._centered_count(pool), pool.treated, row["cell_count_p"]
        ratio = float(2 ** (count[:n].mean() - count[n:].mean()))
        toxic = bool(ratio <= TOXIC_RATIO and (math.isnan(p) or p <= LEVEL))
        return {"cell_count_ratio": ratio, "toxic": toxic}

    def _notes(self, pool: Pool) -> Iterator[str]:
        if pool.smallest_p > 0.05:
            yield (
                f"too few {pool.unit}s for a p-value (smallest possible "
                f"{pool.smallest_p:.2g}); add replicates or controls"
            )
        elif pool.treated == 1:
            yield "one well: no mean average precision"
        spots = parse_wells(pd.Series(self.positions[pool.wells[: pool.treated]]))
        if pool.treated < 2 or (spots < 0).any():
            return
        rows, columns = self.shape
        if len(np.unique(spots, axis=0)) == 1:
            yield "all replicates at one plate position"
        elif len(set(spots[:, 0])) == 1:
            yield "all replicates in one row"
        elif len(set(spots[:, 1])) == 1:
            yield "all replicates in one column"
        elif np.all(np.isin(spots[:, 0], (0, rows - 1)) | np.isin(spots[:, 1], (0, columns - 1))):
            yield "all replicates at the edge of the plate"


def _layouts(wells: Wells) -> np.ndarray:
    """Layout number of each well's plate; the same for plates with one plate map."""
    # `plate_layouts` needs a column that identifies compounds.
    index = wells.metadata[[PLATE, WELL]].assign(Metadata_pert_iname=wells.treatment.to_numpy())
    layouts = plate_layouts(index)
    return pd.factorize(wells.metadata[PLATE].astype(str).map(layouts))[0]


def _replicate_correlation(values: Float[np.ndarray, "n d"]) -> float:
    if len(values) < 2 or values.shape[1] < 2:
        return math.nan
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        correlation = np.corrcoef(values)
    return float(correlation[np.triu_indices(len(values), 1)].mean())


def _min_detectable_effect(pool: Pool, dimensions: int) -> float:
    """Shift that a chi-square test of the mean difference detects with 80 % power.

    The squared Mahalanobis distance of n treated from m control wells, times n m / (n + m), follows
    a noncentral chi-square distribution with the shift's squared length times n m / (n + m) as
    noncentrality. Units are independent, so their numbers count, not the wells'.
    """
    treated = sum(pool.treated_units)
    control = sum(map(len, pool.units)) - treated
    # Effective number of units of a difference of two means, n m / (n + m).
    size = treated * control / (treated + control)
    return math.sqrt(_detectable_noncentrality(dimensions) / size)


@functools.cache
def _detectable_noncentrality(dimensions: int) -> float:
    """Noncentrality of the chi-square distribution that gives a power of 80 %."""
    critical = stats.chi2.ppf(1 - LEVEL, dimensions)
    low, high = 0.0, 1e4
    # Bisection; 60 halvings of 1e4 give an error below 1e-14.
    for _ in range(60):
        middle = (low + high) / 2
        power = stats.ncx2.sf(critical, dimensions, middle)
        low, high = (middle, high) if power < _POWER else (low, middle)
    return high
