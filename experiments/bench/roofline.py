"""Lower bound of the time of a training step from its arithmetic and memory traffic."""

from __future__ import annotations

from experiments.bench.sizes import Size

#: Part of the GPU name -> (peak TFLOP/s in bf16, in TF32, memory TB/s). The first match counts.
PEAKS = {
    "H200": (989.0, 495.0, 4.8),
    "H100 NVL": (835.0, 418.0, 3.9),
    "H100 PCIe": (756.0, 378.0, 2.0),
    "H100": (989.0, 495.0, 3.35),
    "A100": (312.0, 156.0, 2.04),
}
#: Number of times that values are read or written in a step.
#: output of a convolution: written; read for statistics and maxima; read for its gradient, which is
#:   written and read for the gradient of the kernel.
#: input_gradient: output gradient read for the gradient of the input (not in the first layers).
#: pooled output (a quarter): written and read for normalization; in the backward pass read with its
#:   gradient for the sums of BatchNorm; the gradient of the activation is written and read.
#: input: read in the forward pass and for the gradient of the kernel; its gradient is written.
VALUES_MOVED = {"output": 5, "input_gradient": 1, "pooled": 6, "input": 3}


def convolutions(size: Size) -> list[tuple[int, int, int]]:
    """List (height, inputs, outputs) of every 3 x 3 convolution of `attention` with one channel.

    Two branches have three convolutions, each followed by pooling; the attention layer has one.
    """
    branch = [(size.crop, 1, 32), (size.crop // 2, 32, 64), (size.crop // 4, 64, 128)]
    return [*branch, *branch, (size.crop // 8, 128, 128)]


def flops_per_image(size: Size) -> float:
    """Count multiplications and additions of a training step."""
    return sum(
        2 * 9 * inputs * outputs * side**2 * (2 if side == size.crop else 3)
        for side, inputs, outputs in convolutions(size)
    )


def bytes_per_image(size: Size, precision: str) -> float:
    """Count bytes moved in a training step, see `VALUES_MOVED`."""
    times, values = VALUES_MOVED, 0.0
    for side, inputs, outputs in convolutions(size):
        first = side == size.crop
        values += (
            side**2
            * outputs
            * (times["output"] + times["pooled"] / 4 + times["input_gradient"] * (not first))
        )
        values += side**2 * inputs * (times["input"] - first)
    return (2 if precision == "bf16" else 4) * values


def roofline_seconds(gpu: str, precision: str, flops: float, moved: float) -> float | None:
    """Compute the minimum time of a step; `None` for a GPU that is not in `PEAKS`."""
    peaks = next((peaks for part, peaks in PEAKS.items() if part in gpu), None)
    if peaks is None:
        return None
    bf16, tf32, bandwidth = peaks
    return max(flops / (1e12 * (bf16 if precision == "bf16" else tf32)), moved / (1e12 * bandwidth))
