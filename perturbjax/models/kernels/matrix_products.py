"""Convolutions written as matrix products, for CPUs.

XLA's CPU runs a convolution at a half to a fifth of the speed of the matrix product that does the same work, and uses
the matrix units of recent processors (AMX) for products of bfloat16 with float32 sums alone.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import jax.numpy as jnp
from jaxtyping import Array, Float

#: Channels from which copying an image three times costs less than a 3×3 convolution in bfloat16 does.
WORTH_COPYING = 128


def pays(dtype: jnp.dtype, kernel_shape: tuple[int, ...]) -> bool:
    """Whether products are faster than XLA's convolution of this kernel (kh, kw, in, out) on a CPU."""
    high, wide, inputs, _ = kernel_shape
    if (high, wide) == (1, 1):
        return True
    return (high, wide) == (3, 3) and dtype == jnp.bfloat16 and inputs >= WORTH_COPYING


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], *, padding: int
) -> Float[Array, "b h2 w2 o"]:
    """Convolution of stride 1, symmetrically padded: one matrix product a row of the kernel, summed in float32."""
    high, wide, inputs, outputs = kernel.shape
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = x.shape[1] - high + 1, x.shape[2] - wide + 1
    # What a row of the kernel covers, side by side, for every row of the image and every column of the output.
    covered = (
        x
        if wide == 1
        else jnp.stack([x[:, :, column : column + columns] for column in range(wide)], axis=3)
    )
    total = reduce(
        add,
        (
            jnp.dot(
                covered[:, row : row + rows].reshape(-1, wide * inputs),
                kernel[row].reshape(wide * inputs, outputs),
                preferred_element_type=jnp.float32,
            )
            for row in range(high)
        ),
    )
    return total.reshape(x.shape[0], rows, columns, outputs).astype(x.dtype)
