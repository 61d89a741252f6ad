"""What a compiled program will do, read off its text: kernels, the bytes they move, estimated cycles, collectives.

XLA prints the optimised program as computations of one operation a line. What runs is the entry computation and what
it calls: bodies of loops as often as they go round, the costlier branch of a conditional. A fusion is one kernel.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
BITS |= {"f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64}
#: Operations that name, split or wait for what lies in memory, and move nothing.
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
#: Operations that touch what they select, not the whole of their first operand.
SELECTING = {"dynamic-slice", "slice", "gather"}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Operation:
    """One line of a computation. `shape` is the text of its result's type, `rest` what follows the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def scope(self) -> str:
        """Where in the Python program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    def called(self, attribute: str) -> list[str]:
        found = re.search(attribute + r"=(\{[^}]*\}|%[\w.\-]+)", self.rest)
        return _NAME.findall(found[1]) if found else []


@dataclass
class Computation:
    """Operations in order, by name."""

    operations: dict[str, Operation] = field(default_factory=dict)

    def parameter(self, number: int) -> str | None:
        """The name of a parameter."""
        wanted = (
            name
            for name, op in self.operations.items()
            if op.opcode == "parameter" and _number(op) == number
        )
        return next(wanted, None)


@dataclass
class Cost:
    """Of a program or a part of it.

    Attributes:
        kernels: operations that are started.
        moved: bytes of their operands and results.
        cycles: estimated, of those that carry an estimate.
        silent: how many of each kind carry none.
        unpriced: bytes of those, less copies that go on beside other work.
        told: bytes of what collectives give.
        collectives: how many there are.
    """

    kernels: int = 0
    moved: float = 0
    cycles: int = 0
    silent: Counter[str] = field(default_factory=Counter)
    unpriced: float = 0
    told: float = 0
    collectives: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        self.kernels += other.kernels * times
        self.moved += other.moved * times
        self.cycles += other.cycles * times
        self.silent.update({what: n * times for what, n in other.silent.items()})
        self.unpriced += other.unpriced * times
        self.told += other.told * times
        self.collectives += other.collectives * times


def part_of(scope: str) -> str:
    """Which part of a training step a scope belongs to."""
    for part in ("augment", "update"):
        if re.search(rf"(^|/|\(){part}(/|\)|$)", scope):
            return part
    return "backward" if "transpose(" in scope else "forward"


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program, and the name of its entry."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            operation = _operation(found[1], found[2])
            current.operations[operation.name] = operation
    return computations, entry


def costs(text: str) -> dict[str, Cost]:
    """What a program costs by part of the step; the sum is under "all"."""
    computations, entry = parse(text)
    parts: dict[str, Cost] = {"all": Cost()}
    for operation, times, computation in _run(computations, entry):
        cost = _cost(operation, computation, computations)
        for part in (part_of(operation.scope), "all"):
            parts.setdefault(part, Cost()).add(cost, times)
    return parts


def operations(text: str) -> list[tuple[Cost, Operation, int]]:
    """Every operation that runs, what it costs once, and how often it runs."""
    computations, entry = parse(text)
    return [
        (_cost(op, comp, computations), op, times) for op, times, comp in _run(computations, entry)
    ]


def size(shape: str) -> float:
    """Bytes of a type, tuples included."""
    return sum(
        BITS.get(kind, 0) / 8 * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in _SHAPE.findall(shape)
    )


def _run(
    computations: dict[str, Computation], name: str, times: int = 1
) -> Iterator[tuple[Operation, int, Computation]]:
    """Operations that run, how often, and the computation they stand in."""
    computation = computations[name]
    for op in computation.operations.values():
        if op.opcode in FREE:
            continue
        if op.opcode == "while":
            for body in op.called("body"):
                yield from _run(computations, body, times * _rounds(op, computations))
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


def _rounds(loop: Operation, computations: dict[str, Computation]) -> int:
    """How often a loop goes round: what the GPU's compiler says, or the number that a counter from 0 stays below, which
    is all that the TPU's leaves; 1 where neither is there."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
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
        cost.told, cost.collectives = size(op.shape), 1
    if op.cycles is None:
        cost.silent[_kind(op, computations)] = 1
        cost.unpriced = 0 if op.opcode.endswith("-start") else moved
    return cost


def _kind(op: Operation, computations: dict[str, Computation]) -> str:
    """The opcode; of a fusion, what in it makes it more than elementwise."""
    if op.opcode != "fusion":
        return op.opcode
    inner = {
        o.opcode for name in op.called("calls") for o in computations[name].operations.values()
    }
    telling = inner & {"gather", "scatter", "convolution", "dot", "reduce", "reduce-window", "sort"}
    return "fusion of " + ("+".join(sorted(telling)) or "others")


def _result_bytes(op: Operation) -> float:
    if op.opcode == "custom-call" and op.shape.startswith("("):
        # The last result of a library's call is its workspace.
        parts = _SHAPE.findall(op.shape)
        scratch = parts[-1] if parts[-1][0] in ("u8", "s8") else None
        return size(op.shape) - (size(f"{scratch[0]}[{scratch[1]}]") if scratch else 0)
    return size(op.shape)


def _read(op: Operation, number: int, whole: float, computations: dict[str, Computation]) -> float:
    """Bytes that an operation reads of one operand: of one that it only selects from, what it selects."""
    if op.opcode in SELECTING and number == 0:
        return size(op.shape)
    for name in op.called("calls") if op.opcode == "fusion" else []:
        inner = computations[name]
        users = _users(inner, inner.parameter(number))
        if users and all(user.opcode in SELECTING and position == 0 for user, position in users):
            return min(whole, sum(size(user.shape) for user, _ in users))
    return whole


def _users(computation: Computation, name: str | None) -> list[tuple[Operation, int]]:
    """Who reads a value, through bitcasts, and as which operand."""
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
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"no closing parenthesis: {text[:80]}")
