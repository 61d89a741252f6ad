"""Bag classifier: gated attention over the cells of a site."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perturbjax import models
from perturbjax.core.errors import InputError
from perturbjax.models.bags import BagClassifier, Bags
from perturbjax.models.layers import Mode
from perturbjax.training.step import split_model

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def network():
    return BagClassifier(models.create("attention", classes=3, channels=2), seed=1)


def make_bags(counts, slots, seed=0) -> Bags:
    """Bags with the given numbers of cells; padding has zeros."""
    windows = jax.random.normal(jax.random.key(seed), (len(counts), max(slots, 6), 16, 16, 3))
    present = np.arange(slots) < np.array(counts)[:, None]
    windows = windows[:, :slots] * present[:, :, None, None, None]
    return Bags(windows, jnp.asarray(present))


def test_prediction_depends_neither_on_padding_nor_on_order(network):
    few, many = make_bags([3, 4], 4), make_bags([3, 4], 6)
    expected = network(few, Mode())
    padded = network(many, Mode())
    np.testing.assert_allclose(padded.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(padded.cell_attention[:, :4], expected.cell_attention, atol=1e-6)
    order = jnp.array([2, 0, 3, 1])
    permuted = network(Bags(few.windows[:, order], few.present[:, order]), Mode())
    np.testing.assert_allclose(permuted.logits, expected.logits, atol=1e-5)
    alone = network(Bags(few.windows[1:], few.present[1:]), Mode())
    np.testing.assert_allclose(alone.logits[0], expected.logits[1], atol=1e-5)


def test_attention_is_a_distribution_over_cells(network):
    weights = np.asarray(network(make_bags([1, 0, 5], 6), Mode()).cell_attention)
    np.testing.assert_allclose(weights.sum(1), [1, 0, 1], atol=1e-6)
    assert (weights[0, 1:] == 0).all() and (weights[2, :5] > 0).all() and weights[2, 5] == 0


@pytest.mark.parametrize("counts", [[2, 0], [0, 0]])
def test_bags_without_cells_have_finite_predictions_and_gradients(network, counts):
    graphdef, params, stats = split_model(network)
    bags = make_bags(counts, 4)

    def loss(params, windows):
        model = nnx.merge(graphdef, params, stats, copy=True)
        outputs = model(Bags(windows, bags.present), Mode(train=True, weight=jnp.ones(2)))
        return jax.nn.log_softmax(outputs.logits)[:, 0].sum()

    value, (by_params, by_windows) = jax.value_and_grad(loss, (0, 1))(params, bags.windows)
    leaves = [value, *jax.tree.leaves(by_params)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    # Padding has no influence, although BatchNorm uses statistics of the batch.
    assert sum(counts) == 0 or not np.asarray(by_windows)[~np.asarray(bags.present)].any()


def test_networks_without_features_of_cells_are_refused():
    with pytest.raises(
        InputError, match=r"cannot be applied to single cells\. Use --model attention"
    ):
        BagClassifier(models.create("masked_cnn", classes=2, image_size=16), seed=0)
