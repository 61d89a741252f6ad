"""Controls of an audit: the baselines of `evaluation.baselines`, and further technical predictors.

Three controls fit the audited classifier itself on other input: on shuffled labels, on features of
the untrained network, and on intensity measurements of the feature table.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from perturbjax.evaluation.baselines import (
    ALL_TECHNICAL,
    BASELINES,
    MEASURED_PREFIX,
    Baseline,
    BaselineUnavailable,
    log_intensities,
    plate,
)

#: Controls that are the audited classifier on other input.
SHUFFLED, UNTRAINED, INTENSITY = "labels shuffled", "untrained network", "intensity"
WORDS = {
    SHUFFLED: "the same classifier, trained on labels shuffled between wells",
    UNTRAINED: "the same classifier on features of the untrained network",
    INTENSITY: "the same classifier on the table's intensity measurements",
}
#: Controls that use no property of the test site.
BLIND = ("majority", "chance", SHUFFLED)
#: Controls without which no score is recommended, with the column they need.
REQUIRED = ("position",)
#: Part of the name of CellProfiler's intensity features.
_CELLPROFILER_INTENSITY = "_Intensity_"


def add_intensity_features(index: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Add the CellProfiler intensity features of a table to its index.

    Missing values become the median. An index with channel statistics of a dataset is unchanged.
    """
    try:
        log_intensities(index)
    except BaselineUnavailable:
        names = [name for name in values.columns if _CELLPROFILER_INTENSITY in name]
        measured = values[names]
        # A feature without any value has no median and is dropped.
        measured = measured.fillna(measured.median()).dropna(axis=1).add_prefix(MEASURED_PREFIX)
        return pd.concat([index, measured.set_axis(index.index)], axis=1)
    return index


def precomputed_baseline(
    site_ids: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], words: str
) -> Baseline:
    """Wrap probabilities that were computed before, one row per site."""
    rows = pd.Series(np.arange(len(site_ids)), index=site_ids)

    def predict(
        train: pd.DataFrame, labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
    ) -> Float[np.ndarray, "test classes"]:
        return probabilities[rows[test["site_id"]].to_numpy()]

    return Baseline(words, predict=predict)


#: Controls that need no classifier on features, in the order of the tables.
CONTROLS: dict[str, Baseline] = {
    **{name: one for name, one in BASELINES.items() if name != ALL_TECHNICAL},
    "plate": Baseline("class frequencies of the plate's training sites", predict=plate),
    ALL_TECHNICAL: BASELINES[ALL_TECHNICAL],
}
