"""Files of an evaluation, and tables of a run's predictions and features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from perturbjax.evaluation.predictions import predictions_table
from perturbjax.training.apply_network import Predictions, feature_names
from perturbjax.training.run_directory import Run

#: Folder in a run directory, and files in it.
EVALUATION, PREDICTIONS, FEATURES = "evaluation", "predictions.parquet", "features.parquet"


def run_predictions_table(
    run: Run, index: pd.DataFrame, predictions: Predictions, part: Any, sets: pd.DataFrame | None
) -> pd.DataFrame:
    """Build the table of predictions (see `predictions.py`) of a run.

    Args:
        run: the run directory.
        index: one row per site.
        predictions: probabilities of these sites.
        part: train, test or new, for each site or for all.
        sets: columns of prediction sets, see `run_sets.set_columns`; or None.
    """
    label = index[run.label_column] if run.label_column in index.columns else ""
    return predictions_table(
        index, predictions.probabilities, run.class_names, part=part, label=label, sets=sets
    )


def features_table(
    run: Run, index: pd.DataFrame, part: np.ndarray, features: np.ndarray
) -> pd.DataFrame:
    """Build the table of features: `Metadata_*` columns, then one column per network feature.

    The metadata include `Metadata_site_id` and `Metadata_part`.
    """
    columns = [column for column in index.columns if column.startswith("Metadata_")]
    metadata = index[columns].assign(Metadata_site_id=index["site_id"], Metadata_part=part)
    names = feature_names([run.recipe.model.model], features.shape[1])
    return pd.concat(
        [metadata.reset_index(drop=True), pd.DataFrame(features, columns=names)], axis=1
    )
