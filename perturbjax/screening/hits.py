"""Hit list: which treatments differ from the negative controls, by how much, and how surely."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from jaxtyping import Bool

from perturbjax.core.errors import InputError
from perturbjax.core.progress import track
from perturbjax.screening.hit_tests import (
    FDR,
    LEVEL,
    METHODS,
    POSITIVE_CONTROL,
    Screen,
    Settings,
)
from perturbjax.screening.permutations import adjust
from perturbjax.screening.wells import Wells

#: Methods that must agree before a treatment is called active.
AGREEMENT = 2


def hit_table(wells: Wells, settings: Settings | None = None) -> pd.DataFrame:
    """Test every treatment against the negative controls of its plates.

    Args:
        wells: profiles of a screen.
        settings: permutations, false discovery rate and seed.

    Returns:
        One row per treatment, most significant first:

        - `treatment`, `role` (treatment or positive control), `wells`, `plates`, `unit` (what was
          permuted: well or position).
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
    return call_hits(Screen(wells, settings or Settings()))


def call_hits(screen: Screen) -> pd.DataFrame:
    """Return the table of `hit_table` for a prepared screen.

    Args:
        screen: reduced profiles and settings.
    """
    wells, settings = screen.wells, screen.settings
    pools = {name: screen.pool_of(name) for name in sorted(wells.treatment.unique())}
    testable = {name: pool for name, pool in pools.items() if pool is not None}
    if not testable:
        raise InputError("hits: no plate has both a treatment and a negative control")
    progress = track(
        testable.items(), total=len(testable), label="Testing treatments", unit="treatments"
    )
    rows = [screen.test(name, pool) for name, pool in progress]
    table = pd.DataFrame(rows)
    for method in (*METHODS, "beyond_count"):
        table[f"{method}_q"] = adjust(table[f"{method}_p"])
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
        "role",
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
    return rate_controls(Screen(wells, settings or Settings(permutations=999)), draws=draws)


def rate_controls(screen: Screen, *, draws: int = 100) -> dict[str, float]:
    """Return the result of `control_test` for a prepared screen.

    Args:
        screen: reduced profiles and settings.
        draws: number of pseudo-treatments.
    """
    wells, plates = screen.wells, screen.plates
    rng = np.random.default_rng(screen.settings.seed)
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
    p_values: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(draws if with_controls else 0):
        chosen = np.zeros(len(plates), dtype=bool)
        for plate in rng.permutation(with_controls)[:plate_count]:
            rows = np.flatnonzero(wells.control & (plates == plate))
            chosen[rng.permutation(rows)[: min(count, len(rows) // 2)]] = True
        pool = screen.pool(chosen, wells.control & ~chosen)
        if pool is None or pool.unit == "position":
            continue
        for method, p in screen.p_values(pool).items():
            p_values[method].append(p[1])
    tested = {method: np.array(p)[~np.isnan(p)] for method, p in p_values.items()}
    rates = {m: float((p <= LEVEL).mean()) if len(p) else math.nan for m, p in tested.items()}
    return rates | {"draws": float(max(map(len, tested.values())))}


def verdict(table: pd.DataFrame, fdr: float = FDR) -> str:
    """Summarize a hit table in one sentence; positive controls do not count.

    Args:
        table: from `hit_table`.
        fdr: false discovery rate it was made with.
    """
    table = table[table["role"] != POSITIVE_CONTROL]
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


def describe_positive_controls(table: pd.DataFrame) -> list[str]:
    """State how many positive controls are active; empty without positive controls.

    Args:
        table: from `hit_table`.
    """
    positive = table[table["role"] == POSITIVE_CONTROL]
    if positive.empty:
        return []
    inactive = ", ".join(positive.loc[~positive["active"].astype(bool), "treatment"])
    missed = f" (not active: {inactive})" if inactive else ""
    return [
        f"{int(positive['active'].sum())} of {len(positive)} positive controls are active{missed}."
    ]


def significant(table: pd.DataFrame, method: str, fdr: float = FDR) -> Bool[np.ndarray, " n"]:
    """Treatments that one method calls active.

    Args:
        table: from `hit_table`.
        method: map, energy_distance or mahalanobis.
        fdr: false discovery rate.
    """
    return (table[f"{method}_q"] <= fdr).to_numpy(dtype=bool)
