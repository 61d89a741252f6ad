"""What would an accelerator do? Programs compiled ahead of time for TPUs and the H100, on a machine that has neither.

    make aot                       # sets up .venv-aot, compiles everything, writes the tables of docs/performance.md
    python -m experiments.bench.aot [--targets h100,v5e] [--programs step] [--devices 1,4] [--out DIR]
    python -m experiments.bench.aot --write-baselines     # what test_aot.py holds the compiled programs to

The programs are those of the paper's recipe (see `gpu.py`): a training step of 128 crops of 128² pixels in bf16 and
float32, an epoch over the resident dataset, evaluation, feature extraction of 32 images of 224² in bf16, and the
segmenter: its network on 8 tiles of 224², and of a 1080² field with 512 cells the following of the flow (200 steps of
262,144 pixels) and the judging of the cells (boxes of 48², heat spreading 192 steps). A TPU's compiler estimates cycles
for most operations; gathers and select-and-scatters carry none, nor do many small ones: `no estimate` names the kinds
and `GB without` is what they move, so a cycle count is less than the whole. For the H100, `GB` over the bandwidth of
its memory is a floor of the time: all operands and results of every kernel once, of a gather what it selects. The
columns of the step's parts (augment, forward, backward, update) are GB on the H100 and millions of cycles on TPUs.
`MiB` is what the program holds beside its arguments. `told MiB` is what collectives give, a device.
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
#: Bytes a second of a chip's memory (data sheets).
BANDWIDTH = {"v5e": 0.819e12, "v6e": 1.64e12, "h100": 3.35e12}
PARTS = ("augment", "forward", "backward", "update")
BASELINES = Path(__file__).with_name("aot_baselines.json")
SIDE, IMAGES, TILES = 224, 32, 8
#: A field's side, pixels of its cells, how many these are and the side of a cell's box.
FIELD, CELL_PIXELS, CELLS, BOX = 1088, 2**18, 512, 48
#: Operations that are told apart where they carry no estimate.
HEAVY = r"gather|scatter|sort|convolution|dot|reduce|custom-call"
INSTALL = "run `make aot-env`, then use .venv-aot/bin/python"

#: (target's mesh) → the jitted program and its abstract arguments.
Program = Callable[[Any], tuple[Any, tuple[Any, ...]]]


@dataclass(frozen=True)
class Config:
    """Compile ahead of time, and count."""

    targets: str = ",".join(TARGETS)
    """Of v5e, v6e and h100."""
    programs: str = ""
    """Of the programs' names; empty takes all."""
    devices: str = "1,4"
    """Over how many devices a program is spread."""
    hlo: str = ""
    """Folder to write the compiled programs' text to."""
    out: str = ""
    """Folder of a benchmark run, whose aot.json gets the rows as they come, beside those it has of other programs."""
    write_baselines: bool = False
    """Write what was counted to the file of baselines."""


def run(quick: bool) -> Iterator[list[Row]]:
    """One row a program, target and number of devices, all there are so far after each; `quick` compiles the step for
    one device.

    Raises:
        CannotRun: neither the TPU's nor the GPU's compiler is here.
    """
    options = Config(programs="step bf16", devices="1") if quick else Config()
    rows: list[Row] = []
    for row in compile_all(options):
        rows.append(row)
        yield rows


def compile_all(options: Config) -> Iterator[Row]:
    """Rows of what was asked for; a target whose compiler is missing is said and left out.

    Raises:
        CannotRun: no target is left.
    """
    names = [name for name in options.programs.split(",") if name] or list(PROGRAMS)
    if unknown := set(names) - set(PROGRAMS):
        raise InputError(
            f"--programs {', '.join(sorted(unknown))}: there are {', '.join(PROGRAMS)}"
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
                console.print(", ".join(f"{what} {_short(value)}" for what, value in row.items()))
                compiled += 1
                yield row
    if not compiled:
        raise CannotRun("; ".join(dict.fromkeys(missing)) or "no program can be compiled here")
    for reason in dict.fromkeys(missing):
        console.print(f"left out: {reason}")


def target_mesh(target: str, count: int) -> Any:
    """A mesh over `count` devices of a target that need not be here.

    Raises:
        CannotRun: its compiler is not installed, or the GPU's description is not there.
        InputError: there is no such target.
    """
    if target not in TARGETS:
        raise InputError(f"--targets {target}: choose of {', '.join(TARGETS)}")
    plugin = "jax_plugins.xla_cuda13" if target == "h100" else "libtpu"
    if importlib.util.find_spec(plugin.split(".")[0]) is None or not _found(plugin):
        raise CannotRun(f"{target}: no {plugin} here; {INSTALL}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no device is taken, so several may compile at a time
    import jax
    import jax.experimental.topologies as topologies
    import numpy as np

    from perturbjax.training.devices import AXIS

    jax.config.update("jax_platforms", "cpu")  # what is computed here, is computed on the CPU
    if target == "h100":
        description = (
            Path(os.environ.get("PERTURBJAX_SHARED", "../shared")) / "targets" / "h100.txtpb"
        )
        if not description.is_file():
            raise CannotRun(
                f"h100: no {description}: set PERTURBJAX_SHARED to the folder that holds targets/h100.txtpb"
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


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compile_one(name: str, target: str, mesh: Any, hlo_folder: str = "") -> Row:
    """Compile a program for a mesh and count what it does."""
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
            "GB without": whole.unpriced / 1e9,
            "no estimate": _silent(whole),
        }
    row |= {
        "MiB": memory.temp_size_in_bytes / 2**20,
        "collectives": whole.collectives,
        "told MiB": whole.told / 2**20,
    }
    return row | {"compile s": time.perf_counter() - started}


def _silent(cost: hlo.Cost) -> str:
    """The heavy operations that carry no estimate, and how many others."""
    heavy = {what: n for what, n in sorted(cost.silent.items()) if re.search(HEAVY, what)}
    others = sum(
        n for what, n in cost.silent.items() if what not in heavy and not what.endswith("-start")
    )
    return "; ".join([*(f"{n} {what}" for what, n in heavy.items()), f"{others} others"])


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _training(mesh: Any, precision: str) -> tuple[Any, Any, Any, Any, Any]:
    """Step, predict step, placement, abstract state and a function of raw batches' shapes."""
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
    """Shapes and dtypes of a tree, with where they shall lie."""
    import jax

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _raw(size: Size, sharding: Any) -> Any:
    """An abstract batch of sites."""
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
    """Following the flow of a field's cells: what `dynamics.follow` dispatches to an accelerator, of fixed length."""
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
    """The flows and holes of a field's cells by their shapes alone: what `dynamics` dispatches to judge them."""
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
    "segmenter judge": _checking,
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
        kept = read_json(BASELINES) if BASELINES.is_file() else {}
        counted = {
            key(row): {c: row[c] for c in ("GB", "kernels", "M cycles") if c in row} for row in rows
        }
        write_json(BASELINES, dict(sorted((kept | counted).items())))


def _merge(path: Path, row: Row) -> None:
    """Put a row into a benchmark's file, in the place of an older one of the same program."""
    part = read_json(path) if path.is_file() else {}
    part = (
        {"about": "What accelerators would do.", "others": 0.0}
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
    """What a row is called in the file of baselines."""
    return f"{row['target']} x{row['devices']} {row['program']}"


if __name__ == "__main__":
    run_command(
        lambda: main(
            parse_options(Config, description=__doc__, prog="python -m experiments.bench.aot")
        )
    )
