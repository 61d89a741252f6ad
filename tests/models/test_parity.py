"""The original's three networks match PyTorch: logits, gradients and running statistics."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference.pairs import Pair, batches, criterion, loss_and_gradients, make_pair, to_torch

from perturbjax import models
from perturbjax.models.layers import max_pool

NAMES = ["attention", "attention_multiscale", "masked_cnn"]
#: (height, width, image channels); the last network has a fixed, square input.
SIZES = {name: [(32, 32, 1), (31, 45, 1), (9, 8, 3)] for name in NAMES[:2]} | {
    "masked_cnn": [(128, 128, 1), (45, 45, 2)]
}
#: The training tests compare smaller square inputs; these take the longest.
LARGE = [(32, 32, 1), (128, 128, 1)]
TRAIN_SIZE = 16


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory) -> tuple:
    """A pair, and the compiled loss and gradients of the JAX network in float32."""
    pair = make_pair(request.param, tmp_path_factory.mktemp("pair"), size=TRAIN_SIZE)
    return pair, loss_and_gradients(pair, jnp.float32)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.full] if size in LARGE else [])
        for name in NAMES
        for size in SIZES[name]
    ],
)
def test_evaluation_logits_match_torch_within_1e_5(tmp_path, name, size):
    height, width, channels = size
    pair = make_pair(name, tmp_path, size=height, channels=channels)
    x = batches(1, 3, height, width, channels)[0][0]
    ours = np.asarray(pair.network()(jnp.asarray(x), models.Mode()).logits)
    theirs = pair.theirs.eval()(to_torch(x)).detach().numpy()
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_gradients_match_torch_within_1e_4(trained):
    """The tolerance is relative to the tensor's maximum gradient.

    The bias of a convolution before BatchNorm has gradient zero, so both programs compute rounding
    errors: the difference must be below 1e-5 of the network's maximum gradient. Some gradients
    nearly cancel (PyTorch's own error is 6e-5 in one of them, compared with float64): their
    tolerance is 1e-6 of the network's maximum gradient.
    """
    pair, compute = trained
    x, labels = batches(1, 8, TRAIN_SIZE, TRAIN_SIZE)
    (loss, _), gradients = compute(pair.params, pair.stats, x[0], labels[0])
    theirs = pair.theirs.train()
    theirs.zero_grad()
    expected = criterion()(theirs(to_torch(x[0])), torch.tensor(labels[0]))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    ours = pair.named(gradients)
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    cancelled = {
        name for name, p in theirs.named_parameters() if p.grad.abs().max() < 1e-5 * largest
    }
    assert all(name.endswith(".bias") for name in cancelled)
    for name, parameter in theirs.named_parameters():
        gradient = parameter.grad.numpy()
        tolerance = (
            1e-5 * largest
            if name in cancelled
            else max(1e-4 * np.abs(gradient).max(), 1e-6 * largest)
        )
        assert np.abs(ours[name] - gradient).max() <= tolerance, name


def test_running_statistics_match_torch_after_four_batches(trained):
    """Means and unbiased variances within 1e-5 relative, after four batches."""
    pair, compute = trained
    x, labels = batches(4, 8, TRAIN_SIZE, TRAIN_SIZE)
    theirs, stats = make_copy(pair), pair.stats
    for inputs, target in zip(x, labels, strict=True):
        stats = compute(pair.params, stats, inputs, target)[0][1]
        theirs(to_torch(inputs))
    ours = pair.named(stats=stats)
    expected = {
        name: value.numpy() for name, value in theirs.state_dict().items() if "running" in name
    }
    start = pair.named()
    assert expected
    for name, value in expected.items():
        assert np.abs(value - start[name]).max() > 1e-2, f"{name} did not move"
        assert np.abs(ours[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def make_copy(pair: Pair) -> torch.nn.Module:
    theirs = copy.deepcopy(pair.theirs).train()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in pair.named().items()})
    return theirs


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_gradient_at_ties_matches_torch(size):
    """In windows of equal values the first one gets the whole gradient."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (2, size, size, 3)).astype(np.float32)
    weight = rng.normal(size=(2, size // 2, size // 2, 3)).astype(np.float32)
    ours = jax.jit(jax.grad(lambda x: (max_pool(x) * weight).sum()))(x)
    theirs = to_torch(x).requires_grad_()
    (torch.nn.functional.max_pool2d(theirs, 2) * to_torch(weight)).sum().backward()
    np.testing.assert_array_equal(np.moveaxis(np.asarray(ours), -1, 1), theirs.grad.numpy())


def test_fixed_size_network_refuses_other_sizes():
    network = models.create("masked_cnn", classes=2, channels=1, dropout=0.5, seed=0, image_size=16)
    with pytest.raises(ValueError, match="16×16 pixels, not 24×24"):
        network(jnp.zeros((1, 24, 24, 2)), models.Mode())
