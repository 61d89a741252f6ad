"""Reading and writing PyTorch's weight files without PyTorch, and without running anything they hold.

A `.pth` file is a pickle beside raw numbers. A pickle is a program for a small stack machine whose danger is one
instruction: call any importable function. `_interpret` is that machine with the call restricted to a table of three
constructors, written here so that no unpickler ever sees the file; any other instruction or name is refused. What it
does is bounded as well: bytes inflated, instructions run, what a key may be, and bytes that tensors unfold to.

Both layouts are read: the zip of torch 1.6 and later (`data.pkl`, `data/0`, `data/1` …), and the stream before it
(five pickles, then the numbers), in which torchvision still ships some weights.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import ml_dtypes
import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic

#: What a checkpoint calls the state dict it holds beside the epoch, the optimizer and so on.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")
#: What `DataParallel` and `torch.compile` put before every name.
PREFIXES = ("module.", "_orig_mod.")

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

#: Bounds of a pickle, in bytes and in steps (instructions run and pairs copied): a state dict of 10,000 tensors beside
#: its optimizer takes 4 MB and 1.2 million steps.
MOST_PICKLE_BYTES, MOST_STEPS = 32 * 2**20, 4_000_000
#: How often the file's size all tensors together may be: tied weights name their numbers twice.
MOST_UNFOLDED = 4
#: What numpy itself takes at most.
MOST_DIMENSIONS = 64

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_MAGIC = b"PK\x03\x04"
#: Instructions that push the value they carry.
_PUSH = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict},
}


class _Global(NamedTuple):
    """An importable name, never imported."""

    name: str


class _Storage(NamedTuple):
    """A run of numbers elsewhere in the file."""

    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    """A strided view into a storage; offset and strides count values."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(Exception):
    """The pickle asks for something a state dict does not need."""


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    """A dictionary of pairs whose keys are names or numbers: hashing nested tuples can take for ever."""
    mapping = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise ValueError("a key is neither a name nor a number")
        mapping[key] = value
    return mapping


#: The only calls there are, by the name a pickle gives them.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _mapping,
    "torch._utils _rebuild_tensor_v2": lambda storage, offset, size, stride, *_: _tensor(
        storage, offset, size, stride
    ),
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
}


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, `.pt`, `.bin` or `.safetensors` file by name, in the file's order and dtypes.

    A checkpoint that holds its state dict under one of `WRAPPERS` gives that state dict; one of `PREFIXES` is taken
    off where every name has it. bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
        InputError: the file is missing, damaged, holds something other than a state dict, or asks for a call that
            a state dict does not need (the call is named, and was not made).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a PyTorch state dict (.pth) or .safetensors")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def write_tensors(
    path: Path | str, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name, as `.pth` that `torch.load(weights_only=True)` opens, or as `.safetensors`.

    The same tensors give the same bytes. Written atomically. Only `.safetensors` holds `metadata`.

    Raises:
        InputError: the suffix is neither, or the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"{path}: the name must end in .pth or .safetensors")
    tensors = {
        name: np.ascontiguousarray(tensor).reshape(np.shape(tensor))
        for name, tensor in tensors.items()
    }
    with atomic(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(tensors, temporary, metadata)
        else:
            _write_zip(temporary, tensors)


def read_metadata(path: Path | str) -> dict[str, str]:
    """The texts that a `.safetensors` file holds beside its tensors.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}); download or export it again"
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (
        SafetensorError,
        OSError,
        KeyError,
        AttributeError,
    ) as error:  # the last two: a type that numpy lacks
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}); download or export it again"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    reader = _read_zip if data.startswith(_ZIP_MAGIC) else _read_legacy
    try:
        value, numbers = reader(io.BytesIO(data))
    except _Refused as error:
        raise InputError(
            f"{path}: {error}, which a state dict does not need; refused and not run. "
            "Save the model's state_dict() alone"
        ) from error
    except (
        Exception
    ) as error:  # whatever breaks while interpreting a file means that the file is broken
        raise InputError(
            f"{path}: damaged, cut short, or not a PyTorch file ({error}); download or save it again"
        ) from error
    tensors, left = {}, MOST_UNFOLDED * len(data)
    for name, tensor in _find_state_dict(path, value).items():
        left -= math.prod(tensor.size) * tensor.storage.dtype.itemsize
        if left < 0:
            raise InputError(
                f"{path}: its tensors unfold to over {MOST_UNFOLDED} times the file; it is refused"
            )
        try:
            tensors[name] = _materialize(tensor, numbers(tensor.storage))
        except Exception as error:
            raise InputError(
                f"{path}: tensor {name} is damaged ({error}); download or save it again"
            ) from error
    return tensors


def _find_state_dict(path: Path, value: Any) -> dict[str, _Tensor]:
    """The mapping from names to tensors, at the top or one level down."""
    held = value if isinstance(value, dict) else {}
    for candidate in (held, *(held[key] for key in WRAPPERS if key in held)):
        items = candidate.items() if isinstance(candidate, dict) else ()
        if items and all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in items):
            return candidate
    raise InputError(
        f"{path}: holds no state dict, neither itself nor under {', '.join(WRAPPERS)}; save model.state_dict()"
    )


def _read_zip(file: io.BytesIO) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    (pickled,) = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    root = pickled.removesuffix("data.pkl")
    order: Literal["<", ">"] = (
        ">" if root + "byteorder" in names and archive.read(root + "byteorder") == b"big" else "<"
    )

    def numbers(storage: _Storage) -> np.ndarray:
        member = archive.getinfo(f"{root}data/{storage.key}")
        if (
            member.file_size < storage.length * storage.dtype.itemsize
            or member.compress_type != zipfile.ZIP_STORED
        ):
            raise ValueError(
                f"its storage {storage.key} is shorter than {storage.length} values, or compressed"
            )
        return np.frombuffer(
            archive.read(member), storage.dtype.newbyteorder(order), storage.length
        )

    size = archive.getinfo(pickled).file_size
    if size > MOST_PICKLE_BYTES:
        raise _Refused(f"describes its tensors in {size} bytes")
    return _interpret(io.BytesIO(archive.read(pickled))), numbers


def _read_legacy(file: io.BytesIO) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    if _interpret(file) != _LEGACY_MAGIC:
        raise ValueError("it is neither a zip nor a legacy file")
    _version, system, value, keys = (_interpret(file) for _ in range(4))
    order: Literal["<", ">"] = "<" if system.get("little_endian", True) else ">"
    starts, dtypes = {}, {s.key: s.dtype for s in _storages(value)}
    for key in keys:
        (length,) = struct.unpack(order + "q", file.read(8))
        if length < 0:
            raise ValueError("a storage has a negative length")
        starts[key] = (file.tell(), length)
        file.seek(length * dtypes[key].itemsize, io.SEEK_CUR)

    def numbers(storage: _Storage) -> np.ndarray:
        start, length = starts[storage.key]
        return np.frombuffer(file.getbuffer(), storage.dtype.newbyteorder(order), length, start)

    return value, numbers


def _storages(value: Any) -> list[_Storage]:
    """Every storage that a value's tensors use, however deep."""
    found, pending, seen = [], [value], set()
    while pending:
        item = pending.pop()
        if isinstance(item, _Tensor):
            found.append(item.storage)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))  # a container may hold itself
            pending.extend(item.values() if isinstance(item, dict) else item)
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride))
    if (
        not isinstance(storage, _Storage)
        or not whole
        or len(size) != len(stride)
        or len(size) > MOST_DIMENSIONS
    ):
        raise ValueError("a tensor's storage, offset, size or stride makes no sense")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _materialize(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    """A contiguous copy in native byte order."""
    count = math.prod(tensor.size)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    if count and (last >= len(values) or count > len(values)):
        raise ValueError(
            f"{tensor.size} values from {tensor.offset} lie outside its storage of {len(values)}"
        )
    strides = [s * values.itemsize for s in tensor.stride]
    view = np.lib.stride_tricks.as_strided(
        values[tensor.offset :], tensor.size, strides, writeable=False
    )
    return np.array(view, dtype=tensor.storage.dtype, order="C")


def _interpret(stream: io.BytesIO) -> Any:
    """Run one pickle on the restricted machine and return its value; the stream is left behind it."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    steps = 0

    def take(count: int | None = None) -> list[Any]:
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise ValueError("the pickle takes more than it put")
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _position in cast(Any, pickletools.genops(stream)):
        steps += 1
        if steps > MOST_STEPS:
            raise _Refused(f"takes more than {MOST_STEPS} steps to read")
        match opcode.name:
            case name if name in _PUSH:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(take()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(take(int(name[-1]))))
            case "APPEND" | "APPENDS" as name:
                items = take(1 if name == "APPEND" else None)
                _top(stack, list).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = take(2 if name == "SETITEM" else None)
                _top(stack, dict).update(_mapping(zip(items[::2], items[1::2], strict=True)))
            case "GLOBAL":
                stack.append(_global(argument))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join(take(2))))
            case "BINPERSID":
                stack.append(_persistent(*take(1)))
            case "REDUCE":
                function, arguments = take(2)
                steps += sum(len(a) for a in arguments if isinstance(a, list | tuple | dict))
                stack.append(_CALLS[function.name](*arguments))
            case "BUILD":
                take(1)  # a state dict's `_metadata`: layer versions, which nothing here reads
            case "STOP":
                return stack.pop()
            case name:
                raise _Refused(f"holds the pickle instruction {name}")


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise ValueError("the pickle fills something that is no container")
    return stack[-1]


def _global(name: str) -> _Global:
    if name not in _CALLS and name.removeprefix("torch ") not in STORAGES:
        raise _Refused(f"asks for {name.replace(' ', '.')}")
    return _Global(name)


def _persistent(reference: Any) -> _Storage:
    """A storage, from ("storage", type, key, device, length) and in the legacy layout a sixth, None."""
    kind, storage, key, _device, length, *view = reference
    if kind != "storage" or not isinstance(key, str) or not isinstance(length, int) or any(view):
        raise ValueError("a storage is described in an unknown way")
    return _Storage(STORAGES[storage.name.removeprefix("torch ")], key, length)


def _write_zip(path: Path, tensors: dict[str, np.ndarray]) -> None:
    members = {"data.pkl": _pickle(tensors), "byteorder": b"little", "version": b"3\n"}
    for key, tensor in enumerate(tensors.values()):
        members[f"data/{key}"] = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(
                zipfile.ZipInfo(f"archive/{name}"), data
            )  # ZipInfo's fixed date: the same bytes


def _pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """The pickle torch.save would write for an OrderedDict of CPU tensors, in protocol 2 and without a memo."""

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    names = {dtype: name for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    items = b""
    for key, (name, tensor) in enumerate(tensors.items()):
        stride = tuple(s // tensor.itemsize for s in tensor.strides)
        storage = f"ctorch\n{names[tensor.dtype]}\n".encode()
        reference = b"(" + text("storage") + storage + text(str(key)) + text("cpu")
        reference += b"J" + struct.pack("<i", tensor.size) + b"tQ"
        view = (
            reference
            + b"K\x00"
            + integers(tensor.shape)
            + integers(stride)
            + b"\x89"
            + ordered_dict
        )
        items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"
    return b"\x80\x02" + ordered_dict + b"(" + items + b"u."
