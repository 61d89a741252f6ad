"""Restricted reader and writer of the pickles in PyTorch weight files.

A pickle is a program for a small stack machine with one dangerous instruction: call any
importable function. `interpret` implements this machine with three permitted constructors and
refuses every other instruction and name.

Why not `pickle.Unpickler` with a restricted `find_class`? It cannot keep the bounds that are
needed here. It hashes dictionary keys before Python code can check them, and nested tuples of a
few hundred bytes take exponential time to hash. One instruction of five bytes (LONG_BINPUT)
allocates a memo of up to 64 GB, and the number of steps is not limited. `interpret` bounds bytes,
steps, types of keys and axes of tensors.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

#: Bounds of a pickle in bytes and steps (instructions, and values copied by a constructor).
#: A state dict of 10,000 tensors with its optimizer takes 4 MB and 1.2 million steps.
MAX_PICKLE_BYTES, MAX_STEPS = 32 * 2**20, 4_000_000
#: Maximum number of axes, as in numpy.
MAX_DIMENSIONS = 64


#: Instructions that push their argument.
_PUSH = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict},
}


class _Global(NamedTuple):
    """An importable name; it is never imported."""

    name: str


class Storage(NamedTuple):
    """Consecutive numbers elsewhere in the file; `length` counts values."""

    dtype: np.dtype
    key: str
    length: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count values."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class RefusedError(Exception):
    """The pickle contains something that a state dict does not need."""


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    """Build a dictionary; keys must be text or numbers, because nested tuples hash slowly."""
    mapping = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise ValueError("a key is neither text nor a number")
        mapping[key] = value
    return mapping


#: Permitted constructors by their name in a pickle.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _mapping,
    "torch._utils _rebuild_tensor_v2": lambda storage, offset, size, stride, *_: _tensor(
        storage, offset, size, stride
    ),
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    valid = isinstance(storage, Storage) and len(size) == len(stride) <= MAX_DIMENSIONS
    if not valid or not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has an invalid storage, offset, size or stride")
    return Tensor(storage, offset, tuple(size), tuple(stride))


def interpret(stream: io.BytesIO) -> Any:
    """Run one pickle on the restricted machine and return its value.

    The stream is left at the end of the pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    steps = 0

    def pop(count: int | None = None) -> list[Any]:
        """Pop `count` values, or all values above the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise ValueError("the pickle pops an empty stack")
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _position in cast(Any, pickletools.genops(stream)):
        steps += 1
        if steps > MAX_STEPS:
            raise RefusedError(f"takes more than {MAX_STEPS} steps to read")
        match opcode.name:
            case name if name in _PUSH:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            # Protocol version and frame sizes have no effect on the value.
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            # The memo stores values that the pickle uses several times.
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(pop()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(pop(int(name[-1]))))
            case "APPEND" | "APPENDS" as name:
                items = pop(1 if name == "APPEND" else None)
                _top(stack, list).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = pop(2 if name == "SETITEM" else None)
                _top(stack, dict).update(_mapping(zip(items[::2], items[1::2], strict=True)))
            case "GLOBAL":
                stack.append(_global(argument))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join(pop(2))))
            case "BINPERSID":
                stack.append(_persistent(*pop(1)))
            case "REDUCE":
                # The only call. A name outside of `_CALLS` raises an error.
                function, arguments = pop(2)
                # A constructor copies its arguments, so their lengths count as steps.
                steps += sum(len(a) for a in arguments if isinstance(a, list | tuple | dict))
                stack.append(_CALLS[function.name](*arguments))
            case "BUILD":
                pop(1)  # a state dict's `_metadata`: layer versions, not used here
            case "STOP":
                return stack.pop()
            case name:
                raise RefusedError(f"contains the pickle instruction {name}")


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise ValueError("the pickle fills a value that is not a container")
    return stack[-1]


def _global(name: str) -> _Global:
    # Refused when the name is read, before any call.
    if name not in _CALLS and name.removeprefix("torch ") not in STORAGES:
        raise RefusedError(f"calls {name.replace(' ', '.')}")
    return _Global(name)


def _persistent(reference: Any) -> Storage:
    """Read ("storage", type, key, device, length); the older layout has a sixth value, None."""
    kind, storage, key, _device, length, *view = reference
    if kind != "storage" or not isinstance(key, str) or not isinstance(length, int) or any(view):
        raise ValueError("a storage has an unknown description")
    return Storage(STORAGES[storage.name.removeprefix("torch ")], key, length)


def write_pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """Write the pickle of an OrderedDict of CPU tensors, in protocol 2 and without a memo."""

    # Instructions: X text, J and K integers of 4 and 1 bytes, "(" mark, t tuple, Q storage, c name,
    # ")" empty tuple, R call, u set items, 0x89 False, 0x80 protocol, "." stop.
    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    names = {dtype: name for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    items = b""
    for key, (name, tensor) in enumerate(tensors.items()):
        # PyTorch counts strides in values, NumPy in bytes.
        stride = tuple(s // tensor.itemsize for s in tensor.strides)
        storage = f"ctorch\n{names[tensor.dtype]}\n".encode()
        reference = b"(" + text("storage") + storage + text(str(key)) + text("cpu")
        reference += b"J" + struct.pack("<i", tensor.size) + b"tQ"
        # Arguments of `_rebuild_tensor_v2`: storage, offset, size, stride, requires_grad and hooks.
        view = reference + b"K\x00" + integers(tensor.shape) + integers(stride) + b"\x89"
        view += ordered_dict
        items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"
    return b"\x80\x02" + ordered_dict + b"(" + items + b"u."
