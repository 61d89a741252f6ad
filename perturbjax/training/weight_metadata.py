"""What a weight file of ours says of itself beside its tensors: the recipe, the labels, the data it was fed.

Without it a network's answers cannot be repeated: `crop` alone decides what evaluation sees. A `.safetensors` carries
it in its own metadata, a `.pth` has `NAME.pth.json` beside it. Either holds a digest of itself and of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perturbjax.core.config import Recipe, recipe_from_dict, recipe_to_dict
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json, write_json
from perturbjax.models.pytorch_files import read_metadata, read_tensors, write_tensors
from perturbjax.training.checkpoint import arrays_checksum

#: The one key of ours in a safetensors file's metadata.
KEY = "perturbjax"
DIGEST = "sha256"


@dataclass(frozen=True)
class Description:
    """All that a network's answers depend on beside its tensors.

    Attributes:
        recipe: what it was trained by.
        class_names: in the order of the logits.
        facts: what a dataset must share with it (channels, pixel type …), as in a run.
    """

    recipe: Recipe
    class_names: list[str]
    facts: dict[str, Any]


def write_weights(path: Path, tensors: dict[str, np.ndarray], description: Description) -> None:
    """Write tensors (`.pth` or `.safetensors`) with their description.

    Raises:
        InputError: the suffix is neither, or the folder cannot be written to.
    """
    values = {
        "recipe": recipe_to_dict(description.recipe),
        "labels": description.class_names,
        "facts": description.facts,
    }
    values = {DIGEST: _digest(values, tensors), **values}
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, {KEY: json.dumps(values)})
        return
    write_tensors(path, tensors)
    write_json(beside(path), values)


def read_description(path: Path) -> Description | None:
    """The description of a weight file; None where it has none.

    Raises:
        InputError: the description or a tensor is damaged, or they belong to different files.
    """
    source = path if path.suffix == ".safetensors" else beside(path)
    if path.suffix == ".safetensors":
        text = read_metadata(path).get(KEY)
        if text is None:
            return None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: its description is damaged ({error}); export it again"
            ) from error
    elif source.is_file():
        values = read_json(source)
    else:
        return None
    try:
        if values.pop(DIGEST) != _digest(values, read_tensors(path)):
            raise InputError(
                f"{source}: describes other tensors than {path.name} holds, or was changed; export the run again"
            )
        names = values["labels"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{source}: its labels are no list of class names; export it again")
        return Description(recipe_from_dict(values["recipe"]), names, dict(values["facts"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source}: is not a description that export-torch wrote ({error!r})"
        ) from error


def _digest(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over a description and the tensors it is of."""
    text = json.dumps(values, sort_keys=True) + arrays_checksum(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def beside(path: Path) -> Path:
    """Where the description of a `.pth` lies."""
    return path.with_name(f"{path.name}.json")
