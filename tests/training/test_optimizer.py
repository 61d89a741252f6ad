"""Comparison of the one-cycle schedule, Adam and the loss with PyTorch, number by number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from perturbjax.core.config import OptimConfig
from perturbjax.core.errors import InputError
from perturbjax.training.loss import class_weights, cross_entropy
from perturbjax.training.optimizer import (
    adam,
    constant,
    make_optimizer,
    one_cycle,
    one_cycle_momentum,
)

PAPER_STEPS = 200 * 18


def torch_schedule(max_lr: float, total_steps: int, warmup: float) -> tuple[np.ndarray, np.ndarray]:
    """Return learning rates and beta1 of OneCycleLR, float64."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps=total_steps, pct_start=warmup
    )
    rates, betas = [], []
    for step in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()
    return np.array(rates), np.array(betas)


@pytest.mark.parametrize(
    ("max_lr", "total_steps", "warmup"),
    [
        (0.005, PAPER_STEPS, 0.3),
        (0.005, 1, 0.3),
        (0.001, 2, 0.3),
        (0.003, 7, 0.25),
        (0.005, 101, 0.0),
        (0.005, 50, 1.0),
    ],
)
def test_one_cycle_equals_torch_at_every_step(max_lr, total_steps, warmup):
    rates, betas = torch_schedule(max_lr, total_steps, warmup)
    steps = jnp.arange(total_steps)
    ours = jax.jit(jax.vmap(one_cycle(max_lr, total_steps, warmup)))(steps)
    momentum = jax.jit(jax.vmap(one_cycle_momentum(total_steps, warmup)))(steps)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(ours, np.float64), rates, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.asarray(momentum, np.float64), betas, rtol=0, atol=1e-7)


def test_one_cycle_keeps_last_value_after_the_end():
    rate = one_cycle(0.005, 10)
    assert float(rate(10)) == float(rate(9)) == float(rate(1000))
    assert float(rate(9)) == pytest.approx(0.005 / 25 / 1e4)


def test_one_cycle_rejects_invalid_steps_and_warmup():
    with pytest.raises(InputError, match="at least one"):
        one_cycle(0.005, 0)
    with pytest.raises(InputError, match="--warmup"):
        one_cycle(0.005, 10, warmup=1.5)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("cycle_momentum", [False, True])
def test_adam_equals_torch(decoupled, cycle_momentum):
    """60 steps on recorded gradients within 1e-6. Gradients span ten orders of magnitude, so that
    epsilon matters.
    """
    steps, recipe = (
        60,
        OptimConfig(
            learning_rate=0.01, weight_decay=0.1, decoupled=decoupled, cycle_momentum=cycle_momentum
        ),
    )
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 30)).astype(np.float32)
    gradients = (
        rng.normal(size=(steps, 4, 30)) * 10.0 ** rng.integers(-10, 1, size=(4, 30))
    ).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind([parameter], weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        theirs, recipe.learning_rate, total_steps=steps, cycle_momentum=cycle_momentum
    )
    optimizer = make_optimizer(recipe, steps)
    ours, state = {"w": jnp.asarray(start)}, optimizer.init({"w": jnp.asarray(start)})
    update = jax.jit(optimizer.update)
    for step, gradient in enumerate(gradients):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        theirs.step()
        if step < steps - 1:
            scheduler.step()
        updates, state = update({"w": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    change = np.abs(parameter.detach().numpy() - start)
    assert change.min() > 1e-4
    np.testing.assert_allclose(ours["w"], parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
    assert int(state.count) == steps


def test_first_adam_step_has_size_of_learning_rate():
    optimizer = adam(constant(0.01), constant(0.95))
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    updates, _ = optimizer.update(
        {"w": jnp.array([5.0, -3.0, 1e-3])}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["w"], [-0.01, 0.01, -0.01 * 1e-3 / (1e-3 + 1e-8)], rtol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_equal_torch(smoothing, weighted):
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=4, size=(9, 5)).astype(np.float32)
    labels = rng.integers(0, 5, 9)
    class_weight = rng.uniform(0.2, 3, 5).astype(np.float32) if weighted else None
    padding = np.array([1] * 7 + [0] * 2, np.float32)

    theirs = torch.tensor(logits[:7], requires_grad=True)
    loss = torch.nn.CrossEntropyLoss(
        weight=None if class_weight is None else torch.tensor(class_weight),
        label_smoothing=smoothing,
    )(theirs, torch.tensor(labels[:7]))
    loss.backward()

    def mean(x):
        ours = jax.tree.map(
            jnp.asarray, {"labels": labels, "weight": padding, "class_weight": class_weight}
        )
        total, weight = cross_entropy(x, **ours, smoothing=smoothing)
        return total / weight

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(logits))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient[:7], theirs.grad.numpy(), rtol=1e-5, atol=1e-7)
    assert not np.any(np.asarray(gradient[7:])), "padding rows have a gradient"


def test_class_weights_balance_classes():
    counts = np.array([64, 1, 5, 0])
    weights = class_weights(counts, 1.0)
    np.testing.assert_allclose((weights * counts)[:3], (weights * counts)[0], rtol=1e-6)
    assert weights[3] == 1
    np.testing.assert_array_equal(class_weights(counts, 0.0), 1)
