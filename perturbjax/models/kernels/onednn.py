"""Convolutions by oneDNN on CPUs (extra `onednn`).

oneDNN is Intel's library of CPU kernels; PyTorch uses it too. XLA's CPU library computes bfloat16
convolutions in float32, and gradients of kernels at a third to two thirds of oneDNN's speed
(docs/performance.md has the measurements). Training uses oneDNN, and so do frozen EfficientNets and
the narrow layers of segmentation networks. Predictions of trained networks do not use it, so they
are the same with and without it. Programs for several devices do not use it, because XLA cannot
divide a foreign function between devices.

XLA calls `_forward`, `_input`, `_kernel` and `_activated` with the addresses of its arrays
(`xla_calls`). They pass these addresses to oneDNN's C functions, so images are not copied. Kernels
are copied, because oneDNN chooses their layout. Source: oneDNN 3 Developer Guide, "Convolution".
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache, wraps
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from perturbjax.models.kernels import xla_calls
from perturbjax.models.kernels.xla_calls import Operand

# Constants of oneDNN 3 (dnnl_types.h).
CPU, DEFAULT_STREAM, FORWARD_TRAINING, FORWARD_INFERENCE, DIRECT, ANY_LAYOUT = 1, 1, 64, 96, 1, 1
QUERY_KERNEL, QUERY_KERNEL_GRADIENT = 131, 132
#: Numbers of the operands of a primitive.
SOURCE, TARGET, WEIGHTS, BIAS = 1, 17, 33, 41
SOURCE_GRADIENT, TARGET_GRADIENT, WEIGHT_GRADIENT = 129, 145, 161
#: Name of a dtype, and its numbers in XLA and in oneDNN.
DTYPES = {"bfloat16": (16, 2), "float32": (11, 3)}
#: Order of oneDNN's axes in XLA's arrays: (b, c, h, w) in NHWC, (o, i, h, w) in HWIO.
IMAGE_AXES, KERNEL_AXES = (0, 3, 1, 2), (3, 2, 0, 1)
#: The same for kernels of depthwise convolutions, (groups, 1, 1, h, w) in HW11O.
DEPTHWISE_AXES = (4, 3, 2, 0, 1)
Activation = Literal["none", "relu6", "silu"]
#: Numbers of activations, and their parameters alpha and beta: clip to [0, 6], and swish.
ACTIVATIONS = {"none": 0, "relu6": 0x2E, "silu": 0x2C}
PARAMETERS = {0x2E: (0.0, 6.0), 0x2C: (1.0, 0.0)}
#: `dnnl_dims_t`.
Sizes = c_int64 * 12
Shape = tuple[int, ...]
#: XLA calls from several threads, but all primitives that a thread creates share the scratch memory
#: of that thread. Without the lock, parallel branches of a network overwrite each other's values.
_LOCK = threading.Lock()
#: Operand of a primitive: number, layout, and address or array.
_Value = tuple[int, c_void_p, int | np.ndarray]


class _Argument(ctypes.Structure):
    """`dnnl_exec_arg_t`."""

    _fields_ = (("number", c_int), ("memory", c_void_p))


class _Convolution(NamedTuple):
    """A primitive of oneDNN and the layouts of its operands."""

    primitive: c_void_p
    images: c_void_p
    outputs: c_void_p
    kernel: c_void_p
    """Layout of the kernel in XLA's array."""
    own_kernel: c_void_p
    """Layout of the kernel that oneDNN chose."""
    reorder: c_void_p
    """Primitive that converts a kernel to oneDNN's layout, or its gradient to XLA's."""


def computes(dtype: jnp.dtype, kernel_shape: Shape) -> bool:
    """Whether oneDNN computes training convolutions with a (kh, kw, in, out) kernel."""
    # XLA computes 1×1 convolutions as matrix products.
    return dtype.name in DTYPES and kernel_shape[:2] != (1, 1) and is_usable()


def is_usable() -> bool:
    """Whether oneDNN is installed and the only device is a CPU."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """Load oneDNN and register its operations with XLA; None if it cannot be used."""
    # The wheel installs the library in the data folder of the environment.
    path = Path(sysconfig.get_path("data"), "lib", "libdnnl.so.3")
    if not sys.platform.startswith("linux") or not path.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        for function in (_forward, _input, _kernel, _activated):
            xla_calls.register(_target(function.__name__), function)
    # libgomp is missing, or this JAX has another calling convention.
    except (OSError, RuntimeError, ValueError):
        return None
    loaded.dnnl_primitive_desc_query_md.restype = c_void_p
    loaded.dnnl_memory_desc_get_size.restype = c_size_t
    return loaded


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], *, padding: int
) -> Float[Array, "b h2 w2 o"]:
    """Convolve at stride 1 with symmetric padding, in the dtype of `x`."""
    return _image_call("_forward", x, kernel, kernel.shape[3], 2 * padding + 1 - len(kernel))


def input_gradient(
    gradient: Float[Array, "b h2 w2 o"], kernel: Float[Array, "k k i o"], *, padding: int
) -> Float[Array, "b h w i"]:
    """Compute the gradient of the input from the gradient of the output."""
    return _image_call("_input", gradient, kernel, kernel.shape[2], len(kernel) - 1 - 2 * padding)


def kernel_gradient(
    x: Float[Array, "b h w i"], gradient: Float[Array, "b h2 w2 o"], *, size: int
) -> Float[Array, "k k i o"]:
    """Compute the gradient of the kernel from the gradient of the output."""
    return _call("_kernel", (size, size, x.shape[3], gradient.shape[3]), x, gradient)


def convolve_and_activate(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k k _ o"],
    bias: Float[Array, " o"],
    *,
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    activation: Activation,
) -> Float[Array, "b h2 w2 o"]:
    """Convolve, add a bias and apply an activation in one pass, without gradients.

    Args:
        x: images, float32.
        kernel: weights; with one input channel and several of `x`, each channel of `x` has its own
            filter (depthwise).
        bias: value to add to each output channel.
        stride: step in pixels.
        padding: zeros above and below, left and right, in pixels.
        activation: none, ReLU6 or SiLU.
    """
    size = len(kernel)
    high, wide = (
        (length + sum(zeros) - size) // stride + 1
        for length, zeros in zip(x.shape[1:3], padding, strict=True)
    )
    # Foreign functions take arrays only, so the settings are one.
    settings = np.array([stride, *padding[0], *padding[1], ACTIVATIONS[activation]], np.int32)
    shape = (len(x), high, wide, kernel.shape[3])
    return _call("_activated", shape, x, kernel, bias, jnp.asarray(settings))


def _image_call(name: str, x: Array, kernel: Array, channels: int, growth: int) -> Array:
    return _call(name, (len(x), x.shape[1] + growth, x.shape[2] + growth, channels), x, kernel)


def _call(name: str, shape: Shape, *operands: Array) -> Array:
    result = jax.ShapeDtypeStruct(shape, operands[0].dtype)
    return jax.ffi.ffi_call(_target(name), result, vmap_method="sequential")(*operands)


def _target(name: str) -> str:
    return f"perturbjax_onednn{name}"


def _one_at_a_time(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def call(*operands: Operand) -> None:
        with _LOCK:
            function(*operands)

    return call


@_one_at_a_time
def _forward(x: Operand, kernel: Operand, y: Operand) -> None:
    conv = _create("forward", x.dtype, x.shape, kernel.shape, y.shape)
    source, target = (SOURCE, conv.images, x.address), (TARGET, conv.outputs, y.address)
    _execute(conv.primitive, source, _reordered(conv, kernel), target)


@_one_at_a_time
def _input(gradient: Operand, kernel: Operand, dx: Operand) -> None:
    conv = _create("backward_data", dx.dtype, dx.shape, kernel.shape, gradient.shape)
    target = (TARGET_GRADIENT, conv.outputs, gradient.address)
    source = (SOURCE_GRADIENT, conv.images, dx.address)
    _execute(conv.primitive, target, _reordered(conv, kernel), source)


@_one_at_a_time
def _kernel(x: Operand, gradient: Operand, dk: Operand) -> None:
    conv = _create("backward_weights", x.dtype, x.shape, dk.shape, gradient.shape)
    own = _allocate(conv.own_kernel)
    source = (SOURCE, conv.images, x.address)
    target = (TARGET_GRADIENT, conv.outputs, gradient.address)
    _execute(conv.primitive, source, target, (WEIGHT_GRADIENT, conv.own_kernel, own))
    _execute(conv.reorder, (SOURCE, conv.own_kernel, own), (TARGET, conv.kernel, dk.address))


@_one_at_a_time
def _activated(x: Operand, kernel: Operand, bias: Operand, settings: Operand, y: Operand) -> None:
    values = tuple((ctypes.c_int32 * 6).from_address(settings.address))
    conv, own_bias = _create_activated(x.dtype, x.shape, kernel.shape, y.shape, values)
    source, target = (SOURCE, conv.images, x.address), (TARGET, conv.outputs, y.address)
    _execute(
        conv.primitive, source, _reordered(conv, kernel), (BIAS, own_bias, bias.address), target
    )


def _reordered(conv: _Convolution, kernel: Operand) -> _Value:
    """Copy a kernel to the layout that oneDNN chose; return it as an operand."""
    own = _allocate(conv.own_kernel)
    _execute(conv.reorder, (SOURCE, conv.kernel, kernel.address), (TARGET, conv.own_kernel, own))
    return WEIGHTS, conv.own_kernel, own


def _allocate(layout: c_void_p) -> np.ndarray:
    return np.empty(_loaded().dnnl_memory_desc_get_size(layout), np.uint8)


def _execute(primitive: c_void_p, *operands: _Value) -> None:
    """Run a primitive with operands at the given addresses, and wait until it is finished."""
    memories, stream = [], c_void_p()
    _check("stream_create", byref(stream), _engine(), DEFAULT_STREAM)
    try:
        for _, layout, place in operands:
            memories.append(c_void_p())
            address = c_void_p(place.ctypes.data if isinstance(place, np.ndarray) else place)
            _check("memory_create", byref(memories[-1]), layout, _engine(), address)
        pairs = zip(operands, memories, strict=True)
        arguments = [_Argument(number, memory) for (number, _, _), memory in pairs]
        _check(
            "primitive_execute",
            primitive,
            stream,
            len(operands),
            (_Argument * len(operands))(*arguments),
        )
        _check("stream_wait", stream)
    finally:
        for memory in memories:
            _check("memory_destroy", memory)
        _check("stream_destroy", stream)


@cache
def _create(kind: str, dtype: int, images: Shape, kernel: Shape, outputs: Shape) -> _Convolution:
    """Create the primitive `kind` for arrays of these shapes: NHWC, HWIO, NHWC."""
    padding = Sizes(*[(outputs[1] - images[1] + kernel[0] - 1) // 2] * 2)
    described = _layout(images, dtype, IMAGE_AXES), _layout(outputs, dtype, IMAGE_AXES)
    free = _free_layout([kernel[axis] for axis in KERNEL_AXES], dtype)
    # Stride 1 and no dilation; None is the bias.
    form = Sizes(1, 1), Sizes(0, 0), padding, padding
    forward, description = c_void_p(), c_void_p()
    layouts = [described[0], free, None, described[1]]
    create = "convolution_forward_primitive_desc_create"
    _check(create, byref(forward), _engine(), FORWARD_TRAINING, DIRECT, *layouts, *form, None)
    if kind == "forward":
        description = forward
    else:
        if kind == "backward_data":
            layouts.remove(None)
        create = f"convolution_{kind}_primitive_desc_create"
        _check(create, byref(description), _engine(), DIRECT, *layouts, *form, forward, None)
    query = QUERY_KERNEL_GRADIENT if kind == "backward_weights" else QUERY_KERNEL
    plain, own = _layout(kernel, dtype, KERNEL_AXES), _chosen_layout(description, query)
    reorder = _reorder(own, plain) if kind == "backward_weights" else _reorder(plain, own)
    return _Convolution(_primitive(description), *described, plain, own, reorder)


@cache
def _create_activated(
    dtype: int, images: Shape, kernel: Shape, outputs: Shape, settings: tuple[int, ...]
) -> tuple[_Convolution, c_void_p]:
    """Create the primitive of `convolve_and_activate`; return it with the layout of the bias."""
    stride, top, bottom, left, right, activation = settings
    described = _layout(images, dtype, IMAGE_AXES), _layout(outputs, dtype, IMAGE_AXES)
    bias = _layout(outputs[3:], dtype, (0,))
    axes: tuple[int, ...] = KERNEL_AXES
    if kernel[2] < images[3]:
        kernel, axes = (*kernel[:3], 1, kernel[3]), DEPTHWISE_AXES
    free = _free_layout([kernel[axis] for axis in axes], dtype)
    form = Sizes(stride, stride), Sizes(0, 0), Sizes(top, left), Sizes(bottom, right)
    description = c_void_p()
    _check(
        "convolution_forward_primitive_desc_create",
        *(byref(description), _engine(), FORWARD_INFERENCE, DIRECT),
        *(described[0], free, bias, described[1], *form, _attributes(activation)),
    )
    plain, own = _layout(kernel, dtype, axes), _chosen_layout(description, QUERY_KERNEL)
    primitive, reorder = _primitive(description), _reorder(plain, own)
    return _Convolution(primitive, *described, plain, own, reorder), bias


def _attributes(activation: int) -> c_void_p | None:
    """Describe the activation with this number in `ACTIVATIONS`."""
    if not activation:
        return None
    alpha, beta = PARAMETERS[activation]
    operations, attributes = c_void_p(), c_void_p()
    _check("post_ops_create", byref(operations))
    _check("post_ops_append_eltwise", operations, activation, c_float(alpha), c_float(beta))
    _check("primitive_attr_create", byref(attributes))
    _check("primitive_attr_set_post_ops", attributes, operations)
    return attributes


def _free_layout(sizes: Sequence[int], dtype: int) -> c_void_p:
    """Describe an array whose layout oneDNN chooses."""
    layout, tag = c_void_p(), ANY_LAYOUT
    create = "memory_desc_create_with_tag"
    _check(create, byref(layout), len(sizes), Sizes(*sizes), _number(dtype), tag)
    return layout


def _chosen_layout(description: c_void_p, query: int) -> c_void_p:
    return c_void_p(_loaded().dnnl_primitive_desc_query_md(description, query, 0))


def _reorder(source: c_void_p, target: c_void_p) -> c_void_p:
    """Create the primitive that copies an array from one layout to another."""
    description, ends = c_void_p(), (source, _engine(), target, _engine())
    _check("reorder_primitive_desc_create", byref(description), *ends, None)
    return _primitive(description)


def _layout(shape: Shape, dtype: int, axes: tuple[int, ...]) -> c_void_p:
    """Describe a contiguous array whose axes oneDNN expects in the order `axes`."""
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    sizes, steps = (Sizes(*(each[axis] for axis in axes)) for each in (shape, strides))
    layout = c_void_p()
    create = "memory_desc_create_with_strides"
    _check(create, byref(layout), len(shape), sizes, _number(dtype), steps)
    return layout


def _number(dtype: int) -> int:
    """Convert XLA's number of a dtype to oneDNN's."""
    return dict(DTYPES.values())[dtype]


def _primitive(description: c_void_p) -> c_void_p:
    primitive = c_void_p()
    _check("primitive_create", byref(primitive), description)
    return primitive


@cache
def _engine() -> c_void_p:
    engine = c_void_p()
    _check("engine_create", byref(engine), CPU, c_size_t(0))
    return engine


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "called by programs that were compiled with oneDNN only"
    return loaded


def _check(name: str, *arguments: object) -> None:
    status = getattr(_loaded(), f"dnnl_{name}")(*arguments)
    if status:
        raise RuntimeError(f"dnnl_{name} of oneDNN failed with status {status}")
