"""PLDA (probabilistic linear discriminant analysis): many classes with few replicates each.

LDA takes the mean of a class's replicates as its true center. With three replicates that mean is
uncertain, and the prior of LDA then favors classes with many replicates, such as negative controls.
PLDA models the center of each class as a draw from a normal distribution. The center of a class
with few rows is shrunk towards the overall mean, and its predictions are wider.

Model (two covariances, Ioffe 2006, doi:10.1007/11744085_41): a row of class c is x = m_c + e with
m_c ~ N(m, B) between classes and e ~ N(0, W) within classes. After a change of coordinates with W =
1 and B = diag(ψ), a new row of a class with n training rows of mean x̄ is distributed as N(nψ/(nψ +
1) x̄, 1 + ψ/(nψ + 1)).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_triangular
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

#: Minimum ratio of between-class to within-class variance; directions below it do not distinguish
#: classes.
_MIN_SIGNAL = 1e-3


class PLDA(ClassifierMixin, BaseEstimator):
    """PLDA with covariances estimated by moments.

    W is the pooled within-class covariance, shrunk towards a multiple of the identity. B is the
    covariance of class means minus the part that W explains.

    Args:
        shrinkage: weight of the identity in W, in (0, 1].
        noise: factor on W; above 1 if new plates differ more from training plates than these from
            each other.
        prior: exponent of the training frequencies as prior probabilities: 0 for equal priors, 1
            for frequencies.

    Raises:
        ValueError: No class has two rows, or the rows of each class are identical.
    """

    def __init__(self, shrinkage: float = 0.3, noise: float = 1.0, prior: float = 1.0):
        self.shrinkage = shrinkage
        self.noise = noise
        self.prior = prior

    def fit(self, X: Float[np.ndarray, "n d"], y: np.ndarray) -> PLDA:
        """Estimate W, B and the center of each class."""
        X = np.asarray(X, dtype=np.float64)
        self.classes_, labels, rows = np.unique(y, return_inverse=True, return_counts=True)
        if len(X) <= len(rows):
            raise ValueError("no class has two training rows")
        means = np.zeros((len(rows), X.shape[1]))
        np.add.at(means, labels, X)
        means /= rows[:, None]
        # Each class counts once. The many rows of negative controls do not pull the mean.
        self.mean_ = means.mean(axis=0)
        residual = X - means[labels]
        # One degree of freedom is lost for the mean of each class.
        within = residual.T @ residual / (len(X) - len(rows))
        variance = np.trace(within) / len(within)
        if variance <= 0:
            raise ValueError("the rows of each class are identical")
        within = self.noise * (
            (1 - self.shrinkage) * within + self.shrinkage * variance * np.eye(len(within))
        )
        # Whiten W by its Cholesky factor. B plus the mean of W/n is then spanned by the class
        # means, so the singular vectors of the means are its axes.
        factor = np.linalg.cholesky(within)
        centered = solve_triangular(factor, (means - self.mean_).T, lower=True).T
        _, singular, axes = np.linalg.svd(centered, full_matrices=False)
        # ψ of each axis: the variance of the class means minus the mean of W/n, where W = 1.
        signal = singular**2 / max(len(rows) - 1, 1) - np.mean(1 / rows)
        distinct = signal > _MIN_SIGNAL
        signal, axes = signal[distinct], axes[distinct].T
        # With the Cholesky factor L, (x - m) L^(-T) whitens a row. The projection includes the
        # axes: (d, axes).
        self.projection_ = solve_triangular(factor, axes, lower=True, trans="T")
        # nψ of each class and axis, (classes, axes).
        precision = rows[:, None] * signal
        self.centers_ = precision / (precision + 1) * (centered @ axes)
        self.variances_ = 1 + signal / (precision + 1)
        self.log_prior_ = self.prior * np.log(rows / rows.sum())
        return self

    def decision_function(self, X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """Return the logarithm of prior times likelihood, up to a constant per row."""
        z = (np.asarray(X, dtype=np.float64) - self.mean_) @ self.projection_
        precision = 1 / self.variances_
        # Sum over axes of (z - center)² / variance, expanded into matrix products. This avoids an
        # array of shape (n, classes, axes).
        squared = (
            z**2 @ precision.T
            - 2 * z @ (self.centers_ * precision).T
            + (self.centers_**2 * precision).sum(axis=1)
        )
        return self.log_prior_ - 0.5 * (squared + np.log(self.variances_).sum(axis=1))

    def predict_proba(self, X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """Return posterior probabilities; overconfident if new rows vary more than W."""
        return softmax(self.decision_function(X), axis=1)

    def predict(self, X: Float[np.ndarray, "n d"]) -> np.ndarray:
        """Return the most probable class."""
        return self.classes_[self.decision_function(X).argmax(axis=1)]
