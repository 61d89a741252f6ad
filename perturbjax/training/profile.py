"""Profile of training steps: a trace file, and a table of the time by operation."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from perturbjax.core.files import make_folder
from perturbjax.core.messages import console
from perturbjax.training.processes import is_first_process

#: Number of traced steps. With three, one complete step lies between two others.
TRACED_STEPS = 3
#: Rows of the printed table; further operations are summed in one row.
TABLE_ROWS = 12
#: Substrings of JAX operation names that identify the part of a step; the first match counts.
PARTS = (
    ("/augment/", "augment"),
    ("/update/", "update"),
    ("transpose(jvp", "backward"),
    ("jvp(", "forward"),
)


class OperationTime(NamedTuple):
    """Time spent in one kind of operation."""

    part: str
    """forward, backward, augment, update or other."""
    operation: str
    """JAX primitive (`conv_general_dilated`), or the compiler's name if there is no primitive."""
    seconds: float
    """Sum over steps, devices and threads."""


class Span(NamedTuple):
    """One execution of a compiled operation; times in seconds, names of the compiler."""

    start: float
    end: float
    module: str
    operation: str


def trace_steps(
    run: Callable[[Any], Any], state: Any, folder: Path, steps: int
) -> list[OperationTime]:
    """Trace `run(state)` into a folder and print where the time was spent.

    The function runs twice on copies of the state, the first time to compile. The state stays
    unchanged.

    Args:
        run: function that runs `steps` training steps.
        state: state to start from.
        folder: folder for the trace.
        steps: number of steps, for times per step.

    Raises:
        InputError: the folder is not writable.
    """
    # The first run compiles, so that the trace contains the steps only.
    jax.block_until_ready(run(_copy(state)))
    copy = _copy(state)
    if not is_first_process():  # takes part in the steps, but writes no trace
        jax.block_until_ready(run(copy))
        return []
    make_folder(folder)
    started = time.perf_counter()
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        jax.block_until_ready(run(copy))
        seconds = time.perf_counter() - started
    # The folder can contain earlier traces; the newest file is that of this run.
    trace = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    times = sum_by_operation(read_spans(trace), _compiled_operation_names())
    _print_table(times, steps, seconds)
    console.print(
        f"Trace: {trace.parent} (open perfetto_trace.json.gz in ui.perfetto.dev, the rest with "
        "XProf)"
    )
    return times


def read_spans(trace: Path) -> list[list[Span]]:
    """Read the compiled operations of an .xplane.pb file, one list for each thread or stream.

    If a device has its own timeline, that of the host is ignored, because it repeats the same
    operations.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    threads = {
        plane.name: [spans for line in plane.lines if (spans := _spans(line))] for plane in planes
    }
    device = [
        spans for name, lines in threads.items() if name.startswith("/device:") for spans in lines
    ]
    return device or [spans for lines in threads.values() for spans in lines]


def _spans(line: Any) -> list[Span]:
    spans = []
    for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats:
            module, operation = str(stats.get("hlo_module", "")), str(stats["hlo_op"])
            spans.append(Span(event.start_ns / 1e9, event.end_ns / 1e9, module, operation))
    return spans


def sum_by_operation(
    threads: Iterable[list[Span]], names: dict[tuple[str, str], str]
) -> list[OperationTime]:
    """Sum the time by part and primitive, in descending order.

    Time in an operation that runs within another one (a loop, a fusion) counts for the inner one
    only. A stack of open spans finds the enclosing operation, from which the time of the inner one
    is subtracted.

    Args:
        threads: spans of each thread.
        names: (module, operation) -> JAX name, as far as known.
    """
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for spans in threads:
        open_spans: list[tuple[float, tuple[str, str]]] = []
        # Enclosing operations come first: they start earlier or, at the same time, end later.
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            # Operations that end before this one starts cannot enclose it.
            while open_spans and open_spans[-1][0] <= span.start:
                open_spans.pop()
            kind = _kind(span.operation, names.get((span.module, span.operation), ""))
            sums[kind] += span.end - span.start
            if open_spans:
                sums[open_spans[-1][1]] -= span.end - span.start
            open_spans.append((span.end, kind))
    times = [OperationTime(*kind, seconds) for kind, seconds in sums.items()]
    return sorted(times, key=lambda row: -row.seconds)


def _kind(operation: str, name: str) -> tuple[str, str]:
    # Without a JAX name, the compiler's name without its number is used: `fusion.12` -> `fusion`.
    part = next((part for mark, part in PARTS if mark in name), "other")
    primitive = name.rsplit("/", 1)[-1] if "/" in name else re.sub(r"[.\d]+$", "", operation)
    return part, primitive


def _compiled_operation_names() -> dict[tuple[str, str], str]:
    """Return (module, operation) -> JAX name for all programs of this process."""
    programs = jax.local_devices()[0].client.live_executables()
    modules = [module for program in programs for module in program.hlo_modules()]
    return {
        (module.name, operation): name
        for module in modules
        for operation, name in operation_names(module.to_string()).items()
    }


def operation_names(hlo: str) -> dict[str, str]:
    """Read operation -> JAX name from the text of a program.

    A fusion without a name gets the name of its last operation.
    """
    names: dict[str, str] = {}
    last_name: dict[str, str] = {}
    fusions: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        # Header of a computation, for example `ENTRY %main (p: f32[2]) -> f32[2] {`.
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            if name := re.search(r'op_name="([^"]*)"', line):
                names[operation[1]] = last_name[computation] = name[1]
            elif calls := re.search(r"calls=%?([\w.-]+)", line):
                fusions[operation[1]] = calls[1]
    return names | {
        operation: last_name[target] for operation, target in fusions.items() if target in last_name
    }


def _copy(state: Any) -> Any:
    """Copy the arrays, because a step donates the memory of its input state."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def _print_table(times: list[OperationTime], steps: int, seconds: float) -> None:
    total = sum(row.seconds for row in times)
    console.print(
        f"{1e3 * seconds / steps:.1f} ms per step ({steps} steps traced). Time in operations, "
        "summed over devices and "
        "threads:"
    )
    others = times[TABLE_ROWS:]
    rest = OperationTime("", f"{len(others)} more", sum(row.seconds for row in others))
    for part, operation, spent in (*times[:TABLE_ROWS], rest):
        console.print(
            f"  {1e3 * spent / steps:9.2f} ms {100 * spent / total:5.1f} %  {part:8}  {operation}"
        )
    parts: dict[str, float] = defaultdict(float)
    for row in times:
        parts[row.part] += row.seconds
    console.print(
        "  " + ", ".join(f"{part} {100 * spent / total:.1f} %" for part, spent in parts.items())
    )
