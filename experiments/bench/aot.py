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

import importlib.util
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench import hlo
from experiments.bench.aot_programs import PROGRAMS
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
#: Operations that are listed by kind if they have no estimate.
HEAVY = r"gather|scatter|sort|convolution|dot|reduce|custom-call"
INSTALL = "run `make aot-env`, then use .venv-aot/bin/python"


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
