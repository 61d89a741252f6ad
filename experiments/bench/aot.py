"""Compile programs for TPUs and the H100 without these devices, and count their costs.

    make aot         # set up .venv-aot, compile everything, write the table of docs/performance.md
    python -m experiments.bench.aot [--targets h100,v5e] [--programs step] [--devices 1,4]
    python -m experiments.bench.aot --write-baselines     # limits of test_bench_aot.py

Programs of the paper's recipe (see `gpu.py`): a training step with 128 crops of 128 pixels in bf16
and float32, an epoch over the resident dataset, evaluation, and feature extraction with 32 images
of 224 pixels in bf16. Programs of the segmenter: the network on 8 tiles of 224 pixels; for a field
of 1080 pixels with 512 cells, flow following (200 steps, 262,144 pixels) and the flow check (boxes
of 48 pixels, 192 steps of heat diffusion).

The TPU compiler estimates cycles for most operations, but not for gathers, select-and-scatters and
many small ones. `no estimate` lists these and `GB without estimate` are the bytes that they move,
so the sum of cycles is a lower bound. For the H100, `GB` counts operands and results of every
kernel once (of a gather only the selection). Divided by the memory bandwidth it is a lower bound of
the time, `floor ms`. Columns of the parts of a step (augment, forward, backward, update) are GB on
the H100 and millions of cycles on TPUs. `MiB` is temporary memory; `collective MiB` are the results
of collectives per device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench import hlo
from experiments.bench.gpu import Size
from experiments.bench.tables import CannotRun, Row, machine, markdown
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import make_folder, read_json, write_json
from perturbjax.core.messages import console

TARGETS = ("v5e", "v6e", "h100")
#: Memory bandwidth in bytes per second (data sheets).
BANDWIDTH = {"v5e": 0.819e12, "v6e": 1.64e12, "h100": 3.35e12}
PARTS = ("augment", "forward", "backward", "update")
BASELINES = Path(__file__).with_name("aot_baselines.json")
SIDE, IMAGES, TILES = 224, 32, 8
#: Field size, number of cell pixels, number of cells, size of the box of a cell (all in pixels).
FIELD, CELL_PIXELS, CELLS, BOX = 1088, 2**18, 512, 48
#: Operations that are listed by kind if they have no estimate.
HEAVY = r"gather|scatter|sort|convolution|dot|reduce|custom-call"
INSTALL = "run `make aot-env`, then use .venv-aot/bin/python"

#: Function mesh -> jitted program and its abstract arguments.
Program = Callable[[Any], tuple[Any, tuple[Any, ...]]]


@dataclass(frozen=True)
class Config:
    """Compile programs ahead of time and count their costs."""

    targets: str = ",".join(TARGETS)
    """Targets, separated by commas: v5e, v6e, h100."""
    programs: str = ""
    """Programs, separated by commas; by default all."""
    devices: str = "1,4"
    """Numbers of devices, separated by commas."""
    hlo: str = ""
    """Folder for the text of the compiled programs."""
    out: str = ""
    """Folder of a benchmark run; its aot.json is updated after every program."""
    write_baselines: bool = False
    """Write the counts to the file of baselines."""


def run(quick: bool) -> Iterator[list[Row]]:
    """Compile all programs for all targets and numbers of devices; yield the rows so far.

    Args:
        quick: compile only the training step, for one device.

    Raises:
        CannotRun: neither the compiler for TPU nor that for GPU is installed.
    """
    options = Config(programs="step bf16", devices="1") if quick else Config()
    rows: list[Row] = []
    for row in compile_all(options):
        rows.append(row)
        yield rows


def compile_all(options: Config) -> Iterator[Row]:
    """Yield one row per program, target and number of devices; skip targets without compiler.

    Raises:
        InputError: a program does not exist.
        CannotRun: no target has a compiler.
    """
    names = [name for name in options.programs.split(",") if name] or list(PROGRAMS)
    if unknown := set(names) - set(PROGRAMS):
        raise InputError(
            f"--programs {', '.join(sorted(unknown))}: unknown; choose among {', '.join(PROGRAMS)}"
        )
    compiled, missing = 0, []
    for target in options.targets.split(","):
        for count in map(int, options.devices.split(",")):
            try:
                mesh = target_mesh(target, count)
            except CannotRun as reason:
                missing.append(str(reason))
                continue
            for name in names:
                try:
                    row = compile_one(name, target, mesh, options.hlo)
                except CannotRun as reason:
                    console.print(f"{name}: {reason}")
                    continue
                console.print(", ".join(f"{name} {_short(value)}" for name, value in row.items()))
                compiled += 1
                yield row
    if not compiled:
        raise CannotRun("; ".join(dict.fromkeys(missing)) or "no program can be compiled")
    for reason in dict.fromkeys(missing):
        console.print(f"info: skipped: {reason}")


def target_mesh(target: str, count: int) -> Any:
    """Make a mesh over `count` devices of a target that this machine need not have.

    Raises:
        CannotRun: the compiler is not installed, or the description of the GPU is missing.
        InputError: the target does not exist.
    """
    if target not in TARGETS:
        raise InputError(f"--targets {target}: unknown; choose among {', '.join(TARGETS)}")
    plugin = "jax_plugins.xla_cuda13" if target == "h100" else "libtpu"
    if importlib.util.find_spec(plugin.split(".")[0]) is None or not _is_installed(plugin):
        raise CannotRun(f"{target}: {plugin} is not installed; {INSTALL}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No device is used, so several processes may compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax
    import jax.experimental.topologies as topologies
    import numpy as np

    from perturbjax.training.devices import AXIS

    jax.config.update("jax_platforms", "cpu")  # eager computations run on the CPU
    if target == "h100":
        description = (
            Path(os.environ.get("PERTURBJAX_SHARED", "../shared")) / "targets" / "h100.txtpb"
        )
        if not description.is_file():
            raise CannotRun(
                f"h100: no file {description}: set PERTURBJAX_SHARED to the folder that contains "
                "targets/h100.txtpb"
            )
        options = {"target_config": description.read_text(), "topology": f"1x1x{count}"}
        topology = topologies.get_topology_desc("h100", "cuda", **options)
    else:
        options = {
            "topology_name": f"{target}:2x2",
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": 1,
        }
        topology = topologies.get_topology_desc(platform="tpu", **options)
    return jax.sharding.Mesh(np.array(topology.devices[:count]), (AXIS,))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compile_one(name: str, target: str, mesh: Any, hlo_folder: str = "") -> Row:
    """Compile a program for a mesh and count its costs."""
    started = time.perf_counter()
    program, arguments = PROGRAMS[name](mesh)
    options = {"xla_gpu_autotune_level": 0} if target == "h100" else None
    compiled = program.lower(*arguments).compile(compiler_options=options)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if hlo_folder:
        folder = Path(hlo_folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{target}-{mesh.size}-{name.replace(' ', '-')}.hlo").write_text(text)
    parts = hlo.costs(text)
    whole = parts["all"]
    row: Row = {"target": target, "devices": mesh.size, "program": name}
    if target == "h100":
        row |= {
            "kernels": whole.kernels,
            "GB": whole.moved / 1e9,
            "floor ms": 1e3 * whole.moved / BANDWIDTH[target],
        }
        row |= {part: parts[part].moved / 1e9 for part in PARTS if part in parts and len(parts) > 3}
    else:
        row |= {"M cycles": whole.cycles / 1e6}
        row |= {
            part: parts[part].cycles / 1e6 for part in PARTS if part in parts and len(parts) > 3
        }
        row |= {
            "GB": whole.moved / 1e9,
            "GB without estimate": whole.unestimated_bytes / 1e9,
            "no estimate": _list_unestimated(whole),
        }
    row |= {
        "MiB": memory.temp_size_in_bytes / 2**20,
        "collectives": whole.collectives,
        "collective MiB": whole.collective_bytes / 2**20,
    }
    return row | {"compile s": time.perf_counter() - started}


def _list_unestimated(cost: hlo.Cost) -> str:
    """List the heavy operations without estimate, and the number of all remaining ones."""
    counts = cost.unestimated
    heavy = {kind: n for kind, n in sorted(counts.items()) if re.search(HEAVY, kind)}
    others = sum(
        n for kind, n in counts.items() if kind not in heavy and not kind.endswith("-start")
    )
    return "; ".join([*(f"{n} {kind}" for kind, n in heavy.items()), f"{others} others"])


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


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


def main(options: Config) -> None:
    rows = []
    for row in compile_all(options):
        rows.append(row)
        if options.out:
            _merge(Path(options.out) / "aot.json", row)
    for target in dict.fromkeys(row["target"] for row in rows):
        print(markdown([row for row in rows if row["target"] == target]))
    if options.write_baselines:
        baselines = read_json(BASELINES) if BASELINES.is_file() else {}
        counted = {
            key(row): {c: row[c] for c in ("GB", "kernels", "M cycles") if c in row} for row in rows
        }
        write_json(BASELINES, dict(sorted((baselines | counted).items())))


def _merge(path: Path, row: Row) -> None:
    """Write a row to a benchmark file; an older row of the same program is replaced."""
    part = read_json(path) if path.is_file() else {}
    part = (
        {"about": "Costs on accelerators.", "others": 0.0}
        | part
        | {"machine": machine(), "quick": False}
    )
    rows = {key(old): old for old in part.get("rows", [])} | {key(row): row}
    order = [
        f"{target} x{count} {name}" for target in TARGETS for count in (1, 4) for name in PROGRAMS
    ]
    part["rows"] = [rows[name] for name in sorted(rows, key=order.index)]
    part.pop("skipped", None)
    write_json(make_folder(path.parent) / path.name, part)


def key(row: Row) -> str:
    """Return the name of a row in the file of baselines."""
    return f"{row['target']} x{row['devices']} {row['program']}"


if __name__ == "__main__":
    run_command(
        lambda: main(
            parse_options(Config, description=__doc__, prog="python -m experiments.bench.aot")
        )
    )
