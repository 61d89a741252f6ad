"""The training loss: cross-entropy with smoothed labels, weighted by site and by class."""

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
    """The weighted sum of the losses, and the weight they sum to.

    The mean is `sum / weight`; on several devices both are summed first. That mean is
    `torch.nn.CrossEntropyLoss(weight=class_weight, label_smoothing=smoothing)`: the target keeps
    `1 - smoothing` and spreads `smoothing` evenly over all classes, its own too (Szegedy et al. 2016,
    section 7); a class's weight multiplies its share of the target, and the mean divides by the weights
    of the true classes.

    `weight` is 1 for a site and 0 for padding.
    """
    classes = logits.shape[-1]
    target = (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
    counted = jnp.ones(len(labels)) if weight is None else weight
    if class_weight is not None:
        target = target * class_weight
    losses = -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1) * counted
    if class_weight is not None:
        counted = counted * jnp.asarray(class_weight)[labels]
    return losses.sum(), counted.sum()


def class_weights(
    counts: Int[np.ndarray, " classes"], power: float
) -> Float[np.ndarray, " classes"]:
    """Weights against the imbalance of the training sites: all 1 at power 0, classes equal in sum at 1.

    `counts` are training sites a class; a class without any weighs 1.
    """
    counts = np.asarray(counts, np.float64)
    even = counts.sum() / max(np.count_nonzero(counts), 1)
    return np.where(counts > 0, (even / np.maximum(counts, 1)) ** power, 1.0).astype(np.float32)
