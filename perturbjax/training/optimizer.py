"""How parameters move: torch's one-cycle schedule and torch's Adam, as an optax transformation.

optax's own `cosine_onecycle_schedule` places the peak elsewhere than `torch.optim.lr_scheduler.OneCycleLR`,
and its `adam` keeps beta1 constant; the original trained with torch's, so both are written out here.
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

#: A step, counted from 0 → a float32 value; works on Python integers and inside jit.
Schedule = Callable[[int | Int[Array, ""]], Float[Array, ""]]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
#: Range of beta1 where momentum is cycled: the greater at both ends, the lesser at the peak.
BETA1_RANGE = (0.85, 0.95)


class AdamState(NamedTuple):
    """Steps taken, and the running means of the gradient and of its square."""

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
    """The learning rate of every step, as `torch.optim.lr_scheduler.OneCycleLR` with its cosine default.

    It rises from `max_value / div_factor` to `max_value` in the first `warmup` share of the steps, and falls
    to `max_value / div_factor / final_div_factor`. Steps past the last hold the last value.

    Raises:
        InputError: there is not one step, or `warmup` is not a share.
    """
    start = max_value / div_factor
    return _two_phases(start, max_value, start / final_div_factor, total_steps, warmup)


def one_cycle_momentum(
    total_steps: int, warmup: float = 0.3, low: float = BETA1_RANGE[0], high: float = BETA1_RANGE[1]
) -> Schedule:
    """Adam's beta1 of every step, moving against the learning rate: high, low at the peak, high.

    Raises:
        InputError: there is not one step, or `warmup` is not a share.
    """
    return _two_phases(high, low, high, total_steps, warmup)


def _two_phases(
    start: float, middle: float, end: float, total_steps: int, warmup: float
) -> Schedule:
    """Two half cosines, start → middle → end, meeting where OneCycleLR has them meet.

    The values are computed once in float64 and rounded, for a float32 cosine would be 1e-9 off the mark.
    """
    if total_steps < 1:
        raise InputError(f"--epochs: {total_steps} steps of training; there must be at least one")
    if not 0 <= warmup <= 1:
        raise InputError(f"--warmup {warmup}: must be a share between 0 and 1")
    peak, last = warmup * total_steps - 1, total_steps - 1
    steps = np.arange(total_steps, dtype=np.float64)
    rising = _half_cosine(start, middle, steps, 0.0, peak)
    falling = _half_cosine(middle, end, steps, peak, last)
    table = np.where(steps <= peak, rising, falling).astype(np.float32)
    return lambda step: jnp.take(table, step, mode="clip")


def _half_cosine(
    start: float, end: float, steps: Float[np.ndarray, " n"], first: float, last: float
) -> Float[np.ndarray, " n"]:
    share = (steps - first) / (last - first) if last != first else np.ones_like(steps)
    return end + (start - end) / 2 * (np.cos(math.pi * share) + 1)


def constant(value: float) -> Schedule:
    """The same value at every step."""
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
    """`torch.optim.Adam` (L2 added to the gradient), or `torch.optim.AdamW` where `decoupled`.

    As in torch, epsilon is added after the square root is bias-corrected, and both means are corrected by
    the betas of the current step even where beta1 has moved (Kingma & Ba 2015, algorithm 1; Loshchilov &
    Hutter 2019, algorithm 2). The state is float32 whatever the gradients are.
    """

    def init(params: optax.Params) -> AdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(
        gradients: optax.Updates, state: AdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamState]:
        if weight_decay and params is None:
            raise ValueError(
                "adam: weight decay needs the parameters; call update(gradients, state, params)"
            )
        rate, beta1 = schedule(state.count), beta1_schedule(state.count)
        count = optax.safe_increment(state.count)
        if weight_decay and not decoupled:
            gradients = jax.tree.map(lambda g, p: g + weight_decay * p, gradients, params)
        mean = jax.tree.map(lambda m, g: m + (1 - beta1) * (g - m), state.mean, gradients)
        square = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, gradients)
        # 1 - beta**count, without the cancellation that costs float32 five digits at the first step.
        correction1 = -jnp.expm1(count * jnp.log(beta1))
        correction2 = -jnp.expm1(count * math.log(beta2))
        scale, root = rate / correction1, jnp.sqrt(correction2)
        updates = jax.tree.map(
            lambda m, v: -scale * m / (jnp.sqrt(v) / root + epsilon), mean, square
        )
        if weight_decay and decoupled:
            updates = jax.tree.map(lambda u, p: u - rate * weight_decay * p, updates, params)
        return updates, AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def schedules(optim: OptimConfig, total_steps: int) -> tuple[Schedule, Schedule]:
    """The learning rate and beta1 of every step of a recipe."""
    rate = one_cycle(optim.learning_rate, total_steps, optim.warmup)
    return rate, one_cycle_momentum(
        total_steps, optim.warmup
    ) if optim.cycle_momentum else constant(BETA1)


def make_optimizer(optim: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a recipe, for a run of `total_steps` steps.

    Raises:
        InputError: the recipe's steps or warm-up cannot be scheduled.
    """
    rate, beta1 = schedules(optim, total_steps)
    return adam(rate, beta1, optim.weight_decay, optim.decoupled)
