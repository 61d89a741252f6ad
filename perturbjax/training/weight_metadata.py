"""Description of an exported weight file: recipe, class names and facts about the network input.

Predictions depend on the recipe as much as on the tensors; `crop`, for example, sets the size that
sites are resized to. A `.safetensors` file stores the description in its metadata, a `.pth` file
has `NAME.pth.json` next to it. The description contains a checksum of itself and of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json, write_json
from perturbjax.core.recipe_files import recipe_from_dict, recipe_to_dict
from perturbjax.models.pytorch_files import read_metadata, read_tensors, write_tensors
from perturbjax.training.checkpoint_arrays import arrays_checksum
from perturbjax.training.run_directory import is_list_of_text

#: Key of the description in the metadata of a safetensors file.
KEY = "perturbjax"
CHECKSUM = "sha256"


@dataclass(frozen=True)
class Description:
    """Everything besides the tensors that the predictions of a network depend on.

    Attributes:
        recipe: settings of the training.
        class_names: names of the classes, in the order of the logits.
        facts: properties that a dataset must share with the network (channels, pixel type, ...), as
            in a run.
    """

    recipe: Recipe
    class_names: list[str]
    facts: dict[str, Any]


def write_weights(path: Path, tensors: dict[str, np.ndarray], description: Description) -> None:
    """Write tensors to a `.pth` or `.safetensors` file, with their description.

    Raises:
        InputError: the suffix is unknown, or the folder is not writable.
    """
    values = {
        "recipe": recipe_to_dict(description.recipe),
        "labels": description.class_names,
        "facts": description.facts,
    }
    values = {CHECKSUM: _checksum(values, tensors), **values}
    # The metadata of a safetensors file are text; a .pth file has no place for them.
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, {KEY: json.dumps(values)})
    else:
        write_tensors(path, tensors)
        write_json(description_file(path), values)


def read_description(path: Path) -> Description | None:
    """Read the description of a weight file; None if it has none.

    Raises:
        InputError: the description or a tensor is damaged, or they belong to different files.
    """
    source = path if path.suffix == ".safetensors" else description_file(path)
    if path.suffix == ".safetensors":
        text = read_metadata(path).get(KEY)
        if text is None:
            return None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: description is damaged ({error}); export again") from error
    elif source.is_file():
        values = read_json(source)
    else:
        return None
    try:
        # The checksum covers all other entries, so it is removed from them first.
        if values.pop(CHECKSUM) != _checksum(values, read_tensors(path)):
            raise InputError(
                f"{source}: does not match the tensors in {path.name} (checksum differs). Export "
                "the run again."
            )
        names = values["labels"]
        if not is_list_of_text(names):
            raise InputError(f"{source}: labels are not a list of class names; export again")
        return Description(recipe_from_dict(values["recipe"]), names, dict(values["facts"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: is not a description of export-torch ({error!r})") from error


def _checksum(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    # Sorted keys: the order of entries in the file has no effect.
    text = json.dumps(values, sort_keys=True) + arrays_checksum(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def description_file(path: Path) -> Path:
    """Return the path of the description of a `.pth` file."""
    return path.with_name(f"{path.name}.json")
