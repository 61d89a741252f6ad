"""One-cycle learning rate and Adam with the numbers of PyTorch, as an optax transformation.

**Schedule** (`torch.optim.lr_scheduler.OneCycleLR`, cosine; Smith & Topin 2019, arXiv 1708.07120).
With `T` steps, peak `p = warmup * T - 1` and `h(a, b, x) = b + (a - b) / 2 * (1 + cos(pi * x))`:

    rate(t) = h(max / 25, max, t / p)                              for t <= p
    rate(t) = h(max, max / 25 / 1e4, (t - p) / (T - 1 - p))        for t > p

beta1 of Adam moves opposite to the learning rate, from 0.95 to 0.85 and back.

**Adam** (Kingma & Ba 2015, algorithm 1). With gradient `g` and step number `k` from 1:

    m = beta1 * m + (1 - beta1) * g        v = beta2 * v + (1 - beta2) * g^2
    w = w - rate * m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + epsilon)

`optax.cosine_onecycle_schedule` has its peak at another step, and `optax.adam` keeps beta1
constant. Both would change the results of the published training, so this module implements the
PyTorch versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from perturbjax.core.config import OptimConfig
from perturbjax.core.errors import InputError

#: Function from a step (from 0) to a float32 value; accepts Python integers and traced arrays.
Schedule = Callable[[int | Int[Array, ""]], Float[Array, ""]]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
#: beta1 at the peak of the learning rate, and at the first and last step.
BETA1_RANGE = (0.85, 0.95)


class AdamState(NamedTuple):
    """Number of steps, and running means of the gradient and of the squared gradient."""

    count: Int[Array, ""]  # type: ignore[assignment]
    mean: optax.Params
    square: optax.Params


def one_cycle(
    max_value: float,
    total_steps: int,
    warmup: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    """Return the learning rate of each step, equal to `torch.optim.lr_scheduler.OneCycleLR`.

    Args:
        max_value: peak learning rate.
        total_steps: number of steps; later steps have the value of the last one.
        warmup: fraction of the steps in which the rate rises.
        div_factor: peak rate divided by the first rate.
        final_div_factor: first rate divided by the last rate.

    Raises:
        InputError: `total_steps` is 0 or `warmup` is not in [0, 1].
    """
    # As in PyTorch, the last rate is relative to the first rate, not to the peak.
    start = max_value / div_factor
    return _cosine_schedule(start, max_value, start / final_div_factor, total_steps, warmup)


def one_cycle_momentum(
    total_steps: int, warmup: float = 0.3, low: float = BETA1_RANGE[0], high: float = BETA1_RANGE[1]
) -> Schedule:
    """Return beta1 of Adam for each step: `high` at both ends, `low` at the peak rate.

    Raises:
        InputError: `total_steps` is 0 or `warmup` is not in [0, 1].
    """
    return _cosine_schedule(high, low, high, total_steps, warmup)


def _cosine_schedule(
    start: float, peak: float, end: float, total_steps: int, warmup: float
) -> Schedule:
    """Return two half cosines, start to peak to end, as a lookup table."""
    if total_steps < 1:
        raise InputError("--epochs: the training has no steps; at least one is required")
    if not 0 <= warmup <= 1:
        raise InputError(f"--warmup {warmup}: must be a fraction from 0 to 1")
    # The peak is a real number as in PyTorch, so it can fall between two steps.
    peak_step, last = warmup * total_steps - 1, total_steps - 1
    # The table is computed in float64 and rounded once: a float32 cosine would differ from torch by
    # 1e-9.
    steps = np.arange(total_steps, dtype=np.float64)
    rising = _half_cosine(start, peak, steps, 0.0, peak_step)
    falling = _half_cosine(peak, end, steps, peak_step, last)
    table = np.where(steps <= peak_step, rising, falling).astype(np.float32)
    # A lookup also accepts traced steps. Steps after the end get the last value.
    return lambda step: jnp.take(table, step, mode="clip")


def _half_cosine(
    start: float, end: float, steps: Float[np.ndarray, " n"], first: float, last: float
) -> Float[np.ndarray, " n"]:
    # Progress through the half cosine: 0 at `first`, 1 at `last`.
    fraction = (steps - first) / (last - first) if last != first else np.ones_like(steps)
    return end + (start - end) / 2 * (np.cos(math.pi * fraction) + 1)


def constant(value: float) -> Schedule:
    """Return a schedule with the same value at every step."""
    return lambda step: jnp.float32(value)


def adam(
    schedule: Schedule,
    beta1_schedule: Schedule,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    *,
    beta2: float = BETA2,
    epsilon: float = EPSILON,
) -> optax.GradientTransformation:
    """Return `torch.optim.Adam` (L2 term in the gradient) or, if `decoupled`, `torch.optim.AdamW`.

    As in PyTorch, epsilon is added after bias correction, and both means are corrected with the
    betas of the current step, also if beta1 changes. The state is float32, whatever the type of the
    gradients.

    Args:
        schedule: learning rate of each step.
        beta1_schedule: beta1 of each step.
        weight_decay: coefficient of the L2 term or of the decoupled decay.
        decoupled: decay the weights directly (Loshchilov & Hutter 2019, algorithm 2).
    """

    def init(params: optax.Params) -> AdamState:
        # float32 moments also for bfloat16 parameters. The copy below gives each moment a separate
        # buffer, because JAX cannot donate the same buffer twice.
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(
        gradients: optax.Updates, state: AdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamState]:
        if weight_decay and params is None:
            raise ValueError(
                "adam: weight decay requires parameters; call update(gradients, state, params)"
            )
        # Schedules count steps from 0, the bias correction from 1.
        rate, beta1 = schedule(state.count), beta1_schedule(state.count)
        count = optax.safe_increment(state.count)
        # Adam: the L2 term is part of the gradient and therefore of both running means.
        if weight_decay and not decoupled:
            gradients = jax.tree.map(lambda g, p: g + weight_decay * p, gradients, params)
        # Equal to beta1 * m + (1 - beta1) * g, in the form of `torch.lerp` that PyTorch uses.
        mean = jax.tree.map(lambda m, g: m + (1 - beta1) * (g - m), state.mean, gradients)
        square = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, gradients)
        # 1 - beta**count by expm1: plain float32 subtraction loses five digits at the first step.
        correction1 = -jnp.expm1(count * jnp.log(beta1))
        correction2 = -jnp.expm1(count * math.log(beta2))
        # The order of operations is that of PyTorch: epsilon is added to the corrected root.
        scale, root = rate / correction1, jnp.sqrt(correction2)
        updates = jax.tree.map(
            lambda m, v: -scale * m / (jnp.sqrt(v) / root + epsilon), mean, square
        )
        # AdamW: the decay is scaled by the learning rate, but not by the running means.
        if weight_decay and decoupled:
            updates = jax.tree.map(lambda u, p: u - rate * weight_decay * p, updates, params)
        return updates, AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def make_optimizer(optim: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Build the optimizer of a recipe for `total_steps` steps.

    Raises:
        InputError: the number of steps or the warm-up is not valid.
    """
    rate = one_cycle(optim.learning_rate, total_steps, optim.warmup)
    beta1 = one_cycle_momentum(total_steps, optim.warmup)
    if not optim.cycle_momentum:
        beta1 = constant(BETA1)
    return adam(rate, beta1, optim.weight_decay, optim.decoupled)
