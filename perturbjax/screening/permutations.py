"""Permutation tests of one treatment against the negative controls of its plates.

Idea: if a treatment does nothing, its wells and the control wells of the same plates are
exchangeable. Any statistic of the wells labelled "treated" can then be compared with its values
after the label was moved at random, plate by plate. Such a test is exact for every number of
wells, provided that nothing computed beforehand depends on the labels. All preprocessing in
`perturbjax.screening` therefore treats treated and control wells of a pool alike.

Which units are exchanged decides whether the test is honest:

- well: wells of one plate. Right when layouts are randomized between plates.
- position: all wells at one plate position of plates that share a layout. A position effect
  (edge, gradient) repeats on every plate of the layout, so the wells at one position are one
  observation, not several.

With few possible assignments all are evaluated and the p-value is exact. Otherwise p-values follow
Besag and Clifford (1991, Biometrika 78, 301): permutations are drawn until the observed value was
reached `STOP` times, or `permutations` were drawn. Clear negatives then cost few permutations, and
small p-values keep their resolution.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

#: Number of permutations that reach the observed value after which sampling stops.
STOP = 10
#: Permutations of the first block; later blocks have up to 8 times as many.
CHUNK = 250
#: Limit of the memory for drawn permutations.
MAX_CACHED_BYTES = 200_000_000
#: Up to this number of assignments all are evaluated, which gives the exact p-value.
MAX_EXACT = 2000
#: A test whose smallest possible p-value is larger than this cannot reject, and is not reported.
MAX_SMALLEST_P = 0.05

#: (permutations, treated wells) positions in the pool -> one value per permutation; larger is
#: more extreme.
Statistic = Callable[[Int[np.ndarray, "p n"]], Float[np.ndarray, " p"]]


@dataclass(frozen=True)
class Pool:
    """The wells of one treatment and the control wells they are compared with.

    Attributes:
        wells: row numbers in the table of all wells; treated wells first.
        treated: number of treated wells.
        plates: plate number of each well of the pool.
        units: for each stratum, an array (units, wells per unit) of positions in the pool. Units of
            one stratum are exchangeable; the treated units come first.
        treated_units: number of treated units in each stratum.
        unit: "well" or "position".
    """

    wells: Int[np.ndarray, " n"]
    treated: int
    plates: Int[np.ndarray, " n"]
    units: tuple[Int[np.ndarray, "u w"], ...]
    treated_units: tuple[int, ...]
    unit: str

    @property
    def assignments(self) -> float:
        """Number of different ways to choose the treated units."""
        # Binomial coefficient (units choose treated units) of each stratum, multiplied over
        # strata.
        log = sum(
            math.lgamma(len(units) + 1) - math.lgamma(k + 1) - math.lgamma(len(units) - k + 1)
            for units, k in zip(self.units, self.treated_units, strict=True)
        )
        # exp overflows above 709.
        return round(math.exp(min(log, 700.0)), 6)

    @property
    def smallest_p(self) -> float:
        """Smallest p-value that a permutation test on this pool can give."""
        return 1 / self.assignments

    def enumerate(self) -> Int[np.ndarray, "p n"]:
        """All assignments: positions in the pool that are treated, the observed ones first."""
        chosen = [
            [units[list(pick)].ravel() for pick in combinations(range(len(units)), k)]
            for units, k in zip(self.units, self.treated_units, strict=True)
        ]
        return np.array([np.concatenate(parts) for parts in product(*chosen)])

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Number of units and of treated units of each stratum."""
        return tuple(
            (len(units), k) for units, k in zip(self.units, self.treated_units, strict=True)
        )

    def select(self, picks: Sequence[Int[np.ndarray, "p k"]]) -> Int[np.ndarray, "p n"]:
        """Positions in the pool of the wells of selected units.

        Args:
            picks: for each stratum, numbers of the units labelled treated, one row per permutation.

        Returns:
            One row per permutation, as many columns as there are treated wells.
        """
        # (p, k, wells per unit) -> (p, treated wells of the stratum).
        parts = [
            units[pick].reshape(len(pick), -1)
            for units, pick in zip(self.units, picks, strict=True)
        ]
        return np.concatenate(parts, axis=1)


class Draws:
    """Random selections of units, shared by all pools with equal numbers of units.

    Most treatments of a screen have the same design, and drawing takes longer than the statistics.
    A selection depends on the seed and the numbers of units only, so that the result of a treatment
    does not depend on the other treatments.

    Args:
        seed: of the random numbers.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._cache: OrderedDict[tuple[Any, ...], list[Int[np.ndarray, "p k"]]] = OrderedDict()
        self._bytes = 0

    def picks(
        self, shape: tuple[tuple[int, int], ...], number: int, count: int
    ) -> list[Int[np.ndarray, "p k"]]:
        """Draw one block of selections, or return it from memory.

        Args:
            shape: see `Pool.shape`.
            number: number of the block, from 0.
            count: number of selections.

        Returns:
            For each stratum, the numbers of the selected units, one row per selection.
        """
        key = (shape, number, count)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        rng = np.random.default_rng([self._seed, number, *itertools.chain(*shape)])
        # The positions of the k smallest random numbers are a random subset of k units.
        block = [
            rng.random((count, units), dtype=np.float32)
            .argpartition(k - 1, axis=1)[:, :k]
            .astype(np.int32)
            for units, k in shape
        ]
        self._cache[key] = block
        self._bytes += sum(part.nbytes for part in block)
        while self._bytes > MAX_CACHED_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= sum(part.nbytes for part in oldest)
        return block


def make_pool(
    treated: Bool[np.ndarray, " n"],
    control: Bool[np.ndarray, " n"],
    plates: Int[np.ndarray, " n"],
    positions: Shaped[np.ndarray, " n"],
    layouts: Int[np.ndarray, " n"],
) -> Pool | None:
    """Collect the wells of one treatment and their controls, and choose what is exchanged.

    Positions are exchanged when the treatment repeats a position on several plates of one layout;
    only controls whose position exists on all of these plates take part. Otherwise wells are
    exchanged within plates. Plates without a control well are left out.

    Args:
        treated: wells of the treatment.
        control: negative control wells.
        plates: plate number of each well.
        positions: name of the position on the plate, such as A01.
        layouts: layout number of each well's plate.

    Returns:
        The pool, or None if no plate of the treatment has a control well.
    """
    with_controls = np.unique(plates[control])
    treated = treated & np.isin(plates, with_controls)
    if not treated.any():
        return None
    by_position = _position_pool(treated, control, plates, positions, layouts)
    return by_position if by_position is not None else _well_pool(treated, control, plates)


def _well_pool(treated: np.ndarray, control: np.ndarray, plates: np.ndarray) -> Pool:
    rows = np.flatnonzero(treated)
    rows = np.concatenate([rows, np.flatnonzero(control & np.isin(plates, plates[rows]))])
    n = int(treated.sum())
    units, counts = [], []
    for plate in np.unique(plates[rows[:n]]):
        members = np.flatnonzero(plates[rows] == plate)
        # Treated wells precede the controls in `rows`, so they are the first units as well.
        units.append(members[:, None])
        counts.append(int((members < n).sum()))
    return Pool(rows, n, plates[rows], tuple(units), tuple(counts), "well")


def _position_pool(
    treated: np.ndarray,
    control: np.ndarray,
    plates: np.ndarray,
    positions: np.ndarray,
    layouts: np.ndarray,
) -> Pool | None:
    """Units are positions; None if no position repeats or the plates of the positions differ."""
    rows: list[int] = []
    controls: list[int] = []
    strata: list[tuple[list[list[int]], list[list[int]]]] = []
    repeated = False
    for layout in np.unique(layouts[treated]):
        own = _plates_by_position(np.flatnonzero(treated & (layouts == layout)), plates, positions)
        signatures = {frozenset(wells) for wells in own.values()}
        # Positions are exchangeable only if they occur on the same plates.
        if len(signatures) > 1:
            return None
        # The plates on which all positions of the treatment occur.
        (signature,) = signatures
        repeated |= len(signature) > 1
        others = _plates_by_position(
            np.flatnonzero(control & (layouts == layout) & np.isin(plates, list(signature))),
            plates,
            positions,
        )
        # A control position must occur on the same plates.
        complete = [wells for wells in others.values() if frozenset(wells) == signature]
        if not complete:
            return None
        strata.append(
            ([list(w.values()) for w in own.values()], [list(w.values()) for w in complete])
        )
    # If no position repeats, the caller exchanges wells within plates.
    if not repeated:
        return None
    for own_units, control_units in strata:
        rows += [row for unit in own_units for row in unit]
        controls += [row for unit in control_units for row in unit]
    wells = np.array(rows + controls)
    # Maps a row of the table to its position in the pool.
    place = {int(row): number for number, row in enumerate(wells)}
    units = tuple(
        np.array([[place[row] for row in unit] for unit in own_units + control_units])
        for own_units, control_units in strata
    )
    counts = tuple(len(own_units) for own_units, _ in strata)
    return Pool(wells, len(rows), plates[wells], units, counts, "position")


def _plates_by_position(
    rows: np.ndarray, plates: np.ndarray, positions: np.ndarray
) -> dict[object, dict[int, int]]:
    """Position -> {plate: row}; a second well at the same position of a plate is ignored."""
    table: dict[object, dict[int, int]] = {}
    for row in rows:
        table.setdefault(positions[row], {}).setdefault(int(plates[row]), int(row))
    return {position: dict(sorted(wells.items())) for position, wells in table.items()}


def permutation_tests(
    statistics: Mapping[str, Statistic], pool: Pool, *, permutations: int, draws: Draws
) -> dict[str, tuple[float, float]]:
    """Compare statistics of the treated wells with their values after permuting the labels.

    All statistics use the same permutations.

    Args:
        statistics: name -> function from positions in the pool to one value per row.
        pool: wells and exchangeable units.
        permutations: largest number of permutations.
        draws: source of permutations.

    Returns:
        Name -> observed value and its p-value; p is NaN if the pool is too small for a p-value of
        `MAX_SMALLEST_P` or less, or if the observed value is NaN.
    """
    own = np.arange(pool.treated)[None]
    observed = {name: float(make(own)[0]) for name, make in statistics.items()}
    p = dict.fromkeys(statistics, math.nan)
    if pool.smallest_p <= MAX_SMALLEST_P:
        tested = {n: f for n, f in statistics.items() if math.isfinite(observed[n])}
        # Rounding must not decide whether a permutation equals the observed assignment.
        limits = {name: observed[name] - 1e-9 * max(abs(observed[name]), 1e-12) for name in tested}
        if pool.assignments <= MAX_EXACT:
            assignments = pool.enumerate()
            p |= {n: float(np.mean(f(assignments) >= limits[n])) for n, f in tested.items()}
        else:
            p |= _sequential_p(tested, limits, pool, permutations, draws)
    return {name: (observed[name], p[name]) for name in statistics}


def _sequential_p(
    statistics: dict[str, Statistic],
    limits: dict[str, float],
    pool: Pool,
    permutations: int,
    draws: Draws,
) -> dict[str, float]:
    """p-values of Besag and Clifford, each from as many permutations as it needs."""
    p: dict[str, float] = {}
    reached = dict.fromkeys(statistics, 0)
    drawn = 0
    for number in itertools.count():
        # Most treatments need few permutations. Later blocks are larger, for fewer calls.
        count = min(CHUNK * min(2**number, 8), permutations - drawn)
        running = [name for name in statistics if name not in p]
        if not running or count <= 0:
            break
        treated = pool.select(draws.picks(pool.shape, number, count))
        for name in running:
            exceeds = statistics[name](treated) >= limits[name]
            # Number of permutations up to each draw that reached the observed value.
            total = reached[name] + np.cumsum(exceeds)
            if total[-1] >= STOP:
                # With early stopping, p is STOP divided by the number of draws.
                p[name] = STOP / (drawn + int(np.searchsorted(total, STOP)) + 1)
            reached[name] = int(total[-1])
        drawn += count
    # The observed assignment counts as a draw, so that p is never 0.
    return {name: p.get(name, (reached[name] + 1) / (drawn + 1)) for name in statistics}


def permutation_test(
    statistic: Statistic, pool: Pool, *, permutations: int, seed: int = 0
) -> tuple[float, float]:
    """Test one statistic, see `permutation_tests`.

    Args:
        statistic: maps positions in the pool to one value per row.
        pool: wells and exchangeable units.
        permutations: largest number of permutations.
        seed: of the permutations.
    """
    tests = permutation_tests({"": statistic}, pool, permutations=permutations, draws=Draws(seed))
    return tests[""]


def adjust(p: pd.Series) -> Float[np.ndarray, " n"]:
    """Benjamini-Hochberg over the p-values that are present.

    Args:
        p: NaN where there was no test.
    """
    adjusted = np.full(len(p), np.nan)
    present = p.notna().to_numpy()
    if present.any():
        adjusted[present] = stats.false_discovery_control(p[present])
    return adjusted
