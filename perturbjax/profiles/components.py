"""Principal components of features, balanced against the image statistics of a dataset."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from perturbjax.profiles.profile_table import STATISTIC
from perturbjax.profiles.table_steps import TableStep, feature_names, select_names


class Components(TableStep):
    """Replace features by their first principal components.

    Image statistics of a dataset's index stay unchanged: a few of them would have no weight
    among the thousands of features of a network.

    Args:
        count: number of components; limited by the number of rows and features.
        seed: seed of the randomized solver.
    """

    def __init__(self, count: int = 50, seed: int = 0):
        self.count = count
        self.seed = seed

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        self.kept_ = _statistics_mask(X)
        rest = values[:, ~self.kept_]
        self.pca_ = PCA(min(self.count, *rest.shape), random_state=self.seed).fit(rest)

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        components = self.pca_.transform(values[:, ~self.kept_])
        names = [f"component_{i}" for i in range(components.shape[1])]
        combined = np.concatenate([components, values[:, self.kept_]], axis=1)
        return combined, names + select_names(X, self.kept_)


class VarianceBalancer(TableStep):
    """Scale image statistics, and all other features, to the same total variance.

    Args:
        variance: sum of the variances of either part over the training rows, > 0.
    """

    def __init__(self, variance: float):
        self.variance = variance

    def _fit(self, values: np.ndarray, X: pd.DataFrame) -> None:
        statistic = _statistics_mask(X)
        self.gain_ = np.ones(values.shape[1])
        for part in (statistic, ~statistic):
            total = values[:, part].var(axis=0).sum()
            self.gain_[part] = np.sqrt(self.variance / total) if total > 0 else 1.0

    def _transform(self, values: np.ndarray, X: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        return values * self.gain_, feature_names(X)


def _statistics_mask(X: pd.DataFrame) -> np.ndarray:
    return np.array([name.startswith(STATISTIC) for name in feature_names(X)])
