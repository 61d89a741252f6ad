"""Probabilistic linear discriminant analysis: a classifier for many classes of few replicates each.

Ordinary LDA takes the mean of three replicates for the class's true centre, and its bias term then favours whatever has
many replicates (negative controls). Here a class's centre is itself drawn from a Gaussian, so a class seen three times
is known to be known badly: its centre is drawn towards the middle and its prediction is wider.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_triangular
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

#: Between-class variance, in units of the within-class one, below which a direction tells classes apart not at all.
_LEAST_SIGNAL = 1e-3


class PLDA(ClassifierMixin, BaseEstimator):
    """Two-covariance PLDA (Ioffe 2006, doi:10.1007/11744085_41), its covariances found by moments.

    Row x of class c is m_c + noise, with noise ~ N(0, W) and m_c ~ N(m, B). W is the pooled within-class covariance,
    shrunk towards a multiple of the identity; B is the covariance of class means less what W alone makes them vary. In
    coordinates where W = 1 and B = diag(ψ), a class with n rows of mean x̄ predicts new rows as
    N(nψ/(nψ + 1) x̄, 1 + ψ/(nψ + 1)).

    Args:
        shrinkage: share of the identity in W, in (0, 1].
        noise: factor on W: above 1 where new plates differ from the training plates more than these from each other.
        prior: power of the training frequencies as prior probabilities: 0 all classes alike, 1 as they occur.

    Raises:
        ValueError: no class has two rows, so that nothing is known of the noise.
    """

    def __init__(self, shrinkage: float = 0.3, noise: float = 1.0, prior: float = 1.0):
        self.shrinkage = shrinkage
        self.noise = noise
        self.prior = prior

    def fit(self, X: Float[np.ndarray, "n d"], y: np.ndarray) -> PLDA:
        """Estimate W, B and every class's centre."""
        X = np.asarray(X, dtype=np.float64)
        self.classes_, labels, rows = np.unique(y, return_inverse=True, return_counts=True)
        if len(X) <= len(rows):
            raise ValueError("no class has two training rows")
        means = np.zeros((len(rows), X.shape[1]))
        np.add.at(means, labels, X)
        means /= rows[:, None]
        self.middle_ = means.mean(axis=0)
        residual = X - means[labels]
        within = residual.T @ residual / (len(X) - len(rows))
        size = np.trace(within) / len(within)
        if size <= 0:
            raise ValueError("rows of one class are all alike")
        within = self.noise * (
            (1 - self.shrinkage) * within + self.shrinkage * size * np.eye(len(within))
        )
        # Whitening by the Cholesky factor; then B + mean(1/n) is spanned by the class means, so its axes are theirs.
        factor = np.linalg.cholesky(within)
        centred = solve_triangular(factor, (means - self.middle_).T, lower=True).T
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        signal = singular**2 / max(len(rows) - 1, 1) - np.mean(1 / rows)
        kept = signal > _LEAST_SIGNAL
        signal, axes = signal[kept], axes[kept].T
        self.project_ = solve_triangular(factor, axes, lower=True, trans="T")
        known = rows[:, None] * signal
        self.centres_ = known / (known + 1) * (centred @ axes)
        self.variances_ = 1 + signal / (known + 1)
        self.log_prior_ = self.prior * np.log(rows / rows.sum())
        return self

    def decision_function(self, X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """Log of prior times likelihood, up to a constant a row."""
        z = (np.asarray(X, dtype=np.float64) - self.middle_) @ self.project_
        precision = 1 / self.variances_
        squared = (
            z**2 @ precision.T
            - 2 * z @ (self.centres_ * precision).T
            + (self.centres_**2 * precision).sum(axis=1)
        )
        return self.log_prior_ - 0.5 * (squared + np.log(self.variances_).sum(axis=1))

    def predict_proba(self, X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """Posterior probabilities; too sure where rows differ in ways that W does not hold."""
        return softmax(self.decision_function(X), axis=1)

    def predict(self, X: Float[np.ndarray, "n d"]) -> np.ndarray:
        """The most probable class."""
        return self.classes_[self.decision_function(X).argmax(axis=1)]
