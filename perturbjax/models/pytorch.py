"""Parameters to and from PyTorch's names and layouts, for the networks the original had.

torch keeps convolution kernels as (out, in, height, width) and dense ones as (out, in); here they are
(height, width, in, out) and (in, out). Nothing else differs, so a round trip changes no bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from perturbjax import models
from perturbjax.core.errors import InputError
from perturbjax.models.layers import BatchNorm
from perturbjax.models.pytorch_files import read_tensors

#: How many batches BatchNorm has seen: torch stores it with each layer, and uses it for nothing at its momentum.
BATCHES = "num_batches_tracked"


class Imported(NamedTuple):
    """What a state dict holds.

    Attributes:
        params: nnx.Param state, float32.
        stats: nnx.BatchStat state, float32.
        classes: width of the logits.
        channels: channels of the image.
        image_size: side in pixels of the input, where the network is tied to one, else None.
        batches: batches that BatchNorm had seen, 0 where the file does not say.
    """

    params: Any
    stats: Any
    classes: int
    channels: int
    image_size: int | None
    batches: int


def import_state_dict(path: Path | str, model: str) -> Imported:
    """Read a PyTorch state dict (`.pth`, or `.safetensors`) of one of the original's networks.

    The classes, the image's channels and, where it matters, the input's side are read off the tensors' shapes.

    Raises:
        InputError: the file cannot be read, or a tensor is missing, extra, of another shape or not of floats; the
            message names it.
    """
    path, layers = Path(path), layers_of(model)
    tensors = read_tensors(path)
    counts = [tensors.pop(name) for name in list(tensors) if name.rpartition(".")[2] == BATCHES]
    _require_names(path, model, tensors)
    # What cannot be read off a tensor of an odd rank is taken as 1, so that the shapes' comparison names it.
    classes = tensors[f"{layers[-1][0]}.bias"].size
    first = tensors[f"{layers[0][0]}.weight"]
    channels = first.shape[1] if first.ndim == 4 else 1
    infer_image_size = models.BACKBONES[model].infer_image_size
    image_size = None if infer_image_size is None else infer_image_size(tensors)
    network = abstract(model, classes, channels, image_size)
    for prefix, module_path in layers:
        for suffix, variable in _variables(_module(network, module_path)).items():
            variable.set_value(_checked(path, f"{prefix}.{suffix}", tensors, variable.shape))
    params, stats = nnx.state(network, nnx.Param), nnx.state(network, nnx.BatchStat)
    batches = max((int(count) for count in counts if count.size == 1), default=0)
    return Imported(params, stats, classes, channels, image_size, batches)


def state_dict(model: str, network: nnx.Module, *, batches: int = 0) -> dict[str, np.ndarray]:
    """A network's parameters and statistics under torch's names and in torch's layouts and order."""
    tensors: dict[str, np.ndarray] = {}
    for prefix, module_path in layers_of(model):
        module = _module(network, module_path)
        for suffix, variable in _variables(module).items():
            tensors[f"{prefix}.{suffix}"] = _to_torch(np.asarray(variable[...]))
        if isinstance(module, BatchNorm):
            tensors[f"{prefix}.{BATCHES}"] = np.array(batches, np.int64)
    return tensors


def abstract(model: str, classes: int, channels: int, image_size: int | None) -> nnx.Module:
    """A network's structure and shapes, without values."""
    sized = {} if image_size is None else {"image_size": image_size}
    return nnx.eval_shape(
        lambda: models.create(
            model, classes=classes, channels=channels, dropout=0.0, seed=0, **sized
        )
    )


def layers_of(model: str) -> tuple[tuple[str, str], ...]:
    """The names of a model's layers in torch and here.

    Raises:
        InputError: it has none; the message lists those that have.
    """
    known = {
        name: backbone.original for name, backbone in models.BACKBONES.items() if backbone.original
    }
    if model not in known:
        raise InputError(
            f"--model {model}: has no PyTorch counterpart; choose one of {', '.join(known)}"
        )
    return known[model]


def _module(network: Any, path: str) -> nnx.Module:
    for part in path.split("."):
        network = network[int(part)] if part.isdigit() else getattr(network, part)
    return network


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """A layer's variables by torch's suffix, in torch's order."""
    if isinstance(module, BatchNorm):
        pairs = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    else:
        pairs = {"weight": "kernel", "bias": "bias"}
    return {suffix: getattr(module, name) for suffix, name in pairs.items()}


def _to_torch(array: np.ndarray) -> np.ndarray:
    return {4: lambda: array.transpose(3, 2, 0, 1), 2: lambda: array.T}.get(
        array.ndim, lambda: array
    )()


def _from_torch(array: np.ndarray) -> np.ndarray:
    return {4: lambda: array.transpose(2, 3, 1, 0), 2: lambda: array.T}.get(
        array.ndim, lambda: array
    )()


def _require_names(path: Path, model: str, tensors: dict[str, np.ndarray]) -> None:
    network = abstract(model, classes=1, channels=1, image_size=None)
    wanted = {
        f"{prefix}.{suffix}": None
        for prefix, module_path in layers_of(model)
        for suffix in _variables(_module(network, module_path))
    }
    if missing := [name for name in wanted if name not in tensors]:
        raise InputError(
            f"{path}: has no tensor {missing[0]} ({len(missing)} missing); is it a checkpoint of {model}?"
        )
    if extra := [name for name in tensors if name not in wanted]:
        raise InputError(
            f"{path}: {model} has no tensor {extra[0]} ({len(extra)} extra); is it another model's?"
        )


def _checked(
    path: Path, name: str, tensors: dict[str, np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """A tensor in our layout, float32."""
    tensor = tensors[name]
    ours = _from_torch(tensor)
    if ours.shape != tuple(shape):
        expected = _to_torch(np.empty(shape)).shape
        raise InputError(
            f"{path}: tensor {name} has shape {tensor.shape}, the model needs {expected}"
        )
    if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
        raise InputError(f"{path}: tensor {name} holds {tensor.dtype}, not floating-point numbers")
    return np.ascontiguousarray(ours, np.float32)
