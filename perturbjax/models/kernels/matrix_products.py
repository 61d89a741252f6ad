"""Convolutions as matrix products, for CPUs.

For each row of the kernel, the image's values under that row are put side by side and multiplied
by the row's weights; the products of all rows are added in float32. XLA's CPU library computes
bfloat16 convolutions in float32, but uses the matrix units of recent processors (AMX) for
bfloat16 products.

Speed compared with XLA's convolution (2-core Xeon with AMX, batches of 16 to 32):

    1×1, float32                    1.1 to 1.5 times
    1×1, bfloat16                   1.4 to 4.4 times
    3×3, bfloat16, 256 channels     1.8 times; 128 channels 1.03; 64 channels 0.8 (not used)
"""

from __future__ import annotations

from functools import reduce
from operator import add

import jax.numpy as jnp
from jaxtyping import Array, Float

#: Input channels from which a 3×3 bfloat16 convolution is computed by products. Below, copying
#: the image three times costs more than the convolution.
MIN_CHANNELS_3X3 = 128


def is_faster(dtype: jnp.dtype, kernel_shape: tuple[int, ...]) -> bool:
    """Whether products are faster than XLA's convolution with a (kh, kw, in, out) kernel."""
    size, inputs = kernel_shape[:2], kernel_shape[2]
    three = size == (3, 3) and dtype == jnp.bfloat16 and inputs >= MIN_CHANNELS_3X3
    return size == (1, 1) or three


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], *, padding: int
) -> Float[Array, "b h2 w2 o"]:
    """Convolve at stride 1 with symmetric padding, in the dtype of `x`, summed in float32."""
    high, wide, inputs, outputs = kernel.shape
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    # Height and width of the output.
    rows, columns = x.shape[1] - high + 1, x.shape[2] - wide + 1
    # For every image row and output column, the values under one row of the kernel.
    views = [x[:, :, column : column + columns] for column in range(wide)]
    covered = jnp.stack(views, axis=3) if wide > 1 else x
    products = (
        jnp.dot(
            covered[:, row : row + rows].reshape(-1, wide * inputs),
            kernel[row].reshape(wide * inputs, outputs),
            preferred_element_type=jnp.float32,
        )
        for row in range(high)
    )
    return reduce(add, products).reshape(x.shape[0], rows, columns, outputs).astype(x.dtype)
