"""Changes of the cells: effect size and significance of every feature of a treatment.

Effect size: the difference between the treated wells' mean and the control mean of the same plate,
averaged over plates with weight n m / (n + m), in units of the robust standard deviation of all
wells within plates. Significance: the van Elteren test (1960, Bulletin of the ISI 37, 351), a
Wilcoxon rank-sum test stratified by plate, with Benjamini-Hochberg correction over the features of
a treatment.

CellProfiler feature names are read as COMPARTMENT_KIND_NAME_CHANNEL..., so that hundreds of
features can be summarized by compartment, channel and kind.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats

from perturbjax.core.errors import InputError
from perturbjax.screening.wells import SD_PER_MAD, Wells, column_medians

COMPARTMENTS = ("Cells", "Cytoplasm", "Nuclei", "Image")
#: CellProfiler's measurement modules and the word used for them in summaries.
KINDS = {
    "AreaShape": "shape",
    "Intensity": "intensity",
    "Texture": "texture",
    "Granularity": "granularity",
    "Correlation": "correlation of channels",
    "Location": "location",
    "Neighbors": "neighbors",
    "RadialDistribution": "radial distribution",
    "Count": "count",
}
#: Names of the stains in CellProfiler pipelines for Cell Painting.
CHANNELS = (
    "DNA",
    "DAPI",
    "ER",
    "RNA",
    "AGP",
    "Mito",
    "Brightfield",
    "Actin",
    "Tubulin",
    "Tub",
)
#: Prefixes of corrected and original images.
IMAGE_PREFIX = re.compile("^(Corr|Orig)(?=[A-Z])")
#: Features named in words if they are large; (pattern, name, word for more, word for less).
WORDS = (
    (r"Nuclei_AreaShape_Area$", "nuclei", "larger", "smaller"),
    (r"Cells_AreaShape_Area$", "cells", "larger", "smaller"),
    (r"Nuclei_AreaShape_(Eccentricity|Compactness)$", "nuclei", "more elongated", "rounder"),
    (r"Cells_AreaShape_(Eccentricity|Compactness)$", "cells", "more elongated", "rounder"),
    (r"^(cell_area|mask_area|area)$", "cells", "larger", "smaller"),
    (r"^eccentricity$", "cells", "more elongated", "rounder"),
    (r"^n_cells$", "cell count", "higher", "lower"),
    (r"Intensity_(Mean|Integrated)Intensity_(\w+)$", "{channel} intensity", "higher", "lower"),
    (r"^mean_(\w+)$", "{channel} intensity", "higher", "lower"),
    (r"^texture_(\w+)$", "{channel} texture", "coarser", "smoother"),
    (r"Texture_(?:Variance|Contrast)_([A-Za-z0-9]+)", "{channel} texture", "coarser", "smoother"),
)

#: Words without a percentage: a ratio of their features has no meaning.
NO_SIZE = ("more elongated", "rounder", "coarser", "smoother")


def feature_group(name: str) -> tuple[str, str, str]:
    """Compartment, channel and kind of a CellProfiler feature; empty where the name does not say.

    Args:
        name: such as Nuclei_Texture_Entropy_DNA_3_00_256.

    Example:
        >>> feature_group("Nuclei_Texture_Entropy_DNA_3_00_256")
        ('Nuclei', 'DNA', 'texture')
    """
    parts = name.split("_")
    compartment = parts[0] if parts[0] in COMPARTMENTS else ""
    kind = KINDS.get(parts[1], "") if compartment and len(parts) > 1 else ""
    stains = (IMAGE_PREFIX.sub("", part) for part in parts)
    channel = next((stain for stain in stains if stain in CHANNELS), "")
    return compartment, channel, kind


def difference_table(
    wells: Wells, treatment: str, spread: Float[np.ndarray, " d"] | None = None
) -> pd.DataFrame:
    """Compare every feature of a treatment with the controls of its plates.

    Args:
        wells: profiles of a screen.
        treatment: name of the treatment.
        spread: from `feature_spread`, if several treatments of one screen are compared.

    Returns:
        One row per feature, largest absolute effect first: `feature`, `compartment`, `channel`,
        `kind`, `effect` (robust standard deviations), `ratio` (treated over control mean; NaN
        unless all values are positive), `p` and `q`.

    Raises:
        InputError: the treatment has no well on a plate with controls.
    """
    plates = wells.plates
    treated = (wells.treatment == treatment).to_numpy() & ~wells.control
    # Plates with both treated and control wells.
    shared = np.intersect1d(plates[treated], plates[wells.control])
    treated = treated & np.isin(plates, shared)
    if not treated.any():
        raise InputError(
            f"differences: treatment {treatment!r} has no well on a plate with negative controls"
        )
    control = wells.control & np.isin(plates, shared)
    effect, treated_mean, control_mean = _effects(wells.values, treated, control, plates)
    spread = feature_spread(wells) if spread is None else spread
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.where(spread > 0, effect / spread, 0.0)
        # Normalized features have values around 0, for which a ratio is meaningless.
        positive = np.nanmin(wells.values, axis=0) > 0
        ratio = np.where(positive, treated_mean / control_mean, np.nan)
    table = pd.DataFrame(
        [feature_group(name) for name in wells.features],
        columns=["compartment", "channel", "kind"],
    )
    table.insert(0, "feature", list(wells.features))
    table["effect"], table["ratio"] = size, ratio
    table["p"] = van_elteren(wells.values, treated, control, plates)
    tested = table["p"].notna()
    table["q"] = np.nan
    if tested.any():
        table.loc[tested, "q"] = stats.false_discovery_control(table.loc[tested, "p"])
    # Features without an effect size come last.
    order = np.argsort(-table["effect"].abs().fillna(-1), kind="stable")
    return table.iloc[order].reset_index(drop=True)


def _effects(
    values: np.ndarray, treated: np.ndarray, control: np.ndarray, plates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted mean over plates of treated minus control, and both weighted means."""
    sums, weights = np.zeros((3, values.shape[1])), 0.0
    for plate in np.unique(plates[treated]):
        a, b = values[treated & (plates == plate)], values[control & (plates == plate)]
        # Inverse variance of the difference of two means, up to a factor.
        weight = len(a) * len(b) / (len(a) + len(b))
        with np.errstate(invalid="ignore"):
            means = np.nanmean(a, axis=0), np.nanmean(b, axis=0)
        sums += weight * np.stack([means[0] - means[1], *means])
        weights += weight
    effect, first, second = sums / weights
    return effect, first, second


def feature_spread(wells: Wells) -> Float[np.ndarray, " d"]:
    """Robust standard deviation of each feature within plates.

    Args:
        wells: profiles of a screen.
    """
    values, plates = wells.values, wells.plates
    centered = values.astype(float).copy()
    for plate in np.unique(plates):
        rows = plates == plate
        # Removing the plate medians excludes differences between plates from the spread.
        centered[rows] -= column_medians(values[rows])
    spread = SD_PER_MAD * column_medians(np.abs(centered))
    # The MAD is 0 if more than half of the values equal the median of their plate.
    return np.where(spread > 0, spread, np.nanstd(centered, axis=0))


def van_elteren(
    values: Float[np.ndarray, "n d"],
    treated: Bool[np.ndarray, " n"],
    control: Bool[np.ndarray, " n"],
    plates: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " d"]:
    """Two-sided p-value of a rank-sum test stratified by plate, for every feature.

    Rank sums of the plates are added with weight 1 / (n + m + 1), which is most powerful for a
    common shift; the normal approximation uses variances corrected for ties.

    Args:
        values: one row per well; NaN counts as tied with the plate's median.
        treated: treated wells.
        control: control wells of the same plates.
        plates: plate number of each well.
    """
    score, variance = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for plate in np.unique(plates[treated]):
        rows = (treated | control) & (plates == plate)
        own, group = treated[rows], values[rows].astype(float)
        n, total = int(own.sum()), len(own)
        # A plate without control wells contributes no comparison.
        if n == total:
            continue
        median = column_medians(group)
        # Missing values at the median favor neither group.
        group = np.where(np.isnan(group), median, group)
        ranks = stats.rankdata(group, axis=0)
        weight = 1 / (total + 1)
        # Rank sum of the treated wells minus the expected sum n (N + 1) / 2.
        score += weight * (ranks[own].sum(axis=0) - n * (total + 1) / 2)
        # Variance of a rank sum without replacement; ties reduce the variance of the ranks.
        variance += weight**2 * n * (total - n) / total * ranks.var(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(variance > 0, score / np.sqrt(variance), np.nan)
    return 2 * stats.norm.sf(np.abs(z))


def group_table(differences: pd.DataFrame) -> pd.DataFrame:
    """Summarize features by compartment, channel and kind.

    Args:
        differences: from `difference_table`.

    Returns:
        One row per group of features, strongest first: `compartment`, `channel`, `kind`,
        `features`, `effect` (median absolute effect) and `changed` (fraction with q <= 0.05).
    """
    groups = differences.groupby(["compartment", "channel", "kind"], sort=True)
    table = groups.agg(
        features=("feature", "size"),
        effect=("effect", lambda values: float(values.abs().median())),
        changed=("q", lambda values: float((values <= 0.05).mean())),
    )
    return table.reset_index().sort_values("effect", ascending=False, ignore_index=True)


def describe(differences: pd.DataFrame, *, limit: int = 5) -> str:
    """Put the clearest changes into words: "nuclei 18 % larger, cell count 40 % lower".

    Args:
        differences: from `difference_table`.
        limit: largest number of changes named.
    """
    parts: list[str] = []
    named: set[str] = set()
    for _, row in differences[differences["q"] <= 0.05].iterrows():
        phrase = _phrase(row)
        if phrase is not None and phrase[0] not in named:
            named.add(phrase[0])
            parts.append(" ".join(phrase))
        if len(parts) == limit:
            break
    # Significant features without an entry in `WORDS` are summarized by their group.
    if not parts and (differences["q"] <= 0.05).any():
        top = group_table(differences).iloc[0]
        words = " ".join(part for part in (top["compartment"], top["channel"], top["kind"]) if part)
        return f"largest change: {words or differences['feature'].iloc[0]}"
    return ", ".join(parts) if parts else "no feature differs clearly"


def _phrase(row: pd.Series) -> tuple[str, str] | None:
    for pattern, subject, more, less in WORDS:
        match = re.search(pattern, row["feature"])
        if match is None:
            continue
        # The channel is the last group of patterns that name one.
        channel = IMAGE_PREFIX.sub("", match.groups()[-1]) if "{channel}" in subject else ""
        name = subject.format(channel=channel)
        word = more if row["effect"] > 0 else less
        size = ""
        if math.isfinite(row["ratio"]) and word not in NO_SIZE:
            size = f"{abs(row['ratio'] - 1):.0%} ".replace("%", " %")
        return name, f"{size}{word}"
    return None
