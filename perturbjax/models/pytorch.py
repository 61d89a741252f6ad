"""Exchange of parameters with PyTorch state dicts of the original program's networks.

PyTorch stores convolution kernels as (out, in, height, width) and dense ones as (out, in); here
they are (height, width, in, out) and (in, out). Nothing else differs, so that import and export
are exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from perturbjax import models
from perturbjax.core.errors import InputError
from perturbjax.models.backbone import TORCH_LEAVES
from perturbjax.models.backbone import Path as TensorPath
from perturbjax.models.pytorch_files import read_tensors
from perturbjax.models.weights import assign_tensors, require_names, to_torch_layout

#: BatchNorm's number of processed batches. PyTorch stores it, but does not use it at its default
#: momentum.
BATCHES = "num_batches_tracked"


class Imported(NamedTuple):
    """Content of a state dict.

    Attributes:
        params: nnx.Param state, float32.
        stats: nnx.BatchStat state, float32.
        classes: width of the logits.
        channels: image channels.
        image_size: height and width of the input in pixels for networks of fixed input size,
            else None.
        batches: number of batches that BatchNorm processed; 0 if the file does not store it.
    """

    params: Any
    stats: Any
    classes: int
    channels: int
    image_size: int | None
    batches: int


def import_state_dict(path: Path | str, model: str) -> Imported:
    """Read a PyTorch state dict (`.pth` or `.safetensors`) of one of the original's networks.

    Classes, image channels and input size are inferred from the shapes of the tensors.

    Raises:
        InputError: the file cannot be read, or a tensor is missing, unexpected, of another shape
            or not of floats. The message names the tensor.
    """
    layers, tensors = layers_of(model), read_tensors(path)
    # Counters are no variables of the network; only their maximum is returned.
    counts = [tensors.pop(name) for name in list(tensors) if name.rpartition(".")[2] == BATCHES]
    source = f"{path}: is not a checkpoint of {model}"
    # Names do not depend on the numbers of classes and channels, so 1 serves for both.
    require_names(tensors, _tensor_names(model, abstract_network(model, 1, 1, None)), source)
    # A tensor of unexpected rank counts as 1 channel; its shape is checked below.
    first = tensors[f"{layers[0][0]}.weight"]
    channels = first.shape[1] if first.ndim == 4 else 1
    classes = tensors[f"{layers[-1][0]}.bias"].size
    infer_image_size = models.BACKBONES[model].infer_image_size
    image_size = None if infer_image_size is None else infer_image_size(tensors)
    network = abstract_network(model, classes, channels, image_size)
    assign_tensors(network, tensors, _tensor_names(model, network), source)
    params, stats = nnx.state(network, nnx.Param), nnx.state(network, nnx.BatchStat)
    batches = max((int(count) for count in counts if count.size == 1), default=0)
    return Imported(params, stats, classes, channels, image_size, batches)


def state_dict(model: str, network: nnx.Module, *, batches: int = 0) -> dict[str, np.ndarray]:
    """Return parameters and statistics under PyTorch's names, in its layouts and order.

    Args:
        model: name of the network.
        network: the network.
        batches: number of batches that BatchNorm processed.
    """
    leaves, tensors = _leaves(network), {}
    for path, name in _tensor_names(model, network).items():
        tensors[name] = to_torch_layout(np.asarray(leaves[path][...]))
        # The counter follows the variance in PyTorch's order.
        if path[-1] == "var":
            tensors[f"{name.rpartition('.')[0]}.{BATCHES}"] = np.array(batches, np.int64)
    return tensors


def abstract_network(model: str, classes: int, channels: int, image_size: int | None) -> nnx.Module:
    """Build a network without values."""
    sized = {} if image_size is None else {"image_size": image_size}
    return nnx.eval_shape(
        lambda: models.create(model, classes=classes, channels=channels, dropout=0.0, **sized)
    )


def layers_of(model: str) -> tuple[tuple[str, str], ...]:
    """Return (PyTorch prefix, module path here) of a network's layers.

    Raises:
        InputError: the network is not one of the original's; the message lists these.
    """
    layers = {name: record.original for name, record in models.BACKBONES.items() if record.original}
    if model not in layers:
        raise InputError(
            f"--model {model}: has no PyTorch counterpart. Choose one of {', '.join(layers)}."
        )
    return layers[model]


def _leaves(network: nnx.Module) -> dict[TensorPath, Any]:
    return dict(nnx.to_flat_state(nnx.state(network, (nnx.Param, nnx.BatchStat))))


def _tensor_names(model: str, network: nnx.Module) -> dict[TensorPath, str]:
    """Map paths of variables to PyTorch's names, in PyTorch's order."""
    leaves = _leaves(network)
    names = {}
    for prefix, module in layers_of(model):
        # Digits are positions in a list of layers.
        path = tuple(int(part) if part.isdigit() else part for part in module.split("."))
        for leaf, suffix in TORCH_LEAVES.items():
            if (*path, leaf) in leaves:
                names[(*path, leaf)] = f"{prefix}.{suffix}"
    return names
