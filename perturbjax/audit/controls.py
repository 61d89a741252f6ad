"""What an audit judges features beside: the judge's baselines, and more that a shortcut could be made of."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from perturbjax.core.plates import PLATE, WELL, parse_wells
from perturbjax.evaluation.baselines import (
    BASELINES,
    Baseline,
    BaselineUnavailable,
    log_cell_counts,
    log_intensities,
)

#: Controls that are the judged model itself, on something else than the features.
SHUFFLED, UNTRAINED, INTENSITY = "labels shuffled", "untrained network", "intensity"
WORDS = {
    SHUFFLED: "the same model, trained on labels dealt anew to the wells",
    UNTRAINED: "the same model on features of the same network untrained",
    INTENSITY: "the same model on the table's own measurements of brightness",
}
#: Controls that know nothing of the site they answer for.
BLIND = ("majority", "chance", SHUFFLED)
#: Sites' worth of training frequencies mixed into those of a plate.
_PRIOR_SITES = 1.0
#: What CellProfiler calls the brightness of an object.
_MEASURED, _PREFIX = "_Intensity_", "measured: "
_TREES = 50


def plate(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """What the plate alone says: how often its training sites have each label.

    Raises:
        Unavailable: no judged plate has training sites.
    """
    plates = pd.Index(pd.unique(train[PLATE]))
    of_test = plates.get_indexer(test[PLATE])
    if (of_test < 0).all():
        raise BaselineUnavailable("no judged plate is in training, so a plate's name says nothing")
    prior = np.bincount(train_labels, minlength=classes) / len(train_labels)
    counts = np.zeros((len(plates) + 1, classes))  # the last row is for plates that are new
    np.add.at(counts, (plates.get_indexer(train[PLATE]), train_labels), 1)
    counts += _PRIOR_SITES * prior
    return (counts / counts.sum(axis=1, keepdims=True))[of_test]


def together(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """All that can be known without a shape, in one model: place, plate, cell count and brightness.

    Extremely randomised trees (Geurts et al. 2006), which take numbers and names as they are, and know a well again.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    known = _known(pd.concat([train, test], ignore_index=True))
    model = ExtraTreesClassifier(_TREES, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of classes with few rows: that is asked of the data, not of this model
        model.fit(known[: len(train)], train_labels)
    found = np.zeros((len(test), classes))
    found[:, model.classes_] = model.predict_proba(known[len(train) :])
    return found


def _known(index: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """Row, column, distance to the edge, plate, and whatever the index has of cells and brightness."""
    spots = parse_wells(index[WELL])
    edge = np.minimum(spots, spots.max(axis=0) - spots).min(axis=1, keepdims=True)
    parts = [spots, edge, pd.get_dummies(index[PLATE]).to_numpy(), measured(index)]
    for read in (log_cell_counts, log_intensities):
        try:
            parts.append(read(index))
        except BaselineUnavailable:  # said of the control that is made of it alone
            continue
    return np.concatenate(parts, axis=1).astype(float)


def add_intensity_features(index: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """The index, and beside it those features that CellProfiler calls Intensity, gaps filled by the median.

    Left as it is where a dataset has measured brightness already.
    """
    try:
        log_intensities(index)
    except BaselineUnavailable:
        kept = values[[name for name in values.columns if _MEASURED in name]]
        kept = kept.fillna(kept.median()).dropna(axis=1).add_prefix(_PREFIX)
        return pd.concat([index, kept.set_axis(index.index)], axis=1)
    return index


def measured(index: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """What `add_intensity_features` put beside the index; no columns where it put none."""
    return index[[column for column in index.columns if column.startswith(_PREFIX)]].to_numpy(
        dtype=float
    )


def given(
    site_ids: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], words: str
) -> Baseline:
    """A control that was predicted already: the probabilities of these sites, each judged once."""
    rows = pd.Series(np.arange(len(site_ids)), index=site_ids)

    def predict(
        train: pd.DataFrame, labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
    ) -> Float[np.ndarray, "test classes"]:
        return probabilities[rows[test["site_id"]].to_numpy()]

    return Baseline(words, predict=predict)


#: Controls that are no model of features, in the order of the tables.
CONTROLS: dict[str, Baseline] = {
    **BASELINES,
    "plate": Baseline("how often its plate's training sites have each label", predict=plate),
    "all together": Baseline(
        "place, plate, cell count and brightness in one model", predict=together
    ),
}
