"""Tests of training on eight devices; `test_devices.py` runs them in a process with eight emulated
devices.

The small network contains the layers that depend on the whole batch or on random numbers:
    BatchNorm, dropout and
max-pooling. Of 20 sites in batches of 12, the second batch has 8, and 12 is not a multiple of 8
devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from perturbjax.core.config import AugmentConfig, ModelConfig, OptimConfig, Recipe
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches import (
    BatchOrder,
    BatchRecords,
    ResidentArrays,
    ResidentBatches,
    gather,
    shuffle_epoch,
)
from perturbjax.models import Mode, Outputs
from perturbjax.models.attention import ConvBlock
from perturbjax.models.layers import BatchNorm, Dense, dropout
from perturbjax.training.apply_network import apply_to_sites
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.checkpoint_arrays import state_to_tree, tree_to_state
from perturbjax.training.devices import AXIS, Placement, choose_placement, stack_steps
from perturbjax.training.optimizer import make_optimizer
from perturbjax.training.step import (
    Sums,
    TrainState,
    initial_state,
    make_predict_step,
    make_train_step,
    split_model,
)

SITES, SIDE, BATCH, CLASSES, STEPS = 20, 12, 12, 3, 2
RECIPE = Recipe(
    model=ModelConfig(dropout=0.3),
    augment=AugmentConfig(crop=8),
    optim=OptimConfig(epochs=3, batch_size=BATCH, learning_rate=1e-3),
)
#: Tolerance for values near 1 after three epochs of Adam: float32 sums in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
KINDS = ("1", "pmap", "sharded")


class TinyNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.block, self.head = ConvBlock(2, 4, rngs=rngs), Dense(4, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, mode: Mode) -> Outputs:
        features = self.block(x.astype(mode.dtype), mode).mean((1, 2))
        return Outputs(self.head(dropout(features, RECIPE.model.dropout, mode)), features)


@pytest.fixture(scope="module")
def sites() -> ResidentArrays:
    random = np.random.default_rng(0)
    image = random.integers(0, 60_000, (SITES, SIDE, SIDE, 1), dtype=np.uint16)
    mask = random.integers(0, 2, (SITES, SIDE, SIDE), dtype=np.uint8)
    scale = np.full((SITES, 1), 1 / 65535, np.float32)
    return ResidentArrays(
        image, mask, np.arange(SITES, dtype=np.int32) % CLASSES, np.zeros_like(scale), scale
    )


class Training:
    """Compiled programs of a placement, and a training state."""

    def __init__(self, placement: Placement, sites: ResidentArrays):
        graphdef, params, stats = split_model(TinyNet(rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(RECIPE.optim, RECIPE.optim.epochs * STEPS)
        step = make_train_step(
            graphdef, optimizer, RECIPE, steps_per_epoch=STEPS, axis_name=placement.axis_name
        )
        self.traces = 0

        def counted_step(state: TrainState, batch: RawBatch) -> tuple[TrainState, Sums]:
            self.traces += 1
            return step(state, batch)

        self.placement, self.feed = placement, ResidentBatches(sites, placement)
        self.fresh = jax.device_get(initial_state(params, stats, optimizer))
        self.run = placement.compile_training(counted_step, self.feed)
        self.predict = placement.compile_predict(make_predict_step(graphdef, RECIPE))

    def start(self, tree: dict | None = None) -> None:
        """Start from the initial state, or from a checkpoint."""
        self.state = self.placement.replicate(
            self.fresh if tree is None else tree_to_state(tree, self.fresh, "test")
        )

    def epochs(self, *epochs: int) -> tuple[list[np.ndarray], dict]:
        """Train epochs; return the losses of all steps and the arrays of the last state."""
        parts = []
        order = BatchOrder.shuffled_epochs(
            RECIPE.seed, np.arange(SITES), BATCH, RECIPE.optim.epochs
        )
        for state, part in self.run(
            self.state, order.select_steps(epochs[0] * STEPS, (epochs[-1] + 1) * STEPS)
        ):
            self.state = state
            parts.append(part)
        sums = stack_steps(parts)
        return sums.loss / sums.loss_weight, state_to_tree(self.state)


def choose_devices(kind: str, scans: bool = False) -> Placement:
    placement = choose_placement(kind)
    assert placement.count == (1 if kind == "1" else 8)
    return Placement(placement.mapped, placement.mesh, scans)


@pytest.fixture(scope="module")
def begin(sites):
    """Return a function that starts a training; programs are compiled once for all tests."""
    compiled = functools.cache(lambda kind, scans: Training(choose_devices(kind, scans), sites))

    def start(kind: str, scans: bool = False, tree: dict | None = None) -> Training:
        training = compiled(kind, scans)
        training.start(tree)
        return training

    return start


def assert_close(tree: dict, other: dict) -> None:
    assert tree.keys() == other.keys()
    for name, value in tree.items():
        np.testing.assert_allclose(value, other[name], **CLOSE, err_msg=name)


def to_bytes(tree: dict) -> dict:
    return {name: value.tobytes() for name, value in tree.items()}


@pytest.fixture(scope="module")
def one_device(begin):
    training = begin("1")
    start = state_to_tree(training.state)
    losses, tree = training.epochs(0, 1, 2)
    changes = [
        np.abs(value - start[name]).max()
        for name, value in tree.items()
        if name.startswith("params")
    ]
    assert min(changes) > 100 * CLOSE["atol"], (
        "parameters hardly changed, so the comparison would be trivial"
    )
    return losses, tree


@pytest.mark.parametrize("scans", [False, True], ids=["step-by-step", "one-dispatch"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_eight_devices_equals_one_device(kind, scans, begin, one_device):
    training = begin(kind, scans)
    losses, tree = training.epochs(0, 1, 2)
    np.testing.assert_allclose(losses, one_device[0], **CLOSE)
    assert_close(tree, one_device[1])
    assert training.traces == 1


@pytest.mark.parametrize("kind", ["pmap", "sharded"])
def test_batch_norm_uses_whole_batch_without_padding(kind):
    """The rows of each device have another mean, so that a mean of eight variances would differ."""
    rows = np.arange(16, dtype=np.float32)[:, None] ** 2
    weight = (np.arange(16) < 13).astype(np.float32)
    graphdef, params, stats = split_model(BatchNorm(1, momentum=1.0))

    def learn(x: jax.Array, weight: jax.Array) -> list[jax.Array]:
        norm = nnx.merge(graphdef, params, stats, copy=True)
        norm(x, Mode(train=True, weight=weight, axis_name=AXIS if kind == "pmap" else None))
        return [norm.mean[...], norm.var[...]]

    if kind == "pmap":
        mean, var = jax.pmap(learn, AXIS, out_axes=None)(
            rows.reshape(8, 2, 1), weight.reshape(8, 2)
        )
    else:
        mean, var = jax.jit(learn)(
            *(jax.device_put(x, choose_devices(kind).by_row) for x in (rows, weight))
        )
    np.testing.assert_allclose(mean, rows[:13].mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, rows[:13].var(0, ddof=1), rtol=1e-6)


def test_padded_rows_have_no_effect(begin):
    """Padding has weight 0; with other records there, losses and state stay bit-identical."""
    order, weight = shuffle_epoch(RECIPE.seed, 0, np.arange(SITES), BATCH)
    assert (weight[-1] == 0).sum() == 4
    other = np.where(weight == 0, 7, order)
    assert (other != order).any()
    results = []
    for rows in (order, other):
        training = begin("sharded")
        records = BatchRecords(rows, weight)
        *_, (state, sums) = training.run(
            training.state, BatchOrder(lambda epoch, records=records: records, STEPS, 0, STEPS)
        )
        results.append(to_bytes(state_to_tree((state, sums))))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["1", "sharded"])
def test_apply_to_sites_returns_each_site_once_in_order(kind, begin, sites):
    """13 sites in batches of 5, on eight devices that require multiples of 8."""
    positions = np.random.default_rng(1).permutation(SITES)[:13]
    training = begin(kind)
    params, stats = training.state.params, training.state.stats
    probabilities, _ = apply_to_sites(
        training.predict, params, stats, training.feed.batches, positions, batch_size=5
    )
    single = begin("1")
    expected = [
        single.predict(
            single.state.params, single.state.stats, gather(sites, jnp.array([p]), jnp.ones(1))
        )[0]
        for p in positions
    ]
    np.testing.assert_allclose(probabilities, np.concatenate(expected), **CLOSE)


@pytest.mark.parametrize(
    ("first", "then"), [("sharded", "1"), ("1", "sharded"), ("pmap", "1"), ("1", "pmap")]
)
def test_checkpoint_resumes_on_another_number_of_devices(first, then, begin, one_device, tmp_path):
    first_part = begin(first)
    _, saved = first_part.epochs(0, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first_part.state, epoch=2, facts={})
        tree, facts = checkpoints.load()
    resumed = begin(then, tree=tree)
    assert facts["epoch"] == 2
    assert to_bytes(state_to_tree(resumed.state)) == to_bytes(saved)
    losses, tree = resumed.epochs(2)
    np.testing.assert_allclose(losses, one_device[0][2 * STEPS :], **CLOSE)
    assert_close(tree, one_device[1])


def test_place_rows_shards_over_all_devices_and_pads_with_weight_zero(sites):
    placement = choose_devices("sharded")
    batch = placement.place_rows(
        gather(jax.tree.map(jnp.asarray, sites), jnp.arange(13), jnp.ones(13))
    )
    assert isinstance(batch, RawBatch) and len(batch.image) == 16
    assert len({shard.device for shard in batch.image.addressable_shards}) == 8
    assert batch.image.sharding.spec == P(AXIS)
    np.testing.assert_array_equal(batch.weight, np.arange(16) < 13)
