"""Dose response: curves, EC50 with interval, trend tests and lowest effective doses.

Model: the four-parameter log-logistic curve (Ritz et al. 2015, PLoS ONE 10, e0146021),

    y = bottom + (top - bottom) / (1 + (EC50 / dose) ** slope),

fitted to well values by least squares; `bottom` is the response at dose 0 and `top` the one at
infinite dose. A curve is reported only if the response changes with the dose: the
Jonckheere-Terpstra statistic (Jonckheere 1954, Biometrika 41, 133) is compared with its values
after wells were permuted between doses within each plate. The interval of the EC50 comes from
resampled residuals around the fitted curve. Doses are compared with the controls (or the lowest
dose) from the highest downwards, each at the full level, until one is not significant: the
family-wise error then needs no further correction (closed testing of ordered hypotheses; Tamhane
et al. 1996, Biometrics 52, 21).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, stats

#: Level of the trend test and of the lowest effective dose.
LEVEL = 0.05
#: Permutations of the trend test, and resamples behind the interval of the EC50.
PERMUTATIONS, RESAMPLES = 4_999, 500
#: Range of Hill slopes.
SLOPES = (0.3, 8.0)


@dataclass(frozen=True)
class Curve:
    """A fitted four-parameter log-logistic curve.

    Attributes:
        bottom: response without treatment.
        top: response at an infinite dose.
        ec50: dose with half of the effect, in the unit of the doses.
        slope: Hill slope, positive.
    """

    bottom: float
    top: float
    ec50: float
    slope: float

    def __call__(self, dose: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Response at each dose (greater than 0)."""
        # The limit prevents an overflow of exp; the fraction differs from 0 or 1 by less than
        # 1e-26.
        exponent = np.clip(self.slope * (math.log(self.ec50) - np.log(dose)), -60, 60)
        return self.bottom + (self.top - self.bottom) / (1 + np.exp(exponent))


def fit_curve(
    dose: Float[np.ndarray, " n"],
    response: Float[np.ndarray, " n"],
    zero: Float[np.ndarray, " m"] | None = None,
) -> Curve:
    """Fit the curve by least squares.

    For a given EC50 and slope the model is linear in bottom and top, so only two parameters are
    searched: first on a grid, then by a local optimizer. The EC50 stays within a factor of 10 of
    the tested doses.

    Args:
        dose: concentration of each well, greater than 0.
        response: value of each well.
        zero: values of control wells, which count as dose 0.
    """
    zero = np.zeros(0) if zero is None else zero
    grid = _Grid(dose, len(zero))
    y = np.concatenate([response, zero])
    start = grid.best(y[None])[0]

    def loss(parameters: np.ndarray) -> float:
        return float(_Shapes(grid.x, len(zero), parameters[None]).loss(y[None])[0, 0])

    bounds = [(grid.low, grid.high), tuple(np.log(SLOPES))]
    best = optimize.minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    # The local optimizer can end at a worse point than the grid.
    if loss(best) > loss(start):
        best = start
    bottom, top = _Shapes(grid.x, len(zero), best[None]).ends(y[None])[0, 0]
    return Curve(float(bottom), float(top), math.exp(best[0]), math.exp(best[1]))


class _Shapes:
    """Least squares fits of bottom and top for several pairs of (log EC50, log slope).

    The two columns of the design are 1 - f and f, with f the fraction of the effect. With the thin
    QR decomposition X = Q R of each design, the residual sum of squares is |y|^2 - |Q'y|^2.
    """

    def __init__(self, x: np.ndarray, zeros: int, parameters: np.ndarray):
        log_ec50, slope = parameters[:, :1], np.exp(parameters[:, 1:])
        fraction = 1 / (1 + np.exp(np.clip(slope * (log_ec50 - x), -60, 60)))
        fraction = np.concatenate([fraction, np.zeros((len(parameters), zeros))], axis=1)
        # q: (shapes, wells, 2), r: (shapes, 2, 2).
        self.q, self.r = np.linalg.qr(np.stack([1 - fraction, fraction], axis=2))
        diagonal = np.abs(np.diagonal(self.r, axis1=1, axis2=2))
        self.flat = diagonal.min(axis=1) < 1e-6  # all wells at one end: no curve
        self.r[self.flat] = np.eye(2)

    def _rotate(self, y: np.ndarray) -> np.ndarray:
        """Q'y of every response and shape, (responses, shapes, 2)."""
        # (wells, 2 * shapes): one product serves all responses and shapes.
        columns = self.q.transpose(1, 0, 2).reshape(self.q.shape[1], -1)
        return (y @ columns).reshape(len(y), -1, 2)

    def ends(self, y: np.ndarray) -> np.ndarray:
        """Bottom and top, (responses, shapes, 2)."""
        rotated = self._rotate(y)
        # Back substitution in R (bottom, top)' = Q'y.
        top = rotated[..., 1] / self.r[:, 1, 1]
        bottom = (rotated[..., 0] - self.r[:, 0, 1] * top) / self.r[:, 0, 0]
        return np.stack([bottom, top], axis=2)

    def loss(self, y: np.ndarray) -> np.ndarray:
        """Residual sum of squares, (responses, shapes).

        It grows where bottom or top lies outside the data: an extrapolation without support.
        """
        rotated = self._rotate(y)
        error = np.maximum((y**2).sum(axis=1)[:, None] - (rotated**2).sum(axis=2), 0)
        low, high = y.min(axis=1)[:, None, None], y.max(axis=1)[:, None, None]
        ends = self.ends(y)
        # Distance of bottom and top from the range of the data, in units of this range.
        excess = np.abs(ends - np.clip(ends, low, high)) / np.maximum(high - low, 1e-12)
        # The penalty is a factor, so a perfect fit needs a small error for the penalty to act on.
        floor = 1e-9 * np.maximum(((y - y.mean(axis=1)[:, None]) ** 2).sum(axis=1), 1e-30)
        total = (error + floor[:, None]) * (1 + (np.minimum(excess, 9) ** 2).sum(axis=2))
        # Shapes without a curve must have the largest loss.
        return np.where(self.flat, 1e6 * total.max(), total)


class _Grid:
    """Candidate shapes over the tested doses and a factor of 10 beyond."""

    def __init__(self, dose: np.ndarray, zeros: int):
        self.x = np.log(dose)
        self.low, self.high = self.x.min() - math.log(10), self.x.max() + math.log(10)
        self.parameters = np.stack(
            np.meshgrid(
                # 81 EC50s and 12 slopes, both evenly spaced on a logarithmic scale.
                np.linspace(self.low, self.high, 81),
                np.linspace(math.log(SLOPES[0]), math.log(SLOPES[1]), 12),
            ),
            axis=-1,
        ).reshape(-1, 2)
        self.shapes = _Shapes(self.x, zeros, self.parameters)

    def best(self, y: np.ndarray) -> np.ndarray:
        """(log EC50, log slope) of the best candidate for each response."""
        return self.parameters[self.shapes.loss(y).argmin(axis=1)]


def jonckheere(groups: Int[np.ndarray, " n"], values: Float[np.ndarray, "p n"]) -> np.ndarray:
    """Jonckheere-Terpstra statistic, centered: rising pairs minus falling pairs, halved.

    Args:
        groups: ordered dose group of each well, from 0.
        values: one or several permutations of the values of the wells.

    Returns:
        One value per permutation: positive if values rise with the dose.
    """
    statistic = np.zeros(len(values))
    for group in range(1, int(groups.max()) + 1):
        above, below = values[:, groups == group], values[:, groups < group]
        statistic += np.sign(above[:, :, None] - below[:, None, :]).sum(axis=(1, 2)) / 2
    return statistic


def trend_test(
    dose: Float[np.ndarray, " n"],
    response: Float[np.ndarray, " n"],
    plates: Int[np.ndarray, " n"],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Two-sided test of a monotonic trend, with values permuted between doses within plates.

    Args:
        dose: dose of each well; controls have dose 0.
        response: value of each well.
        plates: plate of each well.
        rng: source of random numbers.

    Returns:
        Kendall-type trend in [-1, 1] (1: every higher dose has a higher value) and its p-value.
    """
    groups = np.unique(dose, return_inverse=True)[1]
    sizes = np.bincount(groups)
    # Pairs of wells with different doses.
    pairs = (len(dose) ** 2 - (sizes**2).sum()) / 2
    if pairs == 0:
        return math.nan, math.nan
    observed = jonckheere(groups, response[None])[0]
    reached = 0
    # Blocks of 500 permutations limit the memory.
    for start in range(0, PERMUTATIONS, 500):
        count = min(500, PERMUTATIONS - start)
        permuted = np.repeat(response[None], count, axis=0)
        for plate in np.unique(plates):
            rows = np.flatnonzero(plates == plate)
            permuted[:, rows] = rng.permuted(permuted[:, rows], axis=1)
        reached += int((np.abs(jonckheere(groups, permuted)) >= abs(observed) - 1e-9).sum())
    return float(2 * observed / pairs), (reached + 1) / (PERMUTATIONS + 1)


def lowest_effective_dose(
    dose: Float[np.ndarray, " n"], response: Float[np.ndarray, " n"]
) -> float:
    """Lowest dose that differs from dose 0, tested from the highest dose downwards.

    Each step is a one-sided t test in the direction of the trend, with the variance pooled over
    all doses.

    Args:
        dose: dose of each well; controls have dose 0. Without controls the lowest dose is the
            reference.
        response: value of each well.

    Returns:
        The dose, or NaN if the highest dose does not differ.
    """
    levels = np.unique(dose)
    groups = [response[dose == level] for level in levels]
    # One mean per dose is estimated.
    freedom = len(response) - len(levels)
    if len(levels) < 2 or freedom < 1:
        return math.nan
    variance = sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom
    # The effect of a dose must have the same sign as that of the highest dose.
    direction = math.copysign(1.0, groups[-1].mean() - groups[0].mean())
    lowest = math.nan
    # From the highest dose down to the second lowest level; level 0 is the reference.
    for level, group in zip(levels[:0:-1], groups[:0:-1], strict=True):
        error = math.sqrt(variance * (1 / len(group) + 1 / len(groups[0])))
        difference = direction * (group.mean() - groups[0].mean())
        if error == 0 or stats.t.sf(difference / error, freedom) > LEVEL:
            break
        lowest = float(level)
    return lowest


@dataclass(frozen=True)
class DoseResponse:
    """Result of one treatment and one response.

    Attributes:
        trend: from -1 to 1, see `trend_test`.
        p: of the trend.
        curve: fitted curve; None without enough doses.
        ec50_low, ec50_high: 95 % interval of the EC50 from resampled residuals.
        lowest_effective_dose: NaN if none.
        max_effect: largest difference of a dose's mean from the mean at dose 0 (or the lowest
        dose). doses: number of different doses greater than 0.
        wells: number of wells with a dose greater than 0.
    """

    trend: float
    p: float
    curve: Curve | None
    ec50_low: float
    ec50_high: float
    lowest_effective_dose: float
    max_effect: float
    doses: int
    wells: int


def analyze_dose_response(
    dose: Float[np.ndarray, " n"],
    response: Float[np.ndarray, " n"],
    plates: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
) -> DoseResponse:
    """Test for a trend, fit the curve and find the lowest effective dose.

    Args:
        dose: dose of each well; controls have dose 0. Wells without a value must be left out.
        response: value of each well.
        plates: plate of each well.
        seed: of permutations and resamples.
    """
    rng = np.random.default_rng(seed)
    positive = dose > 0
    levels = np.unique(dose[positive])
    reference = response[~positive] if (~positive).any() else response[dose == dose.min()]
    means = np.array([response[dose == level].mean() for level in levels])
    effect = means - reference.mean() if len(levels) else np.zeros(1)
    trend, p = trend_test(dose, response, plates, rng)
    curve, low, high = None, math.nan, math.nan
    # Fewer doses cannot determine the four parameters of the curve.
    if len(levels) >= 4:
        zero = response[~positive]
        curve = fit_curve(dose[positive], response[positive], zero)
        low, high = _ec50_interval(dose[positive], response[positive], zero, rng)
    return DoseResponse(
        trend=trend,
        p=p,
        curve=curve,
        ec50_low=low,
        ec50_high=high,
        lowest_effective_dose=lowest_effective_dose(dose, response),
        max_effect=float(effect[np.abs(effect).argmax()]),
        doses=len(levels),
        wells=int(positive.sum()),
    )


def _ec50_interval(
    dose: np.ndarray, response: np.ndarray, zero: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % percentile interval from a residual bootstrap: fitted curve plus resampled residuals.

    Residuals are differences from the mean of the dose, scaled by sqrt(n / (n - number of doses))
    for the means that were subtracted.
    """
    levels, groups = np.unique(dose, return_inverse=True)
    freedom = len(dose) - len(levels)
    if freedom < 2:
        return math.nan, math.nan
    means = np.bincount(groups, response) / np.bincount(groups)
    residuals = (response - means[groups]) * math.sqrt(len(dose) / freedom)
    curve = fit_curve(dose, response, zero)
    # One row per resample: (RESAMPLES, wells).
    wells = curve(dose) + rng.choice(residuals, (RESAMPLES, len(dose)))
    # The curve is not defined at dose 0, so values of controls are resampled directly.
    controls = rng.choice(zero, (RESAMPLES, len(zero))) if len(zero) else np.zeros((RESAMPLES, 0))
    # Refit on the grid only, for all resamples in one product; a local search would be slow.
    fitted = _Grid(dose, len(zero)).best(np.concatenate([wells, controls], axis=1))
    # Column 0 is the logarithm of the EC50.
    low, high = np.exp(np.quantile(fitted[:, 0], [0.025, 0.975]))
    # The estimate comes from a finer search than the resamples; the interval must contain it.
    return float(min(low, curve.ec50)), float(max(high, curve.ec50))


def outcome(result: DoseResponse, dose_range: tuple[float, float], q: float) -> str:
    """State the outcome in words.

    Args:
        result: of one treatment.
        dose_range: lowest and highest tested dose.
        q: p of the trend after correction over treatments.

    Returns:
        "no dose response", "response", "response, EC50 above the tested range",
        "response, EC50 below the tested range", or "too few doses".
    """
    # This condition is also true for NaN.
    if not q <= LEVEL:
        return "no dose response" if math.isfinite(q) else "too few doses"
    if result.curve is None:
        return "response"
    if result.curve.ec50 > dose_range[1]:
        return "response, EC50 above the tested range"
    if result.curve.ec50 < dose_range[0]:
        return "response, EC50 below the tested range"
    return "response"


def describe_ec50(result: DoseResponse, dose_range: tuple[float, float]) -> str:
    """EC50 as text: `0.32 [0.2, 0.5]`, or `>5` outside the tested doses."""
    if result.curve is None:
        return ""
    low, high = dose_range
    if result.curve.ec50 > high:
        return f">{high:g}"
    if result.curve.ec50 < low:
        return f"<{low:g}"
    interval = (
        f" [{result.ec50_low:.3g}, {result.ec50_high:.3g}]"
        if math.isfinite(result.ec50_low)
        else ""
    )
    return f"{result.curve.ec50:.3g}{interval}"
