"""Networks as functions from batches of images to features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.core.errors import InputError
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches import Decoder, Sites
from perturbjax.dataset import Dataset
from perturbjax.models import BACKBONES, Mode
from perturbjax.models.kernels import onednn
from perturbjax.models.pooling import pool_stages
from perturbjax.models.symmetries import dihedral
from perturbjax.profiles.feature_options import FeaturesConfig
from perturbjax.profiles.image_inputs import (
    INPUT_SCALINGS,
    adapt,
    channel_triples,
    intensity_range,
)
from perturbjax.training.devices import Placement
from perturbjax.training.run_directory import open_run


@dataclass(frozen=True)
class Extractor:
    """A network as a function from batches of images to features.

    Attributes:
        dataset: sites; they may differ in size if cells or tiles enter the network.
        sites: shift and scale of each site.
        input: mask encoding.
        step: batch on the device -> features (b, d).
        pixels: pixels of the network inputs of one site, cell or tile.
        groups: prefixes of the feature names; d is a multiple of their number.
        facts: everything that determines the values, for the provenance.
        augment: crops of the training of a run, which set the resolution of stored sites.
    """

    dataset: Dataset
    sites: Sites
    input: InputConfig
    step: Callable[[RawBatch], Float[Array, "b d"]]
    pixels: int
    groups: list[str]
    facts: dict[str, Any]
    augment: AugmentConfig | None = None

    @property
    def decoder(self) -> Decoder:
        """Reader of whole sites."""
        return Decoder(self.dataset, self.sites, self.input, self.augment)


def backbone_extractor(
    config: FeaturesConfig, dataset: Dataset, placement: Placement, size: int = 0
) -> Extractor:
    """Return an extractor of a network with published weights.

    Args:
        config: settings.
        dataset: data.
        placement: devices.
        size: height and width of tiles or cells in pixels, which are not resized by default; 0 for
            whole sites, which are.

    Raises:
        InputError: The weights do not fit the network or do not take RGB images, or a channel is
            not stored.
    """
    from perturbjax.models.weights import load_pretrained
    from perturbjax.training.step import DTYPES, split_model

    adaptation = config.adapt
    triples = channel_triples(adaptation.channels, dataset.channel_names, adaptation.channels_as)
    pretrained = load_pretrained(config.backbone, config.weights)
    record = BACKBONES[config.backbone]
    if adaptation.size is None:
        # Native resolution: the smallest size that the network divides into patches.
        native = -(-size // record.patch) * record.patch
        adaptation = dataclasses.replace(adaptation, size=native or record.input_size)
    if pretrained.provenance["inputs"] != 3:
        raise InputError(
            f"--weights {config.weights}: the network takes {pretrained.provenance['inputs']} "
            "channels, but RGB images have 3. Pass other weights."
        )
    scaling = INPUT_SCALINGS.get(
        adaptation.normalize, record.input_scaling
    )  # auto: that of the weights
    graphdef, *state = split_model(pretrained.model)
    # A list of arrays: JAX would visit the nested state in Python at every call.
    leaves, treedef = jax.tree.flatten(placement.replicate(state))
    # Stored channels of the k images of a site, (k, 3).
    positions = np.array(list(triples.values()))
    averaged = adaptation.channels_as == "mean"
    prepare = jax.jit(
        lambda batch: adapt(batch, adaptation, positions, scaling), out_shardings=placement.by_row
    )

    @jax.jit
    def forward(
        leaves: list[Array], x: Float[Array, "bk h w 3"], cells: Array
    ) -> Float[Array, "bk d"]:
        model = nnx.merge(graphdef, *jax.tree.unflatten(treedef, leaves), copy=True)
        mode = Mode(dtype=DTYPES[config.precision], use_onednn=True)
        if config.pool == "last":
            return model(x, mode).features
        # All images of a site use the mask of this site.
        return pool_stages(model.stage_maps(x, mode), jnp.repeat(cells, len(triples), axis=0))

    def step(batch: RawBatch) -> Float[Array, "b kd"]:
        x, cells = prepare(batch), batch.mask[..., None]
        views = range(config.augmentations)
        features_of_views = (
            forward(leaves, dihedral(x, view), dihedral(cells, view)[..., 0]) for view in views
        )
        features = sum(features_of_views) / len(views)
        # (b k, d) -> (b, k, d)
        features = features.reshape(-1, len(triples), features.shape[1])
        return features.mean(1) if averaged else features.reshape(len(features), -1)

    groups = [f"{config.backbone}_{name}" for name in triples]
    groups = [config.backbone] if averaged or len(triples) == 1 else groups
    # Shift and scale of each site and channel, which map intensities to [0, 1].
    shift, scale = intensity_range(dataset, adaptation.scale)
    labels, masks = np.zeros(len(dataset), np.int32), np.arange(len(dataset), dtype=np.int32)
    sites = Sites((), labels, shift, scale, masks)
    facts = {
        **pretrained.provenance,
        "input": {**vars(adaptation), **scaling._asdict()},
        "pool": config.pool,
        "augmentations": config.augmentations,
        "precision": config.precision,
        "onednn": onednn.is_usable(),
    }
    assert adaptation.size is not None
    pixels = len(triples) * adaptation.size**2
    encoding = InputConfig(mask_encoding="binary")
    return Extractor(dataset, sites, encoding, step, pixels, groups, facts)


def run_extractor(path: Path, dataset: Dataset, placement: Placement) -> Extractor:
    """Return an extractor of a trained run, with the same input as in `perturbjax evaluate`."""
    from perturbjax.inference import load_network

    run = open_run(path)
    network = load_network(run, placement=placement, dataset=dataset)
    model = run.recipe.model.model
    facts = {"run": str(run.path), "model": model, "epoch": network.facts["epoch"]}
    decoder = network.decoder(dataset)
    return Extractor(
        dataset,
        decoder.sites,
        decoder.input,
        lambda batch: network.step(batch)[1],
        run.recipe.augment.crop**2,
        [model],
        facts,
        run.recipe.augment,
    )
