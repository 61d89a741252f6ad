"""Multinomial logistic regression by L-BFGS, for baselines."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

#: Maximum number of L-BFGS iterations; the probabilities converge much earlier.
_STEPS = 200


def standardized_logistic(
    x: Float[np.ndarray, "train d"],
    train_labels: Int[np.ndarray, " train"],
    z: Float[np.ndarray, "test d"],
    classes: int,
) -> Float[np.ndarray, "test classes"]:
    """Fit `logistic` on columns standardized on `x`; absent classes get probability 0."""
    center, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
    present, targets = np.unique(train_labels, return_inverse=True)
    probabilities = np.zeros((len(z), classes))
    probabilities[:, present] = logistic((x - center) / scale, targets, (z - center) / scale)
    return probabilities


def logistic(
    x: Float[np.ndarray, "train d"],
    targets: Int[np.ndarray, " train"],
    z: Float[np.ndarray, "test d"],
) -> Float[np.ndarray, "test classes"]:
    """Fit multinomial logistic regression by L-BFGS and predict probabilities of `z`.

    The objective is the summed log loss plus half the squared weights (intercepts excluded).

    Args:
        x: training features, columns with standard deviation of about 1.
        targets: class numbers from 0; every class occurs.
        z: test features.
    """
    # Imported here, because the import takes half a second and `predict` does not need it.
    from scipy.optimize import minimize

    n, (d, classes) = len(x), (x.shape[1], int(targets.max()) + 1)
    one_hot = np.zeros((n, classes))
    one_hot[np.arange(n), targets] = 1

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        # L-BFGS needs one vector: the intercepts come first, then the weights row by row.
        weights, intercepts = flat[classes:].reshape(d, classes), flat[:classes]
        logits = x @ weights + intercepts
        # Subtracting the maximum prevents an overflow of exp and does not change the softmax.
        logits -= logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        # Gradient of the log loss with respect to the logits: predicted minus true probability.
        error = np.exp(logits - log_sum) - one_hot
        log_loss = (log_sum[:, 0] - logits[np.arange(n), targets]).sum()
        gradient = np.concatenate([error.sum(axis=0), (x.T @ error + weights).ravel()])
        return float(log_loss + 0.5 * (weights**2).sum()), gradient

    start, options = np.zeros(classes * (d + 1)), {"maxiter": _STEPS}
    fit = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return softmax(z @ fit[classes:].reshape(d, classes) + fit[:classes])


def softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Convert logits to probabilities, row by row."""
    likelihood = np.exp(logits - logits.max(axis=1, keepdims=True))
    return likelihood / likelihood.sum(axis=1, keepdims=True)
