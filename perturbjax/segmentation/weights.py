"""Read and write weights of segmentation networks, without torch and without executing code from
the file.

perturbjax writes safetensors files with Cellpose's tensor names and layouts. The metadata contain
the shape of the network and its diameters, so a file is everything that a mask depends on."""

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
from perturbjax.models.layers import ShapeRngs
from perturbjax.models.pytorch_files import read_tensors
from perturbjax.segmentation import sam
from perturbjax.segmentation.cpnet import CPnet, CPnetConfig
from perturbjax.segmentation.sam import CPSam, SamConfig

#: Key of the metadata in files of perturbjax, and version of the format.
METADATA = "perturbjax.segmentation"
FORMAT = 1
#: Maximum number of channels of a level and of levels, so that a file cannot request excessive
#: memory.
WIDEST, DEEPEST = 4096, 8

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_weights(path: Path | str) -> tuple[CPnetConfig | SamConfig, nnx.State]:
    """Read the shape of a network and its parameters, for `build`.

    Args:
        path: file of Cellpose 1 to 4 (a torch state dict), or of `save_weights`.

    Raises:
        InputError: the file is missing, damaged, of another network or version, or contains numbers
            that are not finite.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    config = (
        _sam_config(path, tensors) if sam.MARK in tensors else _config_of(path, tensors, metadata)
    )
    name_of = sam.tensor_name if isinstance(config, SamConfig) else tensor_name
    # Shapes only: no random parameters are computed.
    state = nnx.state(nnx.eval_shape(lambda: config.build(ShapeRngs())))
    flat = {}
    for key, variable in nnx.to_flat_state(state):
        name = name_of(key)
        if name not in tensors:
            raise InputError(
                f"{path}: tensor {name} is missing; it is not a complete cellpose weights file"
            )
        value = _transpose(np.asarray(tensors[name], np.float32), str(key[-1]))
        if value.shape != variable.shape:
            raise InputError(
                f"{path}: tensor {name} is {tensors[name].shape}, which does not fit {config}"
            )
        if not np.isfinite(value).all():
            raise InputError(
                f"{path}: tensor {name} contains numbers that are not finite. Train or download it "
                "again"
            )
        flat[key] = variable.replace(jnp.asarray(value))
    return config, nnx.from_flat_state(flat)


def save_weights(
    path: Path | str, model: CPnet, card: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Write a network as a safetensors file, atomically; the same network gives the same bytes.

    Args:
        path: file to write.
        model: network with parameters and statistics.
        card: model card as JSON values: data, settings, score.
        dtype: type of the stored numbers; they are read as float32.

    Raises:
        InputError: the suffix is not .safetensors, or the folder cannot be written.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name must end in .safetensors")
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(jax.device_get(variable[...]), dtype)
        tensors[tensor_name(key)] = np.ascontiguousarray(_transpose(value, str(key[-1]), back=True))
    # `normalize` states the percentiles of the intensity that become 0 and 1.
    metadata = {"format": FORMAT, "network": "cpnet", **asdict(model.config), "normalize": [1, 99]}
    if card:
        metadata["card"] = dict(card)
    with atomic(path) as temporary:
        save_file(tensors, temporary, {METADATA: json.dumps(metadata, sort_keys=True)})


def read_card(path: Path | str) -> dict[str, Any]:
    """Return the model card of a file of `save_weights`; empty for files of Cellpose."""
    return dict(_read(Path(path))[1].get("card", {}))


def build(config: CPnetConfig | SamConfig, params: nnx.State) -> CPnet | CPSam:
    """Return the network with these parameters."""
    # A network without values: `params` has all of them.
    model = nnx.eval_shape(lambda: config.build(ShapeRngs()))
    nnx.update(model, params)
    return model


def tensor_name(path: tuple[Any, ...]) -> str:
    """Return the name in Cellpose's files of the tensor at a path of `CPnet`."""
    *layer, leaf = path
    return f"{_layer_name(tuple(layer))}.{_LEAVES[leaf]}"


def _layer_name(layer: tuple[Any, ...]) -> str:
    match layer:
        # In Cellpose's sequences, 0 is BatchNorm, 1 is ReLU and 2 is the convolution. `proj` has no
        # ReLU.
        case ("output", part):
            return f"output.{0 if part == 'norm' else 2}"
        case (way, level, "proj", part):
            return f"{_block(way, level)}.proj.{0 if part == 'norm' else 1}"
        # With a style, sequence (`conv`) and style layer (`full`) are in one module.
        case ("up", level, "convs", number, part) if number > 0:
            return f"{_block('up', level)}.conv.conv_{number}.conv.{0 if part == 'norm' else 2}"
        case (way, level, "convs", number, part):
            return f"{_block(way, level)}.conv.conv_{number}.{0 if part == 'norm' else 2}"
        case ("up", level, "styles", number):
            return f"{_block('up', level)}.conv.conv_{number + 1}.full"
    raise ValueError(f"{layer}: not a layer of the network")


def _block(way: str, level: int) -> str:
    return f"{way}sample.{way}.res_{way}_{level}"


def _transpose(value: np.ndarray, leaf: str, back: bool = False) -> np.ndarray:
    """Transpose kernels from (out, in, height, width) to (height, width, in, out), or `back`; (out,
    in) to (in, out)."""
    if leaf != "kernel" or value.ndim not in (2, 4):
        return value
    if value.ndim == 2:
        return value.T
    return value.transpose((3, 2, 0, 1) if back else (2, 3, 1, 0))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors, and the metadata of a file of perturbjax (else empty)."""
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
            f"{path}: its metadata is not JSON ({error}). Train or download it again"
        ) from error
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: its metadata is not a JSON object. Train or download it again")
    if metadata.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path}: has format {metadata['format']}, but this version reads {FORMAT}. Update "
            "perturbjax"
        )
    return tensors, metadata


def _sam_config(path: Path, tensors: dict[str, np.ndarray]) -> SamConfig:
    try:
        return sam.config_of(tensors)
    except ValueError as error:
        raise InputError(
            f"{path}: {error}; it is not a complete cellpose 4 weights file"
        ) from error


def _config_of(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> CPnetConfig:
    """Return the shape of the network, derived from the tensors, and its diameters."""
    if "output.2.weight" not in tensors:
        raise InputError(
            f"{path}: contains no layer of Cellpose; it is not a cellpose weights file"
        )
    nbase, levels = [], 0
    while (kernel := tensors.get(f"downsample.down.res_down_{levels}.proj.1.weight")) is not None:
        if kernel.ndim != 4:
            raise InputError(
                f"{path}: is a 3D network or of an unknown kind; only 2D networks are supported"
            )
        # The kernel is (out, in, height, width); the first level also defines the input channels.
        nbase += [kernel.shape[1], kernel.shape[0]] if levels == 0 else [kernel.shape[0]]
        levels += 1
    outputs = tensors["output.2.weight"].shape[0]
    if not nbase or levels > DEEPEST or max(nbase) > WIDEST or min(nbase) < 1 or outputs < 3:
        raise InputError(
            f"{path}: channels {nbase} and {outputs} output maps are not those of a cellpose 3 "
            "network"
        )
    config = CPnetConfig(tuple(int(width) for width in nbase), int(outputs))
    diameters = {
        name: _read_diameter(path, name, tensors, metadata) for name in ("diam_mean", "diam_labels")
    }
    # Without `diam_labels`, objects are assumed to have the diameter `diam_mean`.
    if diameters["diam_mean"] is not None:
        mean = diameters["diam_mean"]
        config = replace(config, diam_mean=mean, diam_labels=mean)
    if diameters["diam_labels"] is not None:
        config = replace(config, diam_labels=diameters["diam_labels"])
    return config


def _read_diameter(
    path: Path, name: str, tensors: dict[str, np.ndarray], metadata: dict[str, Any]
) -> float | None:
    # Metadata of perturbjax take precedence over tensors of Cellpose's files.
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
            f"{path}: its {name} {value} is not a diameter in pixels. Train or download it again"
        )
    return number
