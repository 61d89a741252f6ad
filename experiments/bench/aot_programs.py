"""The programs that `aot.py` compiles, with abstract arguments in place of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.bench.sizes import Size

SIDE, IMAGES, TILES = 224, 32, 8
#: Field size, number of cell pixels, number of cells, size of the box of a cell (all in pixels).
FIELD, CELL_PIXELS, CELLS, BOX = 1088, 2**18, 512, 48

#: Function mesh -> jitted program and its abstract arguments.
Program = Callable[[Any], tuple[Any, tuple[Any, ...]]]


def _training(mesh: Any, precision: str) -> tuple[Any, Any, Any, Any, Any]:
    """Return training step, prediction step, placement, abstract state and sizes."""
    import jax
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from perturbjax import models
    from perturbjax.training.devices import Placement
    from perturbjax.training.optimizer import make_optimizer
    from perturbjax.training.step import (
        initial_state,
        make_predict_step,
        make_train_step,
        split_model,
    )

    paper = Size()
    recipe = paper.recipe(precision)
    optimizer = make_optimizer(recipe.optim, paper.epochs * paper.steps)
    network = nnx.eval_shape(
        lambda: models.create(
            "attention", classes=paper.classes, channels=1, dropout=recipe.model.dropout, seed=0
        )
    )
    graphdef, params, stats = split_model(network)
    replicated = NamedSharding(mesh, P())
    state = abstract(
        jax.eval_shape(lambda p, s: initial_state(p, s, optimizer), params, stats), replicated
    )
    step = make_train_step(graphdef, optimizer, recipe, steps_per_epoch=paper.steps)
    return step, make_predict_step(graphdef, recipe), Placement(False, mesh, True), state, paper


def abstract(tree: Any, sharding: Any) -> Any:
    """Replace the arrays of a tree by their shapes and dtypes with a sharding."""
    import jax

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _raw(size: Size, sharding: Any) -> Any:
    """Make an abstract batch of sites."""
    import jax
    import numpy as np

    from perturbjax.data.augmentation import RawBatch

    b, side = size.batch, size.stored
    shapes = RawBatch(
        ((b, side, side, 1), np.uint16),
        ((b, side, side), np.uint8),
        ((b,), np.int32),
        ((b,), np.int32),
        ((b,), np.float32),
        ((b, 1), np.float32),
        ((b, 1), np.float32),
    )
    return RawBatch(*(jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes))


def _step(mesh: Any, precision: str) -> tuple[Any, tuple[Any, ...]]:
    step, _, placement, state, size = _training(mesh, precision)
    return placement.compile_step(step), (state, _raw(size, placement.by_row))


def _epoch(mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    import jax
    import numpy as np

    from perturbjax.data.batches import BatchRecords, ResidentArrays

    step, _, placement, state, size = _training(mesh, "bf16")
    raw = _raw(dataclasses.replace(size, batch=size.sites), placement.replicated)
    arrays = ResidentArrays(raw.image, raw.mask, raw.label, raw.shift, raw.scale)
    rows = BatchRecords(
        *(
            jax.ShapeDtypeStruct((size.steps, size.batch), dtype, sharding=placement.replicated)
            for dtype in (np.int32, np.float32)
        )
    )
    return placement.compile_epoch(step), (state, arrays, rows)


def _evaluation(mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    import jax

    _, predict, placement, state, size = _training(mesh, "bf16")
    program = jax.jit(predict, out_shardings=placement.replicated)
    return program, (state.params, state.stats, _raw(size, placement.by_row))


def _features(mesh: Any, backbone: str) -> tuple[Any, tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from perturbjax.models import BACKBONES, Mode
    from perturbjax.training.devices import AXIS

    network = nnx.eval_shape(
        lambda: BACKBONES[backbone].network(classes=1000, inputs=3, rngs=nnx.Rngs(0))
    )
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def forward(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats, copy=True)(x, Mode(dtype=jnp.bfloat16)).features

    x = jax.ShapeDtypeStruct(
        (IMAGES, SIDE, SIDE, 3), jnp.float32, sharding=NamedSharding(mesh, P(AXIS))
    )
    return jax.jit(forward), (
        *(abstract(tree, NamedSharding(mesh, P())) for tree in (params, stats)),
        x,
    )


def _segmenter(mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from perturbjax.models import Mode
    from perturbjax.segmentation import cpnet
    from perturbjax.training.devices import AXIS

    network = nnx.eval_shape(lambda: cpnet.create(cpnet.CPnetConfig()))
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def forward(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats, copy=True)(x, Mode(dtype=jnp.bfloat16)).maps

    x = jax.ShapeDtypeStruct(
        (TILES, SIDE, SIDE, 2), jnp.float32, sharding=NamedSharding(mesh, P(AXIS))
    )
    return jax.jit(forward), (
        *(abstract(tree, NamedSharding(mesh, P())) for tree in (params, stats)),
        x,
    )


def _following(mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    """Flow following for the cells of one field, with a fixed number of steps."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from perturbjax.segmentation import dynamics

    def following(flow: jax.Array, places: jax.Array) -> jax.Array:
        return dynamics._steps(flow, places, FIELD, FIELD, dynamics.STEPS)[0]

    everywhere = NamedSharding(mesh, P())
    flow = jax.ShapeDtypeStruct((FIELD, FIELD, 8), jnp.float32, sharding=everywhere)
    return jax.jit(following), (
        flow,
        jax.ShapeDtypeStruct((CELL_PIXELS, 2), jnp.float32, sharding=everywhere),
    )


def _checking(mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    """Flow check for the cells of one field: flows and holes computed from the masks."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from perturbjax.segmentation import objects

    steps = jnp.full(CELLS, 4 * BOX)

    def checking(mine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return objects._implied_flow(mine, steps), objects._find_holes(mine)

    mine = jax.ShapeDtypeStruct((CELLS, BOX, BOX), jnp.bool_, sharding=NamedSharding(mesh, P()))
    return jax.jit(checking), (mine,)


PROGRAMS: dict[str, Program] = {
    "step bf16": lambda mesh: _step(mesh, "bf16"),
    "step float32": lambda mesh: _step(mesh, "float32"),
    "epoch bf16": _epoch,
    "evaluation bf16": _evaluation,
    "resnet50 bf16": lambda mesh: _features(mesh, "resnet50"),
    "efficientnet_b0 bf16": lambda mesh: _features(mesh, "efficientnet_b0"),
    "segmenter bf16": _segmenter,
    "segmenter follow": _following,
    "segmenter check": _checking,
}
