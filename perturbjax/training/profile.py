"""Where a step's time goes: a trace of a few steps that Perfetto and XProf open, and its sums by operation."""

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

#: Steps that are traced: enough to see one whole step between two others.
TRACED_STEPS = 3
#: Lines of the table; what is beyond is summed in one.
LINES = 12
#: How JAX marks the pass in an operation's name, the first that fits.
PASSES = (
    ("/augment/", "augment"),
    ("/update/", "update"),
    ("transpose(jvp", "backward"),
    ("jvp(", "forward"),
)


class OperationTime(NamedTuple):
    """Time spent in operations of one kind."""

    part: str
    """forward, backward, augment, update or other."""
    operation: str
    """JAX's primitive (`conv_general_dilated`), or the compiler's own name where it belongs to none."""
    seconds: float
    """Summed over steps, devices and threads."""


class Span(NamedTuple):
    """An operation that ran, by the compiler's names; times in seconds."""

    start: float
    end: float
    module: str
    operation: str


def trace_steps(
    run: Callable[[Any], Any], state: Any, folder: Path, steps: int
) -> list[OperationTime]:
    """Trace `run(state)`, which takes `steps` steps, into `folder`, and print where its time went.

    It runs twice, each time on a copy of the state: once to compile. The state is left as it was.

    Raises:
        InputError: the folder cannot be written to.
    """
    jax.block_until_ready(run(_copy(state)))
    copy = _copy(state)
    if not is_first_process():  # the step waits for all processes, and one of them writes
        jax.block_until_ready(run(copy))
        return []
    make_folder(folder)
    started = time.perf_counter()
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        jax.block_until_ready(run(copy))
        took = time.perf_counter() - started
    trace = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent = sum_by_operation(read_spans(trace), _names_of_operations())
    _print_table(spent, steps, took)
    console.print(
        f"trace: {trace.parent} (perfetto_trace.json.gz for ui.perfetto.dev, the rest for XProf)"
    )
    return spent


def read_spans(trace: Path) -> list[list[Span]]:
    """The compiled operations in an .xplane.pb, a list a thread or stream.

    Where a device has a timeline of its own, the host's (which repeats it) is left out.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    lines = {
        plane.name: [spans for line in plane.lines if (spans := _spans(line))] for plane in planes
    }
    own = [spans for name, found in lines.items() if name.startswith("/device:") for spans in found]
    return own or [spans for found in lines.values() for spans in found]


def _spans(line: Any) -> list[Span]:
    found = []
    for event in line.events:
        facts = dict(event.stats)
        if "hlo_op" in facts:
            found.append(
                Span(
                    event.start_ns / 1e9,
                    event.end_ns / 1e9,
                    str(facts.get("hlo_module", "")),
                    str(facts["hlo_op"]),
                )
            )
    return found


def sum_by_operation(
    lines: Iterable[list[Span]], names: dict[tuple[str, str], str]
) -> list[OperationTime]:
    """Time by pass and primitive, the greatest first; what runs inside another operation counts for itself alone.

    Args:
        lines: spans of each thread.
        names: (module, operation) → JAX's name for it, where known.
    """
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for spans in lines:
        open_spans: list[tuple[float, tuple[str, str]]] = []
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            while open_spans and open_spans[-1][0] <= span.start:
                open_spans.pop()
            kind = _kind(span.operation, names.get((span.module, span.operation), ""))
            sums[kind] += span.end - span.start
            if open_spans:
                sums[open_spans[-1][1]] -= span.end - span.start
            open_spans.append((span.end, kind))
    return sorted(
        (OperationTime(*kind, seconds) for kind, seconds in sums.items()),
        key=lambda spent: -spent.seconds,
    )


def _kind(operation: str, name: str) -> tuple[str, str]:
    part = next((part for mark, part in PASSES if mark in name), "other")
    primitive = name.rsplit("/", 1)[-1] if "/" in name else re.sub(r"[.\d]+$", "", operation)
    return part, primitive


def _names_of_operations() -> dict[tuple[str, str], str]:
    """(module, operation) → JAX's name, of every program that is compiled in this process."""
    modules = [
        m
        for program in jax.local_devices()[0].client.live_executables()
        for m in program.hlo_modules()
    ]
    return {
        (m.name, operation): name
        for m in modules
        for operation, name in names_in(m.to_string()).items()
    }


def names_in(hlo: str) -> dict[str, str]:
    """Operation → JAX's name, from a program's text; a fusion without a name has that of the last one fused."""
    names: dict[str, str] = {}
    last: dict[str, str] = {}
    fusions: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = begins[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            if name := re.search(r'op_name="([^"]*)"', line):
                names[operation[1]] = last[computation] = name[1]
            elif calls := re.search(r"calls=%?([\w.-]+)", line):
                fusions[operation[1]] = calls[1]
    return names | {
        operation: last[called] for operation, called in fusions.items() if called in last
    }


def _copy(state: Any) -> Any:
    """A copy, since the step gives its state's memory away."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def _print_table(spent: list[OperationTime], steps: int, took: float) -> None:
    total = sum(kind.seconds for kind in spent)
    console.print(
        f"{1e3 * took / steps:.1f} ms a step, of {steps} traced; in operations, summed over devices and threads:"
    )
    rest = OperationTime(
        "", f"{len(spent[LINES:])} others", sum(kind.seconds for kind in spent[LINES:])
    )
    for part, operation, seconds in (*spent[:LINES], rest):
        console.print(
            f"  {1e3 * seconds / steps:9.2f} ms {100 * seconds / total:5.1f} %  {part:8}  {operation}"
        )
    parts = {
        kind.part: sum(other.seconds for other in spent if other.part == kind.part)
        for kind in spent
    }
    console.print(
        "  " + ", ".join(f"{part} {100 * seconds / total:.1f} %" for part, seconds in parts.items())
    )
