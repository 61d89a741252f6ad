"""Convolution; on CPUs as matrix products where these are faster, above all in the gradient of the weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from perturbjax.models.kernels import matrix_products as products

#: Input channels below which turning the input costs less than turning the gradient.
PRODUCT_CHANNELS = 16
#: Positions a product sums over: long enough to pay for its start, short enough for its operands to stay in cache.
PRODUCT_LENGTH = 4096
#: Channels below which, on maps of more pixels than this, the convolution's own gradient is faster than any product
#: (as in the upper levels of a small segmenter).
SLIM, WIDE = 32, 96**2


def conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i_per_group o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolution (cross-correlation, as in torch), symmetrically padded by `padding` pixels, in the dtype of `x`."""
    kernel = kernel.astype(x.dtype)
    high, wide = kernel.shape[:2]
    if stride == groups == 1 and high == wide > padding and x.size:
        return _dense(x, kernel, padding)
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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], padding: int
) -> Float[Array, "b h2 w2 o"]:
    plain = partial(_plain, padding=padding)
    # XLA's library refuses a kernel larger than the image, and the loop that it falls back on is 50 times slower.
    if not (products.pays(x.dtype, kernel.shape) or min(x.shape[1:3]) < len(kernel)):
        return plain(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(products.convolve, padding=padding), default=plain
    )


def _dense_forward(x: Array, kernel: Array, padding: int) -> tuple[Array, tuple[Array, Array]]:
    return _dense(x, kernel, padding), (x, kernel)


def _dense_backward(
    padding: int, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    size = len(kernel)
    # The input's gradient is the convolution of the output's with the kernel turned about.
    dx = _dense(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), size - 1 - padding)

    def by_convolution(x: Array, gradient: Array) -> Array:
        return jax.vjp(lambda kernel: _plain(x, kernel, padding), kernel)[1](gradient)[0]

    def laid_out(x: Array, gradient: Array) -> Array:
        # As it lies in memory where the optimizer adds it: else a GPU turns parameter and moments instead, and back.
        flat = jax.lax.optimization_barrier(by_convolution(x, gradient).reshape(-1))
        return flat.reshape(kernel.shape)

    slim = min(x.shape[-1], gradient.shape[-1]) < SLIM and x.shape[1] * x.shape[2] > WIDE
    if slim:
        by_products = by_convolution
    else:
        narrow = x.shape[-1] < PRODUCT_CHANNELS
        by_products = partial(
            _narrow_kernel_gradient if narrow else _kernel_gradient, size=size, padding=padding
        )
    return dx, jax.lax.platform_dependent(
        x, gradient, cpu=by_products, cuda=laid_out, default=by_convolution
    )


_dense.defvjp(_dense_forward, _dense_backward)


def _narrow_kernel_gradient(
    x: Float[Array, "b h w i"], gradient: Float[Array, "b h2 w2 o"], *, size: int, padding: int
) -> Float[Array, "k k i o"]:
    """The product of all shifted views of an input of few channels, turned, with the gradient as it lies."""
    b, h2, w2, o = gradient.shape
    groups = b // _images_together(b, h2 * w2)
    padded = _padded(_bits(x), padding, gradient)
    turned = jnp.moveaxis(padded.reshape(groups, -1, *padded.shape[1:]), -1, 1)
    views = [turned[..., i : i + h2, j : j + w2] for i in range(size) for j in range(size)]
    beside = jnp.concatenate([view.reshape(groups, x.shape[-1], -1) for view in views], axis=1)
    product = _product(_values(beside, x), gradient.reshape(groups, -1, o))
    return product.reshape(size, size, -1, o).astype(x.dtype)


def _kernel_gradient(
    x: Float[Array, "b h w i"], gradient: Float[Array, "b h2 w2 o"], *, size: int, padding: int
) -> Float[Array, "k k i o"]:
    """Products of the gradient with the input's shifted views, summed over groups of images.

    The views shifted along a row are laid side by side; those of other rows are then slices of the same array, so
    that a 3×3 kernel copies 3 views where an im2col would copy 9.
    """
    b, h2, w2, o = gradient.shape
    groups = b // _images_together(b, h2 * w2)
    padded = _padded(_bits(x), padding, gradient)
    columns = jnp.concatenate([padded[:, :, j : j + w2] for j in range(size)], axis=-1)
    turned = jnp.swapaxes(_bits(gradient).reshape(groups, -1, o), 1, 2)
    if x.dtype == jnp.bfloat16:
        # So fast are bfloat16 products that one of three times the size pays for copying the gradient three times.
        turned = turned.reshape(groups, o, -1, h2, w2)
        rows = [
            jnp.pad(turned, ((0, 0), (0, 0), (0, 0), (i, size - 1 - i), (0, 0)))
            for i in range(size)
        ]
        # Behind a barrier: of a 1×1 kernel XLA would fold the turning into the product, which it then cannot compute.
        stacked = jax.lax.optimization_barrier(
            jnp.concatenate([row.reshape(groups, o, -1) for row in rows], axis=1)
        )
        product = _product(
            _values(stacked, x), _values(columns, x).reshape(groups, -1, columns.shape[-1])
        )
    else:
        views = [columns[:, i : i + h2].reshape(groups, -1, columns.shape[-1]) for i in range(size)]
        product = jnp.stack([_product(_values(turned, x), _values(view, x)) for view in views])
    return product.reshape(size, o, size, -1).transpose(0, 2, 3, 1).astype(x.dtype)


def _padded(
    x: Shaped[Array, "b h w i"], padding: int, gradient: Array
) -> Shaped[Array, "b h2 w2 i"]:
    """`x` within a frame of zeros, not before there is a gradient.

    XLA's CPU does what it can as early as it can: it would lay out the views of all layers in the forward pass, and
    hold twice the memory. So the zero is one of the gradient's, which XLA cannot tell.
    """
    zero = _bits(jnp.minimum(jnp.abs(gradient[0, 0, 0, 0]), 0))
    frame = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
    return jax.lax.pad(x, zero, frame)


def _product(left: Float[Array, "g m k"], right: Float[Array, "g k n"]) -> Float[Array, "m n"]:
    """Σ over groups of matrix products, in float32."""
    product = jax.lax.dot_general(
        left, right, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    return product.sum(0)


def _images_together(batch: int, positions: int) -> int:
    """How many images one product takes: a divisor of the batch that reaches `PRODUCT_LENGTH` positions, or nearly."""
    most = max(PRODUCT_LENGTH // positions, 1)
    return max(n for n in range(1, min(most, batch) + 1) if batch % n == 0)


def _bits(x: Float[Array, "*n"]) -> Shaped[Array, "*n"]:
    """The same bits as integers, which XLA's CPU moves as they are: it moves bfloat16 by way of float32.

    It also keeps a transposition from being folded into a product, whose fast form wants its operands straight.
    """
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _values(bits: Shaped[Array, "*n"], like: Array) -> Float[Array, "*n"]:
    return jax.lax.bitcast_convert_type(bits, like.dtype)
