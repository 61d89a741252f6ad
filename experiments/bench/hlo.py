"""Costs of a compiled program from its text: kernels, bytes moved, estimated cycles, collectives.

XLA prints an optimized program as computations with one operation per line. Counting starts at the
entry computation and follows calls. Bodies of loops count once per iteration, of a conditional only
the branch with more operations counts, and a fusion is one kernel.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
BITS |= {"f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64}
#: Operations that move no data.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
}
FREE |= {"opt-barrier", "add-dependency", "domain"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
#: Operations that read only a part of their first operand.
SELECTING = {"dynamic-slice", "slice", "gather"}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Operation:
    """One line of a computation.

    Attributes:
        name: name of the result.
        shape: type of the result, as text.
        opcode: kind of operation.
        operands: names of the operands.
        rest: text after the operands (attributes and metadata).
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def scope(self) -> str:
        """Name scope of the operation in the Python program."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def cycles(self) -> int | None:
        """Estimate of the TPU compiler, if it gives one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match[1]) if match else None

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations in an attribute such as `calls`."""
        match = re.search(attribute + r"=(\{[^}]*\}|%[\w.\-]+)", self.rest)
        return _NAME.findall(match[1]) if match else []


@dataclass
class Computation:
    """Operations in order of execution, by name."""

    operations: dict[str, Operation] = field(default_factory=dict)

    def parameter(self, number: int) -> str | None:
        """Return the name of a parameter."""
        wanted = (
            name
            for name, op in self.operations.items()
            if op.opcode == "parameter" and _number(op) == number
        )
        return next(wanted, None)


@dataclass
class Cost:
    """Costs of a program or of a part of it.

    Attributes:
        kernels: number of operations that run.
        moved: bytes of their operands and results.
        cycles: sum of the estimated cycles.
        unestimated: number of operations without an estimate, by kind.
        unestimated_bytes: bytes moved by these, without asynchronous copies.
        collective_bytes: bytes of the results of collectives.
        collectives: number of collectives.
    """

    kernels: int = 0
    moved: float = 0
    cycles: int = 0
    unestimated: Counter[str] = field(default_factory=Counter)
    unestimated_bytes: float = 0
    collective_bytes: float = 0
    collectives: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """Add the costs of an operation that runs several times."""
        self.kernels += other.kernels * times
        self.moved += other.moved * times
        self.cycles += other.cycles * times
        self.unestimated.update({kind: n * times for kind, n in other.unestimated.items()})
        self.unestimated_bytes += other.unestimated_bytes * times
        self.collective_bytes += other.collective_bytes * times
        self.collectives += other.collectives * times


def part_of(scope: str) -> str:
    """Return the part of a training step that a name scope belongs to."""
    for part in ("augment", "update"):
        if re.search(rf"(^|/|\(){part}(/|\)|$)", scope):
            return part
    return "backward" if "transpose(" in scope else "forward"


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parse a program; return its computations and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            operation = _operation(match[1], match[2])
            current.operations[operation.name] = operation
    return computations, entry


def costs(text: str) -> dict[str, Cost]:
    """Compute the costs of each part of the step, and their sum as "all"."""
    computations, entry = parse(text)
    parts: dict[str, Cost] = {"all": Cost()}
    for operation, times, computation in _run(computations, entry):
        cost = _cost(operation, computation, computations)
        for part in (part_of(operation.scope), "all"):
            parts.setdefault(part, Cost()).add(cost, times)
    return parts


def operations(text: str) -> list[tuple[Cost, Operation, int]]:
    """List all operations that run: cost of one execution, operation, number of executions."""
    computations, entry = parse(text)
    return [
        (_cost(op, comp, computations), op, times) for op, times, comp in _run(computations, entry)
    ]


def size(shape: str) -> float:
    """Compute the bytes of a type, which may be a tuple."""
    return sum(
        BITS.get(kind, 0) / 8 * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in _SHAPE.findall(shape)
    )


def _run(
    computations: dict[str, Computation], name: str, times: int = 1
) -> Iterator[tuple[Operation, int, Computation]]:
    """Yield operations, their number of executions, and their computation."""
    computation = computations[name]
    for op in computation.operations.values():
        if op.opcode in FREE:
            continue
        if op.opcode == "while":
            for body in op.called("body"):
                yield from _run(computations, body, times * _iterations(op, computations))
        elif op.opcode == "conditional":
            names = (
                op.called("branch_computations")
                + op.called("true_computation")
                + op.called("false_computation")
            )
            yield from max((list(_run(computations, branch, times)) for branch in names), key=len)
        elif op.opcode == "call":
            for body in op.called("to_apply"):
                yield from _run(computations, body, times)
        elif not op.opcode.endswith(("-done", "-update")):
            yield op, times, computation


def _iterations(loop: Operation, computations: dict[str, Computation]) -> int:
    """Return the number of iterations of a loop.

    The GPU compiler states it. The TPU compiler leaves only the condition `counter < n`. Without
    both the result is 1.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    for name in loop.called("condition"):
        test = list(computations[name].operations.values())[-1]
        if test.opcode == "compare" and "direction=LT" in test.rest:
            limit = computations[name].operations.get(test.operands[-1])
            if limit is not None and limit.opcode == "constant" and limit.operands[0].isdigit():
                return int(limit.operands[0])
    return 1


def _cost(op: Operation, computation: Computation, computations: dict[str, Computation]) -> Cost:
    moved = _result_bytes(op) + sum(
        _read(op, number, size(computation.operations[name].shape), computations)
        for number, name in enumerate(op.operands)
        if name in computation.operations
    )
    cost = Cost(kernels=1, moved=moved, cycles=op.cycles or 0)
    if op.opcode.removesuffix("-start") in COLLECTIVES:
        cost.collective_bytes, cost.collectives = size(op.shape), 1
    if op.cycles is None:
        cost.unestimated[_kind(op, computations)] = 1
        cost.unestimated_bytes = 0 if op.opcode.endswith("-start") else moved
    return cost


def _kind(op: Operation, computations: dict[str, Computation]) -> str:
    """Return the opcode, for a fusion also the operations in it that are not elementwise."""
    if op.opcode != "fusion":
        return op.opcode
    inner = {
        o.opcode for name in op.called("calls") for o in computations[name].operations.values()
    }
    heavy = inner & {"gather", "scatter", "convolution", "dot", "reduce", "reduce-window", "sort"}
    return "fusion of " + ("+".join(sorted(heavy)) or "others")


def _result_bytes(op: Operation) -> float:
    if op.opcode == "custom-call" and op.shape.startswith("("):
        # The last result of a library call is its workspace.
        parts = _SHAPE.findall(op.shape)
        scratch = parts[-1] if parts[-1][0] in ("u8", "s8") else None
        return size(op.shape) - (size(f"{scratch[0]}[{scratch[1]}]") if scratch else 0)
    return size(op.shape)


def _read(op: Operation, number: int, whole: float, computations: dict[str, Computation]) -> float:
    """Return the bytes that an operation reads from one operand, which may be only a selection."""
    if op.opcode in SELECTING and number == 0:
        return size(op.shape)
    for name in op.called("calls") if op.opcode == "fusion" else []:
        inner = computations[name]
        users = _users(inner, inner.parameter(number))
        if users and all(user.opcode in SELECTING and position == 0 for user, position in users):
            return min(whole, sum(size(user.shape) for user, _ in users))
    return whole


def _users(computation: Computation, name: str | None) -> list[tuple[Operation, int]]:
    """List the operations that read a value, also through bitcasts, with the operand number."""
    users = []
    for op in computation.operations.values():
        if name in op.operands:
            passed = op.opcode in ("bitcast", "reshape")
            users += _users(computation, op.name) if passed else [(op, op.operands.index(name))]
    return users


def _number(op: Operation) -> int:
    return int(op.operands[0]) if op.operands else -1


def _operation(name: str, text: str) -> Operation:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, call = text[:end], text[end:].lstrip()
    start = call.index("(")
    stop = _closing(call, start)
    inside, opcode = call[start + 1 : stop], call[:start]
    operands = (inside,) if opcode in ("parameter", "constant") else tuple(_NAME.findall(inside))
    return Operation(name, shape, opcode, operands, call[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Return the position of the parenthesis that matches the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position
    raise ValueError(f"no closing parenthesis: {text[:80]}")
