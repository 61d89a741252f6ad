"""Hit list: which treatments differ from the negative controls, by how much, and how surely."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from perturbjax.core.errors import InputError
from perturbjax.core.plates import PLATE, WELL, parse_wells, plate_layouts, smallest_plate_shape
from perturbjax.core.progress import track
from perturbjax.screening.activity import (
    average_precision_statistic,
    center_by_plate,
    energy_statistic,
    mahalanobis_statistic,
)
from perturbjax.screening.permutations import Pool, make_pool, permutation_test
from perturbjax.screening.wells import Wells, reduce_profiles

#: Method -> statistic. Each gives the columns NAME, NAME_p and NAME_q.
METHODS = {
    "map": average_precision_statistic,
    "energy_distance": energy_statistic,
    "mahalanobis": mahalanobis_statistic,
}
#: False discovery rate at which a method calls a treatment active.
FDR = 0.05
#: Methods that must agree before a treatment is called active.
AGREEMENT = 2
#: A treatment that halves the number of cells, with p below FDR, is flagged as toxic.
TOXIC_RATIO = 0.5
#: Power and level of the minimum detectable effect.
_POWER, _LEVEL = 0.8, 0.05


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


def hit_table(wells: Wells, settings: Settings | None = None) -> pd.DataFrame:
    """Test every treatment against the negative controls of its plates.

    Args:
        wells: profiles of a screen.
        settings: permutations, false discovery rate and seed.

    Returns:
        One row per treatment, most significant first:

        - `treatment`, `wells`, `plates`, `unit` (what was permuted: well or position).
        - `map`, `energy_distance`, `mahalanobis`, each with `_p` (permutation) and `_q`
          (Benjamini-Hochberg over treatments). p is missing where too few wells allow none
          below 0.05.
        - `methods` (number with q at or below the rate) and `active` (two methods or more; with a
          single well, which has no mAP, both others).
        - `active_beyond_count`: still called active by the energy distance after the part of each
          feature that follows the cell count was removed. `cell_count_ratio` (median of the
          wells' counts relative to the controls of their plate), `cell_count_p` and `toxic`.
        - `replicate_correlation`: mean Pearson correlation between replicate wells.
        - `min_detectable_effect`: shift along one direction, in standard deviations between like
          wells, that the Mahalanobis test detects with a power of 80 %.
        - `note`: small numbers of wells, and replicates that share a row, a column or the edge.

    Raises:
        InputError: no plate has both a treatment and a negative control.
    """
    settings = settings or Settings()
    # Scaling and reduction use no labels, as the permutation tests require.
    reduced = reduce_profiles(wells.values, wells.plates)
    screen = _Screen(wells, reduced, settings)
    names = [name for name in sorted(wells.treatment.unique()) if screen.pool_of(name) is not None]
    if not names:
        raise InputError("hits: no plate has both a treatment and a negative control")
    rows = [
        screen.test(name)
        for name in track(names, total=len(names), label="Testing treatments", unit="treatments")
    ]
    table = pd.DataFrame(rows)
    for method in (*METHODS, "beyond_count"):
        table[f"{method}_q"] = _adjust(table[f"{method}_p"])
    significant = np.stack([table[f"{m}_q"] <= settings.fdr for m in METHODS], axis=1)
    table["methods"] = significant.sum(axis=1)
    table["active"] = table["methods"] >= AGREEMENT
    table["active_beyond_count"] = (
        table["active"] & (table["beyond_count_q"] <= settings.fdr)
        if wells.cell_count is not None
        else pd.NA
    )
    order = [
        "treatment",
        "wells",
        "plates",
        "unit",
        "active",
        "methods",
        *(f"{m}{end}" for m in METHODS for end in ("", "_p", "_q")),
        "active_beyond_count",
        "cell_count_ratio",
        "cell_count_p",
        "toxic",
        "replicate_correlation",
        "min_detectable_effect",
        "note",
    ]
    # Mean p-values are at most 1, so 2 puts treatments without a p-value last.
    best = table[[f"{m}_p" for m in METHODS]].mean(axis=1).fillna(2)
    ranking = np.lexsort((-table["mahalanobis"], best, -table["methods"]))
    return table.iloc[ranking][order].reset_index(drop=True)


def control_test(
    wells: Wells, settings: Settings | None = None, *, draws: int = 100
) -> dict[str, float]:
    """Check the calibration on the screen itself: treat random control wells as a treatment.

    Args:
        wells: profiles of a screen.
        settings: permutations and seed.
        draws: number of pseudo-treatments. Each takes as many control wells per plate as a typical
            treatment has wells there, and at most half of the plate's controls.

    Returns:
        For each method the fraction of pseudo-treatments with p at or below 0.05, and `draws`, the
        number that could be tested. Close to 0.05 (or below) means that p-values can be trusted.
    """
    settings = settings or Settings(permutations=999)
    rng = np.random.default_rng(settings.seed)
    plates = wells.plates
    screen = _Screen(wells, reduce_profiles(wells.values, plates), settings)
    # Positive controls usually have more wells than typical treatments and are not counted.
    treated = ~wells.control & ~wells.positive
    # Wells per treatment (rows) and plate (columns); 0 becomes NaN and is ignored by the median.
    per_plate = pd.crosstab(wells.treatment[treated], plates[treated]).replace(0, np.nan)
    # Median number of wells of a treatment on a plate.
    count = max(1, round(float(np.nanmedian(per_plate.to_numpy()))))
    # Median number of plates of a treatment.
    plate_count = max(1, round(float((per_plate > 0).sum(axis=1).median())))
    # One control well serves as pseudo-treatment, another one as control.
    with_controls = [p for p in np.unique(plates) if (wells.control & (plates == p)).sum() >= 2]
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(draws if with_controls else 0):
        chosen = np.zeros(len(plates), dtype=bool)
        for plate in rng.permutation(with_controls)[:plate_count]:
            rows = np.flatnonzero(wells.control & (plates == plate))
            chosen[rng.permutation(rows)[: min(count, len(rows) // 2)]] = True
        pool = screen.pool(chosen, wells.control & ~chosen)
        if pool is None or pool.unit == "position":
            continue
        for method, p in screen.p_values(pool, rng).items():
            found[method].append(p[1])
    tested = {method: np.array(p)[~np.isnan(p)] for method, p in found.items()}
    rates = {m: float((p <= _LEVEL).mean()) if len(p) else math.nan for m, p in tested.items()}
    return rates | {"draws": float(max(map(len, tested.values())))}


class _Screen:
    """Everything that the tests of all treatments share."""

    def __init__(self, wells: Wells, reduced: Float[np.ndarray, "n k"], settings: Settings):
        self.wells, self.reduced, self.settings = wells, reduced, settings
        self.plates = wells.plates
        self.names = wells.treatment.to_numpy()
        self.positions = wells.metadata[WELL].to_numpy()
        self.layouts = _layouts(wells)
        self.log_count = (
            # 0.5 avoids the logarithm of 0 for empty wells.
            None if wells.cell_count is None else np.log2(np.maximum(wells.cell_count, 0.5))
        )

    def pool(self, treated: np.ndarray, control: np.ndarray) -> Pool | None:
        return make_pool(treated, control, self.plates, self.positions, self.layouts)

    def pool_of(self, name: str) -> Pool | None:
        treated = (self.names == name) & ~self.wells.control
        return self.pool(treated, self.wells.control) if treated.any() else None

    def p_values(self, pool: Pool, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
        values = center_by_plate(self.reduced[pool.wells], pool.plates)
        count = self.settings.permutations
        return {
            name: permutation_test(make(values, pool), pool, permutations=count, rng=rng)
            for name, make in METHODS.items()
        }

    def test(self, name: str) -> dict[str, object]:
        pool = self.pool_of(name)
        assert pool is not None
        # The name is part of the seed: results do not depend on the other treatments.
        rng = np.random.default_rng([self.settings.seed, *name.encode()])
        row: dict[str, object] = {
            "treatment": name,
            "wells": pool.treated,
            "plates": len(np.unique(pool.plates[: pool.treated])),
            "unit": pool.unit,
        }
        for method, (value, p) in self.p_values(pool, rng).items():
            row |= {method: value, f"{method}_p": p}
        values = center_by_plate(self.reduced[pool.wells], pool.plates)
        row |= self._count_columns(values, pool, rng)
        row["replicate_correlation"] = _replicate_correlation(values[: pool.treated])
        row["min_detectable_effect"] = _min_detectable_effect(pool, values.shape[1])
        row["note"] = "; ".join(self._notes(pool))
        return row

    def _count_columns(
        self, values: np.ndarray, pool: Pool, rng: np.random.Generator
    ) -> dict[str, object]:
        """Cell count relative to the controls, and the test of the part that does not follow it."""
        if self.log_count is None:
            missing = dict.fromkeys(
                ("cell_count_ratio", "cell_count_p", "beyond_count_p"), math.nan
            )
            return missing | {"toxic": pd.NA}
        count = center_by_plate(self.log_count[pool.wells][:, None], pool.plates)
        n, permutations = pool.treated, self.settings.permutations
        difference = count[:n].mean() - count[n:].mean()

        def statistic(treated: np.ndarray) -> np.ndarray:
            # Counts are centered, so the treated mean determines the control mean.
            return np.abs(count[treated, 0].mean(axis=1))

        p = permutation_test(statistic, pool, permutations=permutations, rng=rng)[1]
        total = float((count**2).sum())
        # Least-squares projection: subtract the part of each feature that is proportional to the
        # centered log count.
        residual = values - count @ (count.T @ values) / total if total > 0 else values
        beyond = energy_statistic(residual, pool)
        ratio = float(2**difference)
        return {
            "cell_count_ratio": ratio,
            "cell_count_p": p,
            "toxic": bool(ratio <= TOXIC_RATIO and (math.isnan(p) or p <= _LEVEL)),
            "beyond_count_p": permutation_test(beyond, pool, permutations=permutations, rng=rng)[1],
        }

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
        # Size of the plate, to recognize wells at the edge.
        rows, columns = smallest_plate_shape(
            parse_wells(pd.Series(np.unique(self.positions))).clip(0)
        )
        if len(np.unique(spots, axis=0)) == 1:
            yield "all replicates at one plate position"
        elif len(set(spots[:, 0])) == 1:
            yield "all replicates in one row"
        elif len(set(spots[:, 1])) == 1:
            yield "all replicates in one column"
        elif np.all(np.isin(spots[:, 0], (0, rows - 1)) | np.isin(spots[:, 1], (0, columns - 1))):
            yield "all replicates at the edge of the plate"


def _layouts(wells: Wells) -> np.ndarray:
    """Layout number of each well's plate, the same for plates with one plate map."""
    # `plate_layouts` needs a column that identifies compounds.
    index = wells.metadata[[PLATE, WELL]].assign(Metadata_pert_iname=wells.treatment.to_numpy())
    layouts = plate_layouts(index)
    return pd.factorize(wells.metadata[PLATE].astype(str).map(layouts))[0]


def _adjust(p: pd.Series) -> Float[np.ndarray, " n"]:
    """Benjamini-Hochberg over the tests that have a p-value."""
    adjusted = np.full(len(p), np.nan)
    tested = p.notna().to_numpy()
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p[tested])
    return adjusted


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
    critical = stats.chi2.ppf(1 - _LEVEL, dimensions)
    low, high = 0.0, 1e4
    # Bisection for the noncentrality; 60 halvings of 1e4 give an error below 1e-14.
    for _ in range(60):
        middle = (low + high) / 2
        power = stats.ncx2.sf(critical, dimensions, middle)
        low, high = (middle, high) if power < _POWER else (low, middle)
    return math.sqrt(high / size)


def verdict(table: pd.DataFrame, fdr: float = FDR) -> str:
    """Summarize a hit table in one sentence.

    Args:
        table: from `hit_table`.
        fdr: false discovery rate it was made with.
    """
    active = table["active"].to_numpy(dtype=bool)
    untested = int(table[[f"{m}_p" for m in METHODS]].isna().all(axis=1).sum())
    words = (
        f"{int(active.sum())} of {len(table)} treatments are active at {fdr:.0%} false discovery "
        "rate (by two of three methods)"
    )
    if table["active_beyond_count"].notna().all() and active.any():
        only = int((active & ~table["active_beyond_count"].to_numpy(dtype=bool)).sum())
        words += f"; {only} of them only by cell count"
    if untested:
        words += f"; {untested} have too few wells for a test"
    return words + "."


def significant(table: pd.DataFrame, method: str, fdr: float = FDR) -> Bool[np.ndarray, " n"]:
    """Treatments that one method calls active.

    Args:
        table: from `hit_table`.
        method: map, energy_distance or mahalanobis.
        fdr: false discovery rate.
    """
    return (table[f"{method}_q"] <= fdr).to_numpy(dtype=bool)
