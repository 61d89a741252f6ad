"""Arrays of a checkpoint: conversion from and to the state of a training, and their checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from perturbjax.core.errors import InputError

#: Names such as `params/head/kernel/value` -> arrays.
Tree = dict[str, Shaped[np.ndarray, "..."]]


def arrays_checksum(tree: Tree) -> str:
    """Compute the SHA-256 checksum (hexadecimal) of names, dtypes, shapes and values of arrays."""
    checksum = hashlib.sha256()
    # Sorted, so that the checksum does not depend on the order of the mapping.
    for name in sorted(tree):
        array = np.ascontiguousarray(tree[name])
        # Different arrays can have equal bytes, for example with swapped axes or another dtype.
        checksum.update(f"{name} {array.dtype} {array.shape}\n".encode())
        checksum.update(array.reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()


def state_to_tree(state: Any) -> Tree:
    """Convert a pytree to a flat mapping from paths to arrays on the host."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def tree_to_state(tree: Tree, template: Any, source: Path | str) -> Any:
    """Convert a flat mapping from paths to arrays to a pytree with the structure of `template`.

    Args:
        tree: mapping from `state_to_tree`.
        template: pytree with the expected paths and shapes.
        source: origin of the arrays, for messages.

    Raises:
        InputError: an array is missing, unknown, or of another shape.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    expected = {_name(path): leaf for path, leaf in paths}
    # Names that only one of the two mappings contains.
    if different := sorted(set(expected) ^ set(tree)):
        problem = "has no array" if different[0] in expected else "has an unknown array"
        raise InputError(f"{source}: {problem} {different[0]}; it belongs to another model")
    for name, leaf in expected.items():
        if np.shape(leaf) != tree[name].shape:
            raise InputError(
                f"{source}: {name} has shape {tree[name].shape}, the model requires "
                f"{np.shape(leaf)}"
            )
    # `expected` has the leaf order of the template.
    return jax.tree_util.tree_unflatten(treedef, [tree[name] for name in expected])


def select_network_arrays(tree: Tree) -> Tree:
    """Return the parameters and statistics of a checkpoint, without the optimizer state."""
    return {name: value for name, value in tree.items() if name.startswith(("params/", "stats/"))}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
