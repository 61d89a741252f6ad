"""Apply the network of a run to a dataset or to arrays.

Both use one compiled step with batches of one size. The prediction for a site is therefore
bit-identical, whether it is predicted alone or with a thousand others, from an array or with
`perturbjax predict`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import InputConfig
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches import Decoder, PipelineChoice, describe_sites, open_batches
from perturbjax.data.batches.decoder import MaskChange, MaskTransform, merge_batches
from perturbjax.data.normalization import Intensities, Statistics, site_intensities
from perturbjax.dataset import Dataset, SiteSource
from perturbjax.models.user_networks import warn_about_changed_code
from perturbjax.training.apply_network import Predictions, apply_to_sites
from perturbjax.training.array_source import ArraySource, require_fitting
from perturbjax.training.checkpoint import Checkpoints, Which
from perturbjax.training.checkpoint_arrays import Tree, select_network_arrays, tree_to_state
from perturbjax.training.devices import Placement, choose_placement
from perturbjax.training.phases import create_network
from perturbjax.training.pytorch_exchange import WEIGHTS, open_weight_file
from perturbjax.training.run_directory import Run, open_run
from perturbjax.training.site_features import (
    Batches,
    SiteFeatures,
    SiteFeatureStore,
    add_features,
    open_store,
)
from perturbjax.training.step import (
    make_attention_step,
    make_head_step,
    make_predict_step,
    split_model,
)

#: Default number of sites in a step, also of `perturbjax predict`. Predictions depend on it in the
#: last bit.
BATCH_SIZE = 128


@dataclass(frozen=True)
class Network:
    """Network of a run on its devices, from `load_network`.

    Attributes:
        run: run of the network.
        facts: facts of the checkpoint, for example `epoch`.
        placement: devices.
        batch_size: number of sites in a step; smaller batches are padded.
        graphdef: graph definition of the network.
        state: `params` and `stats`, on the devices.
    """

    run: Run
    facts: dict[str, Any]
    placement: Placement
    batch_size: int
    graphdef: nnx.GraphDef
    state: dict[str, Any]

    @property
    def _state(self) -> tuple[Any, Any]:
        return self.state["params"], self.state["stats"]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.run.class_names

    def predict(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Float32[np.ndarray, "n classes"]:
        """Predict the probability of each class; arguments as in `apply`."""
        return self.apply(images, masks, plates).probabilities

    def features(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """Compute the input of the last layer; arguments as in `apply`."""
        return self.apply(images, masks, plates).features

    def apply(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Predictions:
        """Compute probabilities and features of images, without augmentation.

        Args:
            images: (n, h, w, c) stored intensities, uint8 or uint16 as in training, channels in the
                order of training.
            masks: (n, h, w) instance labels of the cells, 0 is background.
            plates: plate of each image. Required by runs that normalize by plate, with all sites of
                each plate.

        Raises:
            InputError: the arrays do not fit each other or the run.
        """
        batches, positions = self._array_batches(images, masks, plates)
        return Predictions(*self._predict(batches, positions, quiet=True))

    def attention(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Float32[np.ndarray, "n h2 w2"]:
        """Compute the attention map in (0, 1), the factor of each position of the last feature map.

        The map covers the image evenly. Arguments as in `apply`.

        Raises:
            InputError: the network has no attention map, or the arrays do not fit each other or the
                run.
        """
        batches, positions = self._array_batches(images, masks, plates)
        (attention,) = self._apply(self._attention_step, batches, positions, quiet=True)
        return attention

    def intensities(self, images: np.ndarray, plates: Sequence[str] | None = None) -> Intensities:
        """Compute the shift and scale that normalize images (inputs of exported networks).

        Args:
            images: (n, h, w, c) stored intensities.
            plates: plate of each image.

        Raises:
            InputError: the arrays do not fit each other or the run.
        """
        arrays = ArraySource(self.run, images, np.zeros(np.shape(images)[:3], np.uint16), plates)
        return site_intensities(arrays, self.run.recipe.input, self.run.facts.get("normalization"))

    def apply_to_dataset(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"], *, feed: PipelineChoice = "auto"
    ) -> Predictions:
        """Compute probabilities and features of the records at `positions`, without augmentation.

        With several processes each reads its part, and all get all predictions.

        Raises:
            InputError: channels or pixel type differ from those of the training data.
        """
        with open_batches(self.decoder(dataset), self.placement, choice=feed) as pipeline:
            store = self._open_store(dataset)
            return Predictions(*self._predict(pipeline.batches, positions, store))

    def apply_with_masks(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"], changes: Mapping[str, MaskChange]
    ) -> list[Predictions]:
        """Apply the network to records with each of several changes of their masks, by name."""
        pipelines = [
            self._host_batches(dataset, one.change_batch, one.mask_transform)
            for one in changes.values()
        ]
        place, features = self.placement.place_rows, None
        if self._site_features is not None:
            store = self._open_store(dataset)
            store = store and store.of_changes(list(changes), self.batch_size)
            # Batches of a few sites: the backbone would run for all rows that pad a large batch.
            read, size = self.batch_size, self._site_features.step_size
            small = [merge_batches([one], positions, read, place, size) for one in pipelines]
            inputs = *self._state, small, positions
            features = self._site_features.compute_of_masks(*inputs, size, store)
            features = np.concatenate(features)
        # All masks share batches, which the sites of one change may not fill.
        merged = merge_batches(pipelines, positions, self.batch_size, place)
        rows = self._predict(merged, np.tile(positions, len(pipelines)), features=features)
        parts = zip(*(np.split(values, len(pipelines)) for values in rows), strict=True)
        return [Predictions(*part) for part in parts]

    def changed(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[RawBatch, int], RawBatch],
        mask_transform: MaskTransform | None = None,
        site_features: Float32[np.ndarray, "n d"] | None = None,
    ) -> Predictions:
        """Apply the network to changed batches.

        Args:
            dataset: records.
            positions: (n,) positions in the dataset.
            change: function of a batch on the host and the number of its first row.
            mask_transform: function of the instance labels of a site, before they are encoded.
            site_features: features of the changed records, if they are known.
        """
        batches = self._host_batches(dataset, change, mask_transform)
        return Predictions(*self._predict(batches, positions, changed=True, features=site_features))

    def site_features(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[RawBatch, int], RawBatch] | None = None,
        name: str = "",
    ) -> Float32[np.ndarray, "n d"] | None:
        """Compute site features of records; None for other networks.

        Arguments as in `changed`; `name` identifies the change of each row in stored features.
        """
        if self._site_features is None:
            return None
        store = self._open_store(dataset)
        store = store.of_changes([name]) if store and change else store
        inputs = *self._state, self._host_batches(dataset, change), positions
        return self._site_features.compute(*inputs, store, changed=change is not None)

    def attention_on_dataset(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "n h2 w2"]:
        """Compute the attention maps of records, see `attention`.

        Raises:
            InputError: the network has no attention map, or the dataset does not fit.
        """
        (attention,) = self._apply(self._attention_step, self._host_batches(dataset), positions)
        return attention

    def _host_batches(
        self,
        dataset: Dataset,
        change: Callable[[RawBatch, int], RawBatch] | None = None,
        mask_transform: MaskTransform | None = None,
    ) -> Batches:
        # Pixels are changed on the host, so these batches do not use the resident arrays.
        decoder = self.decoder(dataset)
        decoder.mask_transform = mask_transform
        return lambda order: map(self.placement.place_rows, decoder.batches(order, change))

    def decoder(self, dataset: Dataset) -> Decoder:
        """Return the decoder of the network input for a dataset.

        Raises:
            InputError: channels or pixel type differ from those of the training data.
        """
        require_fitting(self.run, dataset)
        return self._decoder(dataset, self.run.statistics_for(dataset), self.run.recipe.input)

    def step(self, batch: RawBatch) -> tuple[Float32[Array, "b classes"], Float32[Array, "b d"]]:
        """Compute probabilities and features of a batch on the devices, including padded rows."""
        return self._predict_step(*self._state, batch)

    @functools.cached_property
    def _predict_step(self) -> Any:
        return self.placement.compile_predict(make_predict_step(self.graphdef, self.run.recipe))

    @functools.cached_property
    def _attention_step(self) -> Any:
        return self.placement.compile_predict(make_attention_step(self.graphdef, self.run.recipe))

    @functools.cached_property
    def _head_step(self) -> Any:
        return self.placement.compile_predict(make_head_step(self.graphdef, self.run.recipe))

    @functools.cached_property
    def _site_features(self) -> SiteFeatures | None:
        """Site features of an ensemble classifier; None for other networks, or many processes."""
        if self.run.recipe.transfer.head != "channels" or self.placement.processes > 1:
            return None
        return SiteFeatures(self.graphdef, self.run.recipe, self.placement)

    def _open_store(self, dataset: Dataset) -> SiteFeatureStore | None:
        if self._site_features is None:
            return None
        return open_store(self.decoder(dataset), self.run.recipe, self._state[0])

    def _predict(
        self,
        batches: Batches,
        positions: Int[np.ndarray, " n"],
        store: SiteFeatureStore | None = None,
        *,
        quiet: bool = False,
        changed: bool = False,
        features: Float32[np.ndarray, "n d"] | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Compute probabilities and features; a frozen backbone is applied separately."""
        if self._site_features is None:
            return self._apply(self._predict_step, batches, positions, quiet=quiet)
        if features is None:
            inputs = *self._state, batches, positions
            features = self._site_features.compute(*inputs, store, changed=changed)
        paired = add_features(batches, features, self.placement)
        return self._apply(self._head_step, paired, positions, quiet=quiet)

    def _array_batches(
        self, images: np.ndarray, masks: np.ndarray, plates: Sequence[str] | None
    ) -> tuple[Batches, np.ndarray]:
        arrays = ArraySource(self.run, images, masks, plates)
        # The ablation that shuffles masks applies to datasets only; arrays come with the intended
        # masks.
        input = dataclasses.replace(self.run.recipe.input, mask_use="keep")
        decoder = self._decoder(arrays, self.run.facts.get("normalization"), input)
        place = self.placement.place_rows
        return lambda order: map(place, decoder.batches(order)), np.arange(len(arrays))

    def _decoder(
        self, dataset: SiteSource, statistics: Statistics | None, input: InputConfig
    ) -> Decoder:
        recipe = self.run.recipe
        # No class names: prediction needs no labels.
        sites = describe_sites(dataset, input, (), seed=recipe.seed, statistics=statistics)
        return Decoder(dataset, sites, input, recipe.decoded_augment)

    def _apply(
        self,
        step: Any,
        batches: Callable[..., Iterable[Any]],
        positions: np.ndarray,
        *,
        quiet: bool = False,
    ) -> tuple[np.ndarray, ...]:
        # With several processes, each one reads an equal part of every batch.
        multiple, inputs = self.placement.batch_multiple, (*self._state, batches, positions)
        return apply_to_sites(step, *inputs, self.batch_size, multiple=multiple, quiet=quiet)


def load_network(
    source: Run | Path | str,
    checkpoint: Which = "latest",
    epoch: int = 0,
    *,
    placement: Placement | None = None,
    dataset: Dataset | None = None,
    batch_size: int = BATCH_SIZE,
) -> Network:
    """Load the network of a run onto the devices.

    Args:
        source: run, run directory, or weight file with description from `export-torch`.
        checkpoint: latest or best.
        epoch: epoch of the checkpoint; 0 loads the newest, or the best.
        placement: devices; None uses all.
        dataset: dataset to apply the network to. Required for an imported network, whose channels
            are not stored.
        batch_size: number of sites in a step.

    Raises:
        InputError: the run or checkpoint is missing or damaged, or the dataset does not fit.
    """
    if isinstance(source, Path | str) and Path(source).suffix in WEIGHTS:
        run, tree = open_weight_file(Path(source))
        facts: dict[str, Any] = {"epoch": 0}
    else:
        run = source if isinstance(source, Run) else open_run(Path(source))
        tree, facts = _load_checkpoint(run, checkpoint, epoch)
    if dataset is not None:
        require_fitting(run, dataset)
    # The channels of an imported network without dataset come from the given dataset.
    names = run.facts["channels"] or (dataset and dataset.channel_names)
    if not names:
        raise InputError(
            f"{run.path}: was imported without a dataset, so its channels are unknown; pass one"
        )
    # Some normalizations provide several copies of each channel.
    channels = len(names) * NORMALIZATIONS[run.recipe.input.normalize].copies
    pretrained = run.facts.get("pretrained")
    # The new network is only the template for names and shapes.
    model, _ = create_network(run.recipe, channels, run.class_names, pretrained, abstract=True)
    warn_about_changed_code(run.recipe.model.model, run.facts)
    graphdef, params, stats = split_model(model)
    state = tree_to_state(tree, {"params": params, "stats": stats}, run.path)
    placement = choose_placement("auto") if placement is None else placement
    return Network(run, facts, placement, batch_size, graphdef, placement.replicate(state))


def _load_checkpoint(run: Run, checkpoint: Which, epoch: int) -> tuple[Tree, dict[str, Any]]:
    with Checkpoints(run.path) as checkpoints:
        # Epoch 0 is the default of the command line and selects the newest or the best one.
        tree, facts = checkpoints.load(checkpoint, epoch or None)
    run.require_matching_files(facts, checkpoints.path)
    console.print(f"info: {run.path}: checkpoint of epoch {facts['epoch']} ({checkpoint})")
    return select_network_arrays(tree), facts
