"""Inner folds of the training plates or wells, for choices that do not use test sites."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.data import splits
from perturbjax.dataset import PLATE

#: Numbers of outer and of inner folds.
OUTER, INNER = 5, 3


def inner_folds(
    metadata: pd.DataFrame, label: str, fold: int
) -> Iterator[tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"], np.ndarray]]:
    """Split the training plates of one outer fold into inner folds.

    With fewer than five plates, training wells take the place of training plates.

    Args:
        metadata: one row per site.
        label: metadata column of the classes.
        fold: number of the outer fold; its test plates are in no inner fold.

    Yields:
        Rows to fit, rows to evaluate, and the plates or wells of the rows to fit.
    """
    policy = "plate" if metadata[PLATE].nunique() >= OUTER else "well"
    outer = splits.make_split(metadata, policy, label=label, folds=OUTER, fold=fold, seed=0)
    train = np.flatnonzero(outer["part"] == splits.TRAIN)
    for inner in range(INNER):
        split = splits.make_split(
            metadata.iloc[train], policy, label=label, folds=INNER, fold=inner, seed=1
        )
        test = (split["part"] == splits.TEST).to_numpy()
        yield train[~test], train[test], split["group"].to_numpy()[~test]


def score(truth: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Compute accuracy, and balanced accuracy over the classes that occur."""
    correct = truth == predicted
    return {
        "accuracy": correct.mean(),
        "balanced_accuracy": pd.Series(correct).groupby(truth).mean().mean(),
    }
