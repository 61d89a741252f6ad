"""Python functions that XLA calls with the addresses of its arrays on CPUs.

XLA's foreign function interface passes a C structure, the call frame. The structures below are
those of `xla/ffi/api/c_api.h`, which JAX installs with its headers. XLA compares the version that
`_answer_version` writes with its own and refuses another layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import NamedTuple

import jax

#: Version of the structures below, and number of the extension that asks for it.
MAJOR, MINOR, METADATA = 0, 3, 1
INTERNAL_ERROR = 13


class Operand(NamedTuple):
    """An array of XLA: operand or result."""

    address: int
    dtype: int
    """XLA's number of the dtype."""
    shape: tuple[int, ...]


#: First fields of most structures.
_HEADER = (("struct_size", c_size_t), ("extension", c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (*_HEADER, ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("kind", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        *_HEADER,
        ("dtype", c_int),
        ("address", c_void_p),
        ("rank", c_int64),
        ("sizes", POINTER(c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        *_HEADER,
        ("count", c_int64),
        ("kinds", POINTER(c_int)),
        ("values", POINTER(POINTER(_Buffer))),
    )


class _Error(ctypes.Structure):
    _fields_ = (*_HEADER, ("message", c_char_p), ("code", c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        *_HEADER,
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
    )


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
#: XLA keeps the addresses of these, so they must live as long as the process.
_handlers: list[ctypes._FuncPointer] = []


def register(name: str, function: Callable[..., None]) -> None:
    """Make a function callable from compiled programs, by `jax.ffi.ffi_call(name, …)`.

    Args:
        name: name of the foreign function.
        function: takes all operands, then all results. It must not use JAX.
    """

    def handle(frame: ctypes._Pointer[_Frame]) -> int | None:
        call = frame.contents
        if call.extension and call.extension.contents.kind == METADATA:
            _answer_version(call.extension.contents)
            return None
        try:
            function(*_arrays(call.operands), *_arrays(call.results))
        # An exception cannot pass through C; XLA raises it from the computation.
        except Exception as error:
            return _error(call, f"{name}: {error!r}")
        return None

    handler = _Handler(handle)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    _handlers.append(handler)


def _answer_version(extension: _Extension) -> None:
    metadata = extension.metadata.contents
    metadata.version = _Version(ctypes.sizeof(_Version), None, MAJOR, MINOR)
    metadata.traits = 0


def _arrays(buffers: _Buffers) -> list[Operand]:
    values = [buffers.values[number].contents for number in range(buffers.count)]
    return [Operand(each.address, each.dtype, tuple(each.sizes[: each.rank])) for each in values]


def _error(call: _Frame, message: str) -> int | None:
    arguments = _Error(ctypes.sizeof(_Error), None, message.encode(), INTERNAL_ERROR)
    return call.api.contents.create_error(ctypes.byref(arguments))
