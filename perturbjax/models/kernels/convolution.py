"""Convolution with platform-specific forms for CPUs and NVIDIA GPUs.

Forward. A CPU computes 1×1 convolutions, and 3×3 ones in bfloat16, as matrix products where these
are faster (`matrix_products`, with the measured speeds). It also does so where the kernel is
larger than the image: XLA's CPU library refuses this case, and the fallback is 50 times slower
(ResNet-18 at 64×64 pixels takes a tenth of its former time, float32).

Gradient of the input. It is the convolution of the output's gradient with the kernel flipped in
height and width and with its channel axes swapped.

Gradient of the kernel. For kernel offset (i, j) it is a matrix product over all positions,

    dK[i, j] = Σ_bhw x[b, h + i, w + j, :]ᵀ dy[b, h, w, :]

XLA's CPU library is slow at this form of convolution. Here the views of `x` shifted along a row
are put side by side once, and those of other rows are slices of the same array: a 3×3 kernel
copies 3 views where im2col copies 9. Products of `PRODUCT_LENGTH` positions keep their operands
in cache. Speed compared with XLA's gradient (2-core Xeon with AMX, float32):

    32 to 64 channels, 64²          1.6 times
    64 to 128 channels, 32²         1.7 times
    1 to 32 channels, 128²          1.6 times (transposed input; bfloat16 1.4 times)
    16 to 16 channels, 128²         0.35 times, so XLA's gradient is used instead (`SLIM_CHANNELS`)

If oneDNN is installed, training uses its convolutions instead, forward and backward (`onednn`),
and segmentation networks use them for their narrow layers.

With the other kernels of this package a training step is 2 to 2.6 times as fast as with plain
JAX layers (docs/performance.md).

NVIDIA GPUs write the kernel's gradient in the memory layout of the parameters. Otherwise XLA
transposes parameter and optimizer moments instead, and back (15 copies per step). The gain of
this form alone has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from perturbjax.models.kernels import matrix_products, onednn

#: Input channels below which transposing the input costs less than transposing the gradient.
NARROW_CHANNELS = 16
#: Positions summed by one product: enough to amortize its start, few enough for the cache.
PRODUCT_LENGTH = 4096
#: Below this number of channels, on maps of more pixels, XLA's kernel gradient is faster than
#: products. This occurs in the upper levels of a small segmentation network.
SLIM_CHANNELS, LARGE_MAP = 32, 96**2


def conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i_per_group o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    use_onednn: bool = False,
) -> Float[Array, "b h2 w2 o"]:
    """Convolve (cross-correlate, as in PyTorch) in the dtype of `x`.

    Args:
        x: images.
        kernel: weights; cast to the dtype of `x`.
        stride: step in pixels.
        padding: zeros on each side, in pixels.
        groups: groups of channels that are convolved separately.
        use_onednn: use oneDNN, if it is installed, outside training too. Then results with and
            without it differ by rounding, and the program cannot be exported.
    """
    kernel = kernel.astype(x.dtype)
    high, wide = kernel.shape[:2]
    # `_dense` needs padding below the kernel size: its gradient pads by size - 1 - padding.
    if stride == groups == 1 and high == wide > padding and x.size:
        return _dense(x, kernel, padding, use_onednn)
    return _plain(x, kernel, padding, stride, groups)


def _plain(x: Array, kernel: Array, padding: int, stride: int = 1, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], padding: int, use_onednn: bool
) -> Float[Array, "b h2 w2 o"]:
    """Convolve at stride 1 without groups."""
    return _convolve(x, kernel, padding, use_onednn)


def _convolve(x: Array, kernel: Array, padding: int, use_onednn: bool) -> Array:
    plain = partial(_plain, padding=padding)
    if use_onednn and onednn.computes(x.dtype, kernel.shape):
        fast = partial(onednn.convolve, padding=padding)
        return jax.lax.platform_dependent(x, kernel, cpu=fast, default=plain)
    # XLA's convolution remains where products are slower and the kernel fits into the image.
    if not (matrix_products.is_faster(x.dtype, kernel.shape) or min(x.shape[1:3]) < len(kernel)):
        return plain(x, kernel)
    products = partial(matrix_products.convolve, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=products, default=plain)


def _dense_forward(
    x: Array, kernel: Array, padding: int, _: bool
) -> tuple[Array, tuple[Array, Array]]:
    """Convolve if a gradient follows: in training."""
    return _convolve(x, kernel, padding, use_onednn=True), (x, kernel)


def _dense_backward(
    padding: int, _: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    size = len(kernel)
    use_onednn = onednn.computes(x.dtype, kernel.shape)

    def convolved(gradient: Array, kernel: Array) -> Array:
        # With this padding dx has the height and width of `x`.
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return _convolve(gradient, flipped, size - 1 - padding, use_onednn=False)

    def by_convolution(x: Array, gradient: Array) -> Array:
        # The convolution is linear in the kernel, so the kernel's values do not affect this
        # gradient.
        return jax.vjp(lambda kernel: _plain(x, kernel, padding), kernel)[1](gradient)[0]

    def in_parameter_layout(x: Array, gradient: Array) -> Array:
        # A flat array has a single layout, so the barrier fixes the order of the values in memory.
        flat = jax.lax.optimization_barrier(by_convolution(x, gradient).reshape(-1))
        return flat.reshape(kernel.shape)

    slim = min(x.shape[-1], gradient.shape[-1]) < SLIM_CHANNELS
    on_cpu: Callable[..., Array]
    if use_onednn:
        on_cpu = partial(onednn.kernel_gradient, size=size)
    elif slim and x.shape[1] * x.shape[2] > LARGE_MAP:
        on_cpu = by_convolution
    else:
        form = _narrow_kernel_gradient if x.shape[-1] < NARROW_CHANNELS else _kernel_gradient
        on_cpu = partial(form, size=size, padding=padding)
    if use_onednn:
        fast = partial(onednn.input_gradient, padding=padding)
        dx = jax.lax.platform_dependent(gradient, kernel, cpu=fast, default=convolved)
    else:
        dx = convolved(gradient, kernel)
    return dx, jax.lax.platform_dependent(
        x, gradient, cpu=on_cpu, cuda=in_parameter_layout, default=by_convolution
    )


_dense.defvjp(_dense_forward, _dense_backward)


def _narrow_kernel_gradient(
    x: Float[Array, "b h w i"], gradient: Float[Array, "b h2 w2 o"], *, size: int, padding: int
) -> Float[Array, "k k i o"]:
    """Multiply all shifted views of a transposed input of few channels with the gradient."""
    b, h2, w2, o = gradient.shape
    groups = b // _images_per_product(b, h2 * w2)
    padded = _pad(_to_bits(x), padding, gradient)
    # (groups, i, images, height, width): the positions of an image are contiguous.
    transposed = jnp.moveaxis(padded.reshape(groups, -1, *padded.shape[1:]), -1, 1)
    views = [transposed[..., i : i + h2, j : j + w2] for i in range(size) for j in range(size)]
    # (groups, k k i, positions): one row per kernel offset and input channel.
    stacked = jnp.concatenate([view.reshape(groups, x.shape[-1], -1) for view in views], axis=1)
    product = _product(_from_bits(stacked, x), gradient.reshape(groups, -1, o))
    return product.reshape(size, size, -1, o).astype(x.dtype)


def _kernel_gradient(
    x: Float[Array, "b h w i"], gradient: Float[Array, "b h2 w2 o"], *, size: int, padding: int
) -> Float[Array, "k k i o"]:
    """Multiply the transposed gradient with shifted views of the input, per group of images."""
    b, h2, w2, o = gradient.shape
    groups = b // _images_per_product(b, h2 * w2)
    padded = _pad(_to_bits(x), padding, gradient)
    # (b, height, w2, k i): the k views shifted along a row, as adjacent channels.
    columns = jnp.concatenate([padded[:, :, j : j + w2] for j in range(size)], axis=-1)
    width = columns.shape[-1]
    # (groups, o, positions).
    transposed = jnp.swapaxes(_to_bits(gradient).reshape(groups, -1, o), 1, 2)
    if x.dtype == jnp.bfloat16:
        # bfloat16 products are so fast that one of three times the size is worth three copies
        # of the gradient.
        # The gradient is shifted down by each kernel row, and padded to the rows of `columns`. One
        # product then gives all kernel rows.
        images = transposed.reshape(groups, o, -1, h2, w2)
        shifts = [((0, 0), (0, 0), (0, 0), (i, size - 1 - i), (0, 0)) for i in range(size)]
        rows = [jnp.pad(images, shift).reshape(groups, o, -1) for shift in shifts]
        # The barrier keeps XLA from folding the transposition of a 1×1 kernel's operand into the
        # product, for which it has no bfloat16 form.
        stacked = jax.lax.optimization_barrier(jnp.concatenate(rows, axis=1))
        product = _product(
            _from_bits(stacked, x), _from_bits(columns, x).reshape(groups, -1, width)
        )
    else:
        # One product per kernel row, with the input rows that this kernel row covers.
        views = [columns[:, i : i + h2].reshape(groups, -1, width) for i in range(size)]
        left = _from_bits(transposed, x)
        product = jnp.stack([_product(left, _from_bits(view, x)) for view in views])
    # From (kernel row, o, kernel column, i) to (kernel row, kernel column, i, o).
    return product.reshape(size, o, size, -1).transpose(0, 2, 3, 1).astype(x.dtype)


def _pad(x: Shaped[Array, "b h w i"], padding: int, gradient: Array) -> Shaped[Array, "b h2 w2 i"]:
    """Pad `x` with zeros, but not before the gradient exists.

    XLA's CPU runs every operation as early as possible: it would build the shifted views of all
    layers in the forward pass and hold twice the memory. The zero is therefore computed from the
    gradient, in a way that XLA cannot simplify. This saves 33 to 46 % of the step's memory.
    """
    zero = _to_bits(jnp.minimum(jnp.abs(gradient[0, 0, 0, 0]), 0))
    frame = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
    return jax.lax.pad(x, zero, frame)


def _product(left: Float[Array, "g m k"], right: Float[Array, "g k n"]) -> Float[Array, "m n"]:
    """Sum matrix products over groups, in float32."""
    # Contract axis k (positions); axis g (groups) is the batch axis.
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32).sum(0)


def _images_per_product(batch: int, positions: int) -> int:
    """Choose the largest divisor of the batch with at most `PRODUCT_LENGTH` positions."""
    limit = max(PRODUCT_LENGTH // positions, 1)
    return max(n for n in range(1, min(limit, batch) + 1) if batch % n == 0)


def _to_bits(x: Float[Array, "*n"]) -> Shaped[Array, "*n"]:
    """Reinterpret floats as integers of the same size.

    XLA's CPU copies integers as they are, but bfloat16 by way of float32. It also cannot fold a
    transposition of integers into a product; its fast form needs operands in order.
    """
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Shaped[Array, "*n"], like: Array) -> Float[Array, "*n"]:
    return jax.lax.bitcast_convert_type(bits, like.dtype)
