"""Read and write PyTorch weight files without PyTorch, and without executing their content.

A `.pth` file is a pickle and raw numbers. `torch_pickle` reads the pickle without calling
anything it names, within bounds on bytes, steps and sizes.

Both layouts are read: the zip of torch 1.6 and later (`data.pkl`, `data/0`, `data/1`, …), and the
older stream (five pickles, then the numbers), in which torchvision still publishes some weights.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.models.torch_pickle import (
    MAX_PICKLE_BYTES,
    RefusedError,
    Storage,
    Tensor,
    interpret,
    write_pickle,
)

#: Keys of the state dict in checkpoints that also store the epoch, the optimizer etc.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")
#: Prefixes that `DataParallel` and `torch.compile` add to every name.
PREFIXES = ("module.", "_orig_mod.")

#: Maximum size of all tensors, as a multiple of the file size. Tied weights share their numbers.
MAX_EXPANSION = 4
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_MAGIC = b"PK\x03\x04"


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
    """Read the tensors of a `.pth`, `.pt`, `.bin` or `.safetensors` file.

    A state dict in a training checkpoint is found under one of the keys `WRAPPERS`. A prefix of
    `PREFIXES` is removed if all names have it.

    Returns:
        Tensors by name, in the file's order and dtypes; bfloat16 as `ml_dtypes.bfloat16`.

    Raises:
        InputError: the file is missing or damaged, has no state dict, or contains a call that a
            state dict does not need. The message names the call; it was not executed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file. Pass a PyTorch state dict (.pth) or a .safetensors file."
        )
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def write_tensors(
    path: Path | str, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as `.pth` (for `torch.load(weights_only=True)`) or `.safetensors`.

    The file is written atomically. Equal tensors give equal bytes.

    Args:
        path: output file; its suffix selects the format.
        tensors: tensors by name.
        metadata: texts, stored by `.safetensors` only.

    Raises:
        InputError: the suffix is neither, or the folder is not writable.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"{path}: the name must end in .pth or .safetensors")
    tensors = {
        # `ascontiguousarray` gives a scalar one axis; `reshape` removes it.
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
    """Read the metadata texts of a `.safetensors` file.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors import safe_open

    with _safetensors_errors(path), safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    with _safetensors_errors(path):
        return load_file(path)


@contextmanager
def _safetensors_errors(path: Path | str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    # KeyError and AttributeError: dtypes that numpy does not have
    except (SafetensorError, OSError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}). Download or export it again."
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    reader = _read_zip if data.startswith(_ZIP_MAGIC) else _read_legacy
    try:
        value, numbers = reader(io.BytesIO(data))
    except RefusedError as error:
        raise InputError(
            f"{path}: {error}, which a state dict does not need. It was refused and not executed. "
            "Save only the model's state_dict()."
        ) from error
    except Exception as error:  # any failure of the interpreter means a damaged file
        raise InputError(
            f"{path}: damaged, cut short, or not a PyTorch file ({error}). "
            "Download or save it again."
        ) from error
    tensors, left = {}, MAX_EXPANSION * len(data)
    for name, tensor in _find_state_dict(path, value).items():
        # Checked before copying, so that a small file cannot request excessive memory.
        left -= math.prod(tensor.size) * tensor.storage.dtype.itemsize
        if left < 0:
            raise InputError(
                f"{path}: its tensors take over {MAX_EXPANSION} times the file's size; refused"
            )
        try:
            tensors[name] = _copy_tensor(tensor, numbers(tensor.storage))
        except Exception as error:
            raise InputError(
                f"{path}: tensor {name} is damaged ({error}). Download or save it again."
            ) from error
    return tensors


def _find_state_dict(path: Path, value: Any) -> dict[str, Tensor]:
    """Find the mapping from names to tensors, at the top or one level below."""
    top = value if isinstance(value, dict) else {}
    for candidate in (top, *(top[key] for key in WRAPPERS if key in top)):
        items = candidate.items() if isinstance(candidate, dict) else ()
        if items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
            return candidate
    raise InputError(
        f"{path}: contains no state dict at the top or under {', '.join(WRAPPERS)}. "
        "Save model.state_dict()."
    )


def _read_zip(file: io.BytesIO) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    # Any other number of matches raises an error, which is reported as a damaged file.
    (pickled,) = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    root = pickled.removesuffix("data.pkl")
    big = root + "byteorder" in names and archive.read(root + "byteorder") == b"big"
    order: Literal["<", ">"] = ">" if big else "<"

    def numbers(storage: Storage) -> np.ndarray:
        member = archive.getinfo(f"{root}data/{storage.key}")
        compressed = member.compress_type != zipfile.ZIP_STORED
        if compressed or member.file_size < storage.length * storage.dtype.itemsize:
            raise ValueError(
                f"its storage {storage.key} has fewer than {storage.length} values or is compressed"
            )
        dtype = storage.dtype.newbyteorder(order)
        return np.frombuffer(archive.read(member), dtype, storage.length)

    # Checked before reading, because a compressed member may expand to a multiple of its size.
    size = archive.getinfo(pickled).file_size
    if size > MAX_PICKLE_BYTES:
        raise RefusedError(f"describes its tensors in {size} bytes")
    return interpret(io.BytesIO(archive.read(pickled))), numbers


def _read_legacy(file: io.BytesIO) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    if interpret(file) != _LEGACY_MAGIC:
        raise ValueError("it is neither a zip nor a legacy file")
    # The order of these pickles is fixed by torch's legacy format.
    _version, system, value, keys = (interpret(file) for _ in range(4))
    order: Literal["<", ">"] = "<" if system.get("little_endian", True) else ">"
    starts, dtypes = {}, {s.key: s.dtype for s in _storages(value)}
    for key in keys:
        # Each storage: its number of values in 8 bytes, then the values.
        (length,) = struct.unpack(order + "q", file.read(8))
        if length < 0:
            raise ValueError("a storage has a negative length")
        starts[key] = (file.tell(), length)
        file.seek(length * dtypes[key].itemsize, io.SEEK_CUR)

    def numbers(storage: Storage) -> np.ndarray:
        start, length = starts[storage.key]
        return np.frombuffer(file.getbuffer(), storage.dtype.newbyteorder(order), length, start)

    return value, numbers


def _storages(value: Any) -> list[Storage]:
    """List the storages of all tensors in nested containers."""
    # A list instead of recursion, because a damaged file may be nested very deeply.
    storages, pending, visited = [], [value], set()
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            storages.append(item.storage)
        elif isinstance(item, dict | list | tuple) and id(item) not in visited:
            visited.add(id(item))  # a container may contain itself
            pending.extend(item.values() if isinstance(item, dict) else item)
    return storages


def _copy_tensor(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """Copy a tensor to a contiguous array in native byte order."""
    count = math.prod(tensor.size)
    # Index of the last value that the tensor reads. Size and strides come from an untrusted file.
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    # A stride of 0 could repeat few values many times, so the count is bounded as well.
    if count and (last >= len(values) or count > len(values)):
        raise ValueError(
            f"{tensor.size} values from {tensor.offset} are outside its storage of {len(values)}"
        )
    # NumPy counts strides in bytes. The checks above confine the view to `values`.
    strides = [s * values.itemsize for s in tensor.stride]
    view = np.lib.stride_tricks.as_strided(
        values[tensor.offset :], tensor.size, strides, writeable=False
    )
    return np.array(view, dtype=tensor.storage.dtype, order="C")


def _write_zip(path: Path, tensors: dict[str, np.ndarray]) -> None:
    members = {"data.pkl": write_pickle(tensors), "byteorder": b"little", "version": b"3\n"}
    for key, tensor in enumerate(tensors.values()):
        members[f"data/{key}"] = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():  # ZipInfo has a fixed date, for reproducible bytes
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
