"""Weights of segmentation networks: cellpose's own files and ours, read without torch and without running anything.

Our files are safetensors under cellpose's names and in its layouts, with what decides the network beside them as
metadata. Whoever has the file has everything that a mask depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.models.pytorch_files import read_tensors
from perturbjax.segmentation import sam
from perturbjax.segmentation.cpnet import CPnet, CPnetConfig
from perturbjax.segmentation.sam import CPSam, SamConfig

#: Key of the metadata in our files, and the format's number.
METADATA = "perturbjax.segmentation"
FORMAT = 1
#: The most values a level may have and levels a network: a file cannot ask for more memory than its size explains.
WIDEST, DEEPEST = 4096, 8

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_weights(path: Path | str) -> tuple[CPnetConfig | SamConfig, nnx.State]:
    """The network's shape and its parameters and statistics, for `build`.

    `path` is a file of cellpose 1 to 4 (a torch state dict), or one of `save_weights`.

    Raises:
        InputError: it is missing, damaged, of another network or version, or holds numbers that are not finite.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    config = (
        _sam_config(path, tensors) if sam.MARK in tensors else _config_of(path, tensors, metadata)
    )
    name_of = sam.tensor_name if isinstance(config, SamConfig) else tensor_name
    state = nnx.state(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))
    flat = {}
    for key, variable in nnx.to_flat_state(state):
        name = name_of(key)
        if name not in tensors:
            raise InputError(
                f"{path}: tensor {name} is missing; it is not a whole cellpose weights file"
            )
        value = _turned(np.asarray(tensors[name], np.float32), str(key[-1]))
        if value.shape != variable.shape:
            raise InputError(
                f"{path}: tensor {name} is {tensors[name].shape}, which does not fit {config}"
            )
        if not np.isfinite(value).all():
            raise InputError(
                f"{path}: tensor {name} holds numbers that are not finite; train or download it again"
            )
        flat[key] = variable.replace(jnp.asarray(value))
    return config, nnx.from_flat_state(flat)


def save_weights(
    path: Path | str, model: CPnet, card: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Write a network as safetensors, atomically; the same network gives the same bytes.

    Args:
        model: its configuration, parameters and statistics are written.
        card: what else is known of it, as JSON: data, command, score.
        dtype: what numbers are stored as; they are read back as float32.

    Raises:
        InputError: the suffix is not .safetensors, or the folder cannot be written to.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name must end in .safetensors")
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(jax.device_get(variable[...]), dtype)
        tensors[tensor_name(key)] = np.ascontiguousarray(_turned(value, str(key[-1]), back=True))
    metadata = {"format": FORMAT, "network": "cpnet", **asdict(model.config), "normalize": [1, 99]}
    if card:
        metadata["card"] = dict(card)
    with atomic(path) as temporary:
        save_file(tensors, temporary, {METADATA: json.dumps(metadata, sort_keys=True)})


def read_card(path: Path | str) -> dict[str, Any]:
    """What `save_weights` was told of a network; empty for cellpose's own files."""
    return dict(_read(Path(path))[1].get("card", {}))


def build(config: CPnetConfig | SamConfig, params: nnx.State) -> CPnet | CPSam:
    """The network of these parameters."""
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    nnx.update(model, params)
    return model


def tensor_name(path: tuple[Any, ...]) -> str:
    """What cellpose calls the tensor at a path of `CPnet`."""
    *layer, leaf = path
    return f"{_layer_name(tuple(layer))}.{_LEAVES[leaf]}"


def _layer_name(layer: tuple[Any, ...]) -> str:
    match layer:
        case ("output", part):
            return f"output.{0 if part == 'norm' else 2}"
        case (way, level, "proj", part):
            return f"{_block(way, level)}.proj.{0 if part == 'norm' else 1}"
        case ("up", level, "convs", number, part) if number > 0:
            return f"{_block('up', level)}.conv.conv_{number}.conv.{0 if part == 'norm' else 2}"
        case (way, level, "convs", number, part):
            return f"{_block(way, level)}.conv.conv_{number}.{0 if part == 'norm' else 2}"
        case ("up", level, "styles", number):
            return f"{_block('up', level)}.conv.conv_{number + 1}.full"
    raise ValueError(f"{layer}: no layer of the network")


def _block(way: str, level: int) -> str:
    return f"{way}sample.{way}.res_{way}_{level}"


def _turned(value: np.ndarray, leaf: str, back: bool = False) -> np.ndarray:
    """Kernels from (out, in, height, width) to (height, width, in, out), or `back`; (out, in) to (in, out)."""
    if leaf != "kernel" or value.ndim not in (2, 4):
        return value
    if value.ndim == 2:
        return value.T
    return value.transpose((3, 2, 0, 1) if back else (2, 3, 1, 0))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors, and the metadata of one of our own files or nothing."""
    tensors = read_tensors(path)
    if path.suffix != ".safetensors":
        return tensors, {}
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(METADATA, "{}")
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path}: its metadata is not JSON ({error}); train or download it again"
        ) from error
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: its metadata is no JSON object; train or download it again")
    if metadata.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path}: is of format {metadata['format']}, and this version reads {FORMAT}; update"
        )
    return tensors, metadata


def _sam_config(path: Path, tensors: dict[str, np.ndarray]) -> SamConfig:
    try:
        return sam.config_of(tensors)
    except ValueError as error:
        raise InputError(f"{path}: {error}; it is not a whole cellpose 4 weights file") from error


def _config_of(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> CPnetConfig:
    """The network's shape, from the tensors themselves, and the sizes they know."""
    if "output.2.weight" not in tensors:
        raise InputError(
            f"{path}: holds none of cellpose's layers; it is not a cellpose weights file"
        )
    nbase, levels = [], 0
    while (kernel := tensors.get(f"downsample.down.res_down_{levels}.proj.1.weight")) is not None:
        if kernel.ndim != 4:
            raise InputError(
                f"{path}: is a network of volumes or of an unknown kind; only 2D networks are known"
            )
        nbase += [kernel.shape[1], kernel.shape[0]] if levels == 0 else [kernel.shape[0]]
        levels += 1
    outputs = tensors["output.2.weight"].shape[0]
    if not nbase or levels > DEEPEST or max(nbase) > WIDEST or min(nbase) < 1 or outputs < 3:
        raise InputError(
            f"{path}: widths {nbase} and {outputs} maps out are not those of a cellpose 3 network"
        )
    config = CPnetConfig(tuple(int(width) for width in nbase), int(outputs))
    sizes = {
        name: _diameter(path, name, tensors, metadata) for name in ("diam_mean", "diam_labels")
    }
    if sizes["diam_mean"] is not None:
        config = replace(config, diam_mean=sizes["diam_mean"], diam_labels=sizes["diam_mean"])
    if sizes["diam_labels"] is not None:
        config = replace(config, diam_labels=sizes["diam_labels"])
    return config


def _diameter(
    path: Path, name: str, tensors: dict[str, np.ndarray], metadata: dict[str, Any]
) -> float | None:
    value = metadata[name] if name in metadata else tensors.get(name)
    if value is None:
        return None
    try:
        number = float(
            np.asarray(value, np.float64).reshape(()) if np.ndim(value) == 0 else np.ravel(value)[0]
        )
    except (TypeError, ValueError, IndexError):
        number = float("nan")
    if not 0 < number < 1e5:
        raise InputError(
            f"{path}: its {name} {value} is no diameter in pixels; train or download it again"
        )
    return number
