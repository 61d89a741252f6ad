"""Cross-entropy with label smoothing, site weights and class weights.

For logits `z`, true class `y`, smoothing `s` and `C` classes, the target distribution is
`t = (1 - s) * onehot(y) + s / C` (Szegedy et al. 2016, section 7). With class weights `c` and site
weights `w` (1 for a site, 0 for padding), the mean loss is

    sum_i w_i * sum_k c_k * t_ik * (-log softmax(z_i)_k)  /  sum_i w_i * c_{y_i}

This equals `torch.nn.CrossEntropyLoss(weight=c, label_smoothing=s)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Int[Array, " b"],
    *,
    smoothing: float = 0.0,
    weight: Float[Array, " b"] | None = None,
    class_weight: Float[Array, " classes"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the numerator and the denominator of the mean loss.

    They are returned separately so that several devices can sum both before dividing.

    Args:
        logits: (batch, classes) network outputs.
        labels: (batch,) class numbers.
        smoothing: part of the target spread evenly over all classes, in [0, 1).
        weight: (batch,) 1 for a site, 0 for padding; None counts every row.
        class_weight: (classes,) weight of each class; None weights all classes equally.

    Returns:
        The weighted sum of the losses and the sum of their weights, both float32 scalars.
    """
    classes = logits.shape[-1]
    target = (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
    row_weight = jnp.ones(len(labels)) if weight is None else weight
    if class_weight is not None:
        # As in PyTorch, the weight of class k scales the term of class k of the smoothed target.
        target = target * class_weight
    # float32 even if the network computes in bfloat16: log-probabilities lose accuracy otherwise.
    losses = -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1) * row_weight
    if class_weight is not None:
        # As in PyTorch, the denominator uses the weight of the true class only.
        row_weight = row_weight * jnp.asarray(class_weight)[labels]
    return losses.sum(), row_weight.sum()


def class_weights(
    counts: Int[np.ndarray, " classes"], power: float
) -> Float[np.ndarray, " classes"]:
    """Compute class weights against imbalance: `(mean count / count) ** power`.

    Args:
        counts: (classes,) number of training sites of each class.
        power: 0 weights all sites equally; 1 gives every class the same total weight.

    Returns:
        (classes,) float32 weights. A class without training sites has weight 1.
    """
    counts = np.asarray(counts, np.float64)
    # Mean over the classes with training sites.
    mean_count = counts.sum() / max(np.count_nonzero(counts), 1)
    weights = (mean_count / np.maximum(counts, 1)) ** power
    return np.where(counts > 0, weights, 1.0).astype(np.float32)
