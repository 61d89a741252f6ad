"""What a network of parts said is told apart again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.parts import apart
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import BRANCH_WEIGHT, EnsembleHead


def test_what_the_eyes_said_is_what_remains_of_the_whole_answer():
    head, random = EnsembleHead(20, 4, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    features = random.normal(size=(30, 20)).astype(np.float32)
    trainable_branch = jax.nn.log_softmax(jnp.asarray(random.normal(size=(30, 4))))
    both = jax.nn.log_softmax(head(jnp.asarray(features), Mode()))
    parts = apart(
        head,
        features,
        np.asarray(jax.nn.softmax((1 - BRANCH_WEIGHT) * both + BRANCH_WEIGHT * trainable_branch)),
    )
    np.testing.assert_allclose(jax.nn.log_softmax(parts["eyes"]), trainable_branch, atol=1e-4)
    np.testing.assert_allclose(parts["head"], both, atol=1e-6)
    np.testing.assert_array_equal(
        [parts["its perceptron"], parts["its linear model"]],
        head.log_probabilities(jnp.asarray(features), Mode()),
    )
