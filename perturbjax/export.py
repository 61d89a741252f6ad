"""Export the network of a run as StableHLO: one file for any XLA runtime, without perturbjax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from perturbjax.core.choices import MASK_ENCODINGS, NORMALIZATIONS
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, file_digest, make_folder, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import require_output, require_sound
from perturbjax.data import mask_encodings as masks
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches.decoder import stored_halvings
from perturbjax.inference import Network, load_network
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.devices import choose_placement
from perturbjax.training.run_directory import Run, require_whole_sites

NETWORK, DESCRIPTION = "network.jax_export", "description.json"
PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("probabilities", "features")
#: Mask encodings of single pixels, which can be downsampled after the encoding.
_PIXELWISE = ("instance", "binary")


@dataclass(frozen=True)
class StableHLOConfig:
    """Write the network of a run as StableHLO, for runtimes without perturbjax."""

    chosen: CheckpointConfig
    out: Path
    """Folder to write: network.jax_export (for jax.export.deserialize) and description.json."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)


def export(options: StableHLOConfig) -> Path:
    """Write the prediction function of a run, including its parameters, for any number of images.

    The function is (image, mask) -> (probabilities, features). If the normalization depends on the
    images, it has the additional inputs shift and scale. `description.json` describes all inputs.
    Like the batch pipelines, the function first downsamples sites that are several times larger
    than `--crop`, with the same integer arithmetic. Its predictions therefore equal those of
    `perturbjax predict` up to float32 rounding (1e-5).

    Args:
        options: checkpoint of a run, and the folder to write.

    Returns:
        The folder.

    Raises:
        InputError: the run is not usable, its network gets cells, its image size is unknown, or
            `out` is not writable.
    """
    chosen = options.chosen
    # One device, because the exported program must not depend on a number of devices.
    network = load_network(
        chosen.folder, chosen.which, chosen.epoch, placement=choose_placement("1")
    )
    require_whole_sites(network.run.recipe, chosen.folder)
    if network.run.facts["image_size"] is None:
        raise InputError(
            f"{chosen.folder}: was imported without a dataset, so its image size is unknown. "
            "Import it with --data DIR."
        )
    inputs = _inputs(network)
    # The parameters are constants of the exported program. Lowering for a platform needs no such
    # device.
    exported = jax.export.export(jax.jit(_as_function(network)), platforms=PLATFORMS)(
        *inputs.values()
    )
    folder = make_folder(options.out)
    with atomic(folder / NETWORK) as temporary:
        temporary.write_bytes(exported.serialize())
    write_json(
        folder / DESCRIPTION, _describe(network, inputs, exported, file_digest(folder / NETWORK))
    )
    console.print(f"Written: {folder / NETWORK} and {folder / DESCRIPTION}")
    return folder


def _inputs(network: Network) -> dict[str, jax.ShapeDtypeStruct]:
    recipe, facts = network.run.recipe.input, network.run.facts
    # A symbolic batch size: the exported program accepts any number of images.
    (b,) = jax.export.symbolic_shape("b")
    site, channels = (b, *facts["image_size"]), len(facts["channels"])
    # Encodings that depend on neighboring pixels are computed after downsampling, by the caller.
    stored = site if recipe.mask_encoding in _PIXELWISE else (b, *_stored_size(network.run))
    inputs = {
        "image": jax.ShapeDtypeStruct((*site, channels), np.dtype(facts["image_dtype"])),
        "mask": jax.ShapeDtypeStruct(stored, masks.storage_dtype(recipe.mask_encoding)),
    }
    method = NORMALIZATIONS[recipe.normalize]
    # Statistics of the image or plate are not part of the network, so the caller supplies them.
    if method.depends_on != "run":
        per_channel = jax.ShapeDtypeStruct((b, channels * method.copies), np.float32)
        inputs |= {"shift": per_channel, "scale": per_channel}
    return inputs


def _as_function(network: Network) -> Callable[..., tuple[Array, Array]]:
    halvings = stored_halvings(network.run.facts["image_size"], network.run.recipe.augment)
    pixelwise = network.run.recipe.input.mask_encoding in _PIXELWISE

    def predict(image: Array, mask: Array, shift: Array | None = None, scale: Array | None = None):
        rows = image.shape[:1]
        for _ in range(halvings):
            image = halve_image(image)
            mask = halve_mask(mask) if pixelwise else mask
        if shift is None or scale is None:
            # The same for all images (`depends_on` is "run"), so those of a blank image serve.
            blank = np.zeros((1, *image.shape[1:]), image.dtype)
            shift, scale = (
                jnp.broadcast_to(row, (*rows, row.shape[1])) for row in network.intensities(blank)
            )
        # Placeholders: prediction does not read the class, and the record number only seeds random
        # numbers.
        record = jnp.zeros(rows, jnp.int32)
        return tuple(
            network.step(RawBatch(image, mask, record, record, jnp.ones(rows), shift, scale))
        )

    return predict


def halve_image(image: UInt[Array, "b h w c"]) -> UInt[Array, "b h2 w2 c"]:
    """Downsample by 2 as the batch pipelines do: mean of 2 × 2 pixels, rounded to an integer.

    An odd last row or column is repeated first.
    """
    pad = [(0, 0), (0, image.shape[1] % 2), (0, image.shape[2] % 2), (0, 0)]
    # The sum of four pixels of 16 bits needs 18 bits.
    wide = jnp.pad(image, pad, mode="edge").astype(jnp.uint32)
    rows = wide[:, 0::2] + wide[:, 1::2]
    return ((rows[:, :, 0::2] + rows[:, :, 1::2] + 2) >> 2).astype(image.dtype)


def halve_mask(mask: UInt[Array, "b h w"]) -> UInt[Array, "b h2 w2"]:
    """Downsample by 2 as the batch pipelines do: the lower right pixel of each block."""
    pad = [(0, 0), (0, mask.shape[1] % 2), (0, mask.shape[2] % 2)]
    return jnp.pad(mask, pad, mode="edge")[:, 1::2, 1::2]


def _stored_size(run: Run) -> tuple[int, int]:
    """Height and width of the sites after downsampling."""
    height, width = run.facts["image_size"]
    block = 2 ** stored_halvings((height, width), run.recipe.augment)
    return -(-height // block), -(-width // block)


def _describe(
    network: Network, inputs: dict[str, Any], exported: jax.export.Exported, digest: str
) -> dict[str, Any]:
    """Return the content of `description.json`."""
    run, facts = network.run, network.run.facts
    method = run.recipe.input.normalize
    return {
        "file": NETWORK,
        "sha256": digest,
        "made by": {name: version(name) for name in ("perturbjax", "jax")},
        "calling convention": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "inputs": [_array(name, inputs[name]) for name in inputs],
        "outputs": [_array(*output) for output in zip(OUTPUTS, exported.out_avals, strict=True)],
        "classes": run.class_names,
        "label column": run.label_column,
        "channels": facts["channels"],
        "mask": _describe_mask(run),
        "normalisation": {
            "method": method,
            "shift and scale": NORMALIZATIONS[method].inputs or "inside",
            **facts["normalization"],
        },
        "epoch": network.facts["epoch"],
    }


def _describe_mask(run: Run) -> str:
    encoding = run.recipe.input.mask_encoding
    stored = MASK_ENCODINGS[encoding].stored
    halvings = stored_halvings(run.facts["image_size"], run.recipe.augment)
    if encoding in _PIXELWISE or not halvings:
        return stored
    return (
        f"{stored}; computed from instance labels that were downsampled by 2 {halvings} times "
        "(labels[1::2, 1::2], after repeating an odd last row or column)"
    )


def _array(name: str, array: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {"name": name, "shape": shape, "dtype": str(array.dtype)}
