"""Pretrained weights for the backbones, under any of the names they are published with.

Three sources: a file (`.pth`, `.pt`, `.bin`, `.safetensors`), `hf:OWNER/REPOSITORY[@REVISION]` from the Hugging Face
hub's cache or network, and `package:NAME`, the file that an installed Python package carries. Whose
naming a file follows is read off its keys. Nothing is ever unpickled.
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

#: Files of a hub repository that hold weights, the safer first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
#: In place of a source: random values. A control, which says what the network's shape alone gives.
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Pretrained:
    """A backbone with its weights.

    Attributes:
        model: the network, taking as many channels as the weights do and giving as many logits (none without a head).
        provenance: source, file, revision, SHA-256, naming and dialect, as plain values for a record.
    """

    model: nnx.Module
    provenance: dict[str, Any]


def load_pretrained(backbone: str, source: str, **arguments: Any) -> Pretrained:
    """A backbone with published weights.

    Args:
        backbone: a name of `models.with_weights`.
        source: a file, `hf:OWNER/REPOSITORY[@REVISION]` or `package:NAME`; `untrained` for random values.
        arguments: the network's, where the weights do not tell them: EfficientNet's dialect (`padding`, `epsilon`).

    Raises:
        InputError: the source cannot be had or read, or is not this backbone's; the message names the tensor.
    """
    from perturbjax.models.pytorch_files import read_tensors

    if backbone not in with_weights():
        raise InputError(
            f"--backbone {backbone}: has no published weights; choose one of {', '.join(with_weights())}"
        )
    if source == UNTRAINED:
        facts = {"backbone": backbone, "inputs": 3, "classes": 0, **arguments}
        model = BACKBONES[backbone].network(**_arguments(facts), rngs=nnx.Rngs(0))
        return Pretrained(model, {**facts, "source": source})
    path, revision = resolve_source(source)
    model, facts = build_from_tensors(backbone, read_tensors(path), source, **arguments)
    digest = file_digest(path)
    where = {"source": source, "file": path.name, "revision": revision, "sha256": digest}
    return Pretrained(model, {**facts, **where})


def resolve_source(source: str) -> tuple[Path, str | None]:
    """The file that `source` means, and the hub's revision where it has one.

    Raises:
        InputError: there is no such file, package or repository; or it is not cached and the hub is out of reach.
    """
    kind, _, name = source.partition(":")
    if kind == "hf":
        return _from_hub(name)
    if kind == "package":
        return _from_package(name), None
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"--weights {source}: no such file (hf:OWNER/REPOSITORY and package:NAME are also known)"
        )
    return path, None


def _from_package(name: str) -> Path:
    packages = {
        name: backbone.package
        for name, backbone in BACKBONES.items()
        if backbone.package is not None
    }
    if name not in packages:
        raise InputError(
            f"--weights package:{name}: unknown; there is package:{', package:'.join(packages)}"
        )
    module, file, project = packages[name]
    spec = importlib.util.find_spec(module)
    path = (
        Path(spec.submodule_search_locations[0]) / file
        if spec and spec.submodule_search_locations
        else None
    )
    if path is None or not path.is_file():
        raise InputError(f"--weights package:{name}: not installed; run `pip install {project}`")
    return path


def _from_hub(name: str) -> tuple[Path, str]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise InputError(
            f"--weights hf:{name}: needs huggingface_hub; run `pip install 'perturbjax[hub]'`"
        ) from error

    repository, _, revision = name.partition("@")
    flag = f"--weights hf:{name}"
    for file in HUB_FILES:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision or None))
            return path, path.parent.name  # the hub's cache keeps a file under the commit it is of
        except LocalEntryNotFoundError as error:
            by_hand = f"{HUB_FILES[0]} of {repository}" + (
                f" at revision {revision}" if revision else ""
            )
            raise InputError(
                f"{flag}: not in the cache, and the hub is out of reach; download {by_hand} where there is a network "
                f"and give the file itself: --weights {HUB_FILES[0]}"
            ) from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{flag}: the hub has no repository {repository} (or it needs a login)"
            ) from error
        except RevisionNotFoundError as error:
            raise InputError(f"{flag}: {repository} has no revision {revision}") from error
        except EntryNotFoundError:
            continue
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise InputError(f"{flag}: {error}") from error
    raise InputError(f"{flag}: the repository holds neither {' nor '.join(HUB_FILES)}")


def build_from_tensors(
    backbone: str, tensors: Tensors, source: str, **arguments: Any
) -> tuple[nnx.Module, dict[str, Any]]:
    """A backbone filled with tensors under their published names; and which names and arguments those meant.

    Raises:
        InputError: the tensors are not this backbone's: the message names the first that is missing, too many, or of
            another shape.
    """
    record, names = BACKBONES[backbone], set(tensors)
    naming = identify_naming(names, record.namings)
    if naming is None:
        other = identify_naming(
            names, [naming for known in BACKBONES.values() for naming in known.namings]
        )
        first = f"tensors of no known naming (such as {next(iter(tensors), 'none')})"
        found = (
            first
            if other is None
            else f"weights of the {other.family} family ({other.library} names)"
        )
        raise InputError(
            f"{source}: holds {found}, not {backbone}; choose another --weights or --backbone"
        )
    if odd := sorted(set(arguments) - set(record.argument_names)):
        raise InputError(f"--backbone {backbone}: {odd[0]} is not its to choose")

    tensors = {name.removeprefix(naming.prefix): value for name, value in tensors.items()}
    facts = {
        "backbone": backbone,
        "naming": naming.library,
        **record.arguments(naming, tensors, source),
        **arguments,
    }
    model = empty_backbone(facts)
    fill(model, tensors, naming, f"{source}: not {backbone}:")
    return model, facts


def identify_naming(names: set[str], namings: Iterable[Naming]) -> Naming | None:
    """Whose names these are, told by what the first convolution is called; None if nobody's."""
    for naming in namings:
        first = naming.tensor(naming.stem)
        if first in names or naming.prefix + first in names:
            return naming
    return None


def empty_backbone(facts: dict[str, Any]) -> nnx.Module:
    """A backbone without values, as the facts of a `Pretrained` describe it."""
    network, arguments = BACKBONES[facts["backbone"]].network, _arguments(facts)
    return nnx.eval_shape(lambda: network(**arguments, rngs=nnx.Rngs(0)))


def _arguments(facts: dict[str, Any]) -> dict[str, Any]:
    """Of the facts those that the constructor takes."""
    return {
        name: facts[name] for name in BACKBONES[facts["backbone"]].argument_names if name in facts
    }


def fill(model: nnx.Module, tensors: Tensors, naming: Naming, what: str) -> None:
    """Give `model`, whose values may be abstract, the published tensors; `what` begins the message of an error.

    Raises:
        InputError: a tensor is missing, too many, or of another shape. The model is unchanged then.
    """
    leaves = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    names = {path: naming.tensor(path) for path, leaf in leaves.items() if leaf.size}
    if missing := [name for name in names.values() if name not in tensors]:
        raise InputError(
            f"{what} {missing[0]} is missing ({len(missing)} of {len(names)} tensors are)"
        )
    unused = {name for name in tensors if name.endswith("num_batches_tracked")} | set(naming.unused)
    if extra := sorted(set(tensors) - set(names.values()) - unused):
        raise InputError(
            f"{what} there is no place for {extra[0]} ({len(extra)} of {len(tensors)} tensors have none)"
        )

    filled = {
        path: leaf.replace(jnp.zeros(leaf.shape)) for path, leaf in leaves.items() if not leaf.size
    }
    for path, name in names.items():
        value = to_jax_layout(np.asarray(tensors[name], np.float32), len(leaves[path].shape))
        if value.shape != leaves[path].shape:
            wanted, got = _published_layout(leaves[path].shape), tuple(tensors[name].shape)
            raise InputError(f"{what} {name} has shape {got} where {wanted} is needed")
        filled[path] = leaves[path].replace(jnp.asarray(value))
    nnx.update(model, nnx.from_flat_state(filled.items()))


def _published_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    return {4: (*shape[:1:-1], *shape[:2]), 2: shape[::-1]}.get(len(shape), shape)


def to_jax_layout(value: np.ndarray, dimensions: int) -> np.ndarray:
    """A published tensor with its axes in our order.

    Convolution kernels (out, in, h, w) become (h, w, in, out), dense ones (out, in) become (in, out); 1×1 convolutions
    that are dense layers here (`dimensions` 2) lose their sides.
    """
    if value.ndim == 4 and dimensions == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
    return value if axes is None else value.transpose(axes)
