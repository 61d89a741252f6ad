"""A run's network, loaded and applied: to the sites of a dataset, or to arrays.

Both ways go through one compiled step, with batches of one size: a site has the same answer to the bit, asked for
alone or among a thousand, from an array or by `perturbjax predict`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Array, Float32, Float64, Int, UInt, UInt16

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import InputConfig
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches import (
    BatchOrder,
    Decoder,
    PipelineChoice,
    describe_sites,
    open_batches,
)
from perturbjax.data.batches.decoder import MaskTransform
from perturbjax.data.normalization import Intensities, Statistics, site_intensities
from perturbjax.dataset import PLATE, Dataset, SiteSource
from perturbjax.training.apply_network import Predictions, apply_to_sites
from perturbjax.training.checkpoint import Checkpoints, Tree, Which, tree_to_state
from perturbjax.training.devices import Placement, choose_placement
from perturbjax.training.phases import create_network
from perturbjax.training.pytorch_exchange import WEIGHTS, open_weight_file
from perturbjax.training.run_directory import Run, open_run
from perturbjax.training.step import make_attention_step, make_predict_step, split_model

#: Sites a step; also of `perturbjax predict`, whose answers depend on it in their last bit.
BATCH_SIZE = 128


@dataclass(frozen=True)
class Network:
    """A run's network on its devices, ready to be applied. Made by `load_network`.

    Attributes:
        run: where it comes from.
        facts: of its checkpoint: `epoch` among them.
        batch_size: sites a step; fewer are padded to it.
        graphdef, state: of the model; `params` and `stats`, on the devices.
    """

    run: Run
    facts: dict[str, Any]
    placement: Placement
    batch_size: int
    graphdef: nnx.GraphDef
    state: dict[str, Any]

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
        """The probability of every class, see `apply`."""
        return self.apply(images, masks, plates).probabilities

    def features(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """What the last layer sees of every image, see `apply`."""
        return self.apply(images, masks, plates).features

    def apply(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Predictions:
        """Probabilities and features of images, without augmentation.

        Args:
            images: (n, h, w, c) stored intensities, uint8 or uint16 as in training, the channels in the order of
                training.
            masks: (n, h, w) instance labels of the cells, 0 is background.
            plates: the plate of every image; needed, with all its sites, by runs that normalise by plate.

        Raises:
            InputError: the arrays do not fit each other or the run.
        """
        return Predictions(*self._of_arrays(self._predict_step, images, masks, plates))

    def attention(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        plates: Sequence[str] | None = None,
    ) -> Float32[np.ndarray, "n h2 w2"]:
        """By how much the mask lets each place of the last feature map through, in (0, 1), see `apply`.

        The places divide the image evenly: of 128 pixels the attention network makes 16 places, each of 8×8 pixels.

        Raises:
            InputError: the network has no attention, or as of `apply`.
        """
        (attention,) = self._of_arrays(self._attention_step, images, masks, plates)
        return attention

    def intensities(self, images: np.ndarray, plates: Sequence[str] | None = None) -> Intensities:
        """What images are normalised by, see `normalization.normalize`; `perturbjax export`'s networks may ask for it.

        Raises:
            InputError: as of `apply`.
        """
        arrays = _Arrays(self.run, images, np.zeros(np.shape(images)[:3], np.uint16), plates)
        return site_intensities(arrays, self.run.recipe.input, self.run.facts.get("normalization"))

    def apply_to_dataset(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"], *, feed: PipelineChoice = "auto"
    ) -> Predictions:
        """Probabilities and features of the records at `positions` of a dataset, without augmentation.

        Several processes each read their share, and all get all answers.

        Raises:
            InputError: the dataset's channels or pixel type are not those the run was trained on.
        """
        with open_batches(self.decoder(dataset), self.placement, choice=feed) as opened:
            return Predictions(*self._answers(self._predict_step, opened.batches, positions))

    def apply_with_masks(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[np.ndarray], np.ndarray],
        mask_transform: MaskTransform | None = None,
    ) -> Predictions:
        """The same answers with each batch's masks (b, h, w), as they are encoded, replaced by what `change` makes, of
        cells that `mask_transform` drew anew before."""

        def changed(batch: RawBatch, first: int) -> RawBatch:
            return batch._replace(mask=change(np.asarray(batch.mask)))  # type: ignore[arg-type]  # on the host still

        return self.changed(dataset, positions, changed, mask_transform)

    def changed(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[RawBatch, int], RawBatch],
        mask_transform: MaskTransform | None = None,
    ) -> Predictions:
        """The same answers to batches that `change` makes of those on the host, given the number of their first row."""
        return Predictions(
            *self._answers(
                self._predict_step, self._batches(dataset, change, mask_transform), positions
            )
        )

    def attention_on_dataset(
        self, dataset: Dataset, positions: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "n h2 w2"]:
        """By how much the mask lets each place of records of a dataset through, see `attention`.

        Raises:
            InputError: the network has no attention, or the dataset does not fit.
        """
        batches = self._batches(dataset, lambda batch, first: batch, None)
        (attention,) = self._answers(self._attention_step, batches, positions)
        return attention

    def _batches(
        self,
        dataset: Dataset,
        change: Callable[[RawBatch, int], RawBatch],
        mask_transform: MaskTransform | None,
    ) -> Callable[[BatchOrder], Iterator[RawBatch]]:
        decoder = self.decoder(dataset)
        decoder.mask_transform = mask_transform

        def batches(order: BatchOrder) -> Iterator[RawBatch]:
            first = 0
            for batch in decoder.batches(order):
                yield self.placement.place_rows(change(batch, first))
                first += len(batch.weight)

        return batches

    def decoder(self, dataset: Dataset) -> Decoder:
        """What the network is fed of every record of a dataset.

        Raises:
            InputError: the dataset's channels or pixel type are not those the run was trained on.
        """
        _require_fitting(self.run, dataset)
        return self._decoder(dataset, self.run.statistics_for(dataset), self.run.recipe.input)

    def step(self, batch: RawBatch) -> tuple[Float32[Array, "b classes"], Float32[Array, "b d"]]:
        """Probabilities and features, on the device, of a batch that a feed placed there, rows of padding too."""
        return self._predict_step(self.state["params"], self.state["stats"], batch)

    @functools.cached_property
    def _predict_step(self) -> Any:
        return self.placement.compile_predict(make_predict_step(self.graphdef, self.run.recipe))

    @functools.cached_property
    def _attention_step(self) -> Any:
        return self.placement.compile_predict(make_attention_step(self.graphdef, self.run.recipe))

    def _of_arrays(
        self, step: Any, images: np.ndarray, masks: np.ndarray, plates: Sequence[str] | None
    ) -> tuple[np.ndarray, ...]:
        arrays = _Arrays(self.run, images, masks, plates)
        # Shuffling is of a dataset's masks: whoever brings both says which goes with which.
        own_masks = dataclasses.replace(self.run.recipe.input, mask_use="keep")
        decoder = self._decoder(arrays, self.run.facts.get("normalization"), own_masks)

        def batches(order: BatchOrder) -> Iterator[RawBatch]:
            return map(self.placement.place_rows, decoder.batches(order))

        return self._answers(step, batches, np.arange(len(arrays)))

    def _decoder(
        self, dataset: SiteSource, statistics: Statistics | None, input: InputConfig
    ) -> Decoder:
        recipe = self.run.recipe
        sites = describe_sites(
            dataset, input, (), seed=recipe.seed, statistics=statistics
        )  # of labels it asks none
        return Decoder(dataset, sites, input, recipe.augment)

    def _answers(
        self, step: Any, batches: Callable[[BatchOrder], Iterable[RawBatch]], positions: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        multiple = self.placement.count if self.placement.processes > 1 else 1
        params, stats = self.state["params"], self.state["stats"]
        return apply_to_sites(
            step, params, stats, batches, positions, self.batch_size, multiple=multiple
        )


class _Arrays:
    """Images and masks in memory, as a feed asks a dataset for them."""

    def __init__(
        self, run: Run, images: np.ndarray, masks: np.ndarray, plates: Sequence[str] | None
    ):
        """Check what cannot be applied.

        Raises:
            InputError: names the array, what it is and what it must be.
        """
        images, masks = np.asarray(images), np.asarray(masks)
        self.path, self.channel_names = run.path, list(run.facts["channels"] or [])
        self.label_column, self.image_dtype = run.label_column, images.dtype
        dtypes, channels = run.facts["image_dtype"] or "uint8 or uint16", len(self.channel_names)
        if images.ndim != 4 or not len(images) or (channels and images.shape[3] != channels):
            wanted = (
                f"{channels} ({', '.join(self.channel_names)})" if channels else "all its channels"
            )
            raise InputError(
                f"images: have shape {images.shape}; {run.path} takes (n, height, width, {wanted})"
            )
        if str(images.dtype) not in dtypes.split(" or "):
            raise InputError(
                f"images: are {images.dtype}; {run.path} takes {dtypes}, as it was trained on"
            )
        if masks.shape != images.shape[:3]:
            raise InputError(
                f"masks: have shape {masks.shape}; with these images they must have {images.shape[:3]}"
            )
        if (
            masks.dtype.kind not in "biu"
            or masks.min() < 0
            or masks.max() > np.iinfo(np.uint16).max
        ):
            raise InputError(
                "masks: must be whole numbers from 0 (background) to 65535, one a cell"
            )
        if plates is not None and len(plates) != len(images):
            raise InputError(f"plates: are {len(plates)} for {len(images)} images; give one each")
        if plates is None and NORMALIZATIONS[run.recipe.input.normalize].uses_plates:
            raise InputError(
                f"plates: {run.path} normalises by plate; give the name of each image's plate"
            )
        self.channel_names = self.channel_names or [
            str(number) for number in range(images.shape[3])
        ]
        self._images, self._masks, self._plates = images, masks.astype(np.uint16), plates
        self.image_size = (images.shape[1], images.shape[2])

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        return self._images[position], self._masks[position]

    def column(self, name: str) -> pd.Series:
        """The plates, or a channel's mean or deviation.

        Raises:
            InputError: it is of those that only a dataset has.
        """
        if name == PLATE:
            return pd.Series(self._plates, dtype=str)
        statistic, _, channel = name.partition("_")
        if statistic not in ("mean", "std") or channel not in self.channel_names:
            raise InputError(
                f"{self.path}: keeps no statistics to normalise arrays by; apply it to a whole dataset"
            )
        return pd.Series(self._statistics(statistic)[:, self.channel_names.index(channel)])

    def _statistics(self, name: str) -> Float64[np.ndarray, "n c"]:
        # Summed as the builder sums them (data_prep/site_tasks.py), image by image, so that they are the same bits.
        pixels = (
            np.ascontiguousarray(image).reshape(-1, image.shape[-1]) for image in self._images
        )
        return np.stack([getattr(of_image, name)(0) for of_image in pixels])


def _require_fitting(run: Run, dataset: Dataset) -> None:
    for what, here in (
        ("channels", dataset.channel_names),
        ("image_dtype", str(dataset.image_dtype)),
    ):
        trained = run.facts[what]
        if trained is not None and trained != here:  # an imported network does not know
            raise InputError(
                f"{dataset.path}: {what} is {here}, {run.path} was trained on {trained}; build the dataset alike"
            )


def feature_names(groups: Sequence[str], count: int) -> list[str]:
    """What features are called in every table: counted from 1 after the name of their group, all of one size."""
    numbers = range(1, count // len(groups) + 1)
    return [f"{group}_{number:04d}" for group in groups for number in numbers]


def load_network(
    source: Run | Path | str,
    checkpoint: Which = "latest",
    epoch: int = 0,
    *,
    placement: Placement | None = None,
    dataset: Dataset | None = None,
    batch_size: int = BATCH_SIZE,
) -> Network:
    """The network of a run, on the devices.

    Args:
        source: the run, its directory, or a weight file that `export-torch` wrote with its description.
        checkpoint: latest or best.
        epoch: the checkpoint of this epoch; 0 takes the newest, or the best.
        placement: the devices; None takes all.
        dataset: what it is to be applied to, where the run does not know its channels (an imported network).
        batch_size: sites a step.

    Raises:
        InputError: there is no run, no checkpoint fits, or the dataset does not.
    """
    if isinstance(source, Path | str) and Path(source).suffix in WEIGHTS:
        run, tree = open_weight_file(Path(source))
        facts: dict[str, Any] = {"epoch": 0}
    else:
        run = source if isinstance(source, Run) else open_run(Path(source))
        tree, facts = _checkpoint_of(run, checkpoint, epoch)
    if dataset is not None:
        _require_fitting(run, dataset)
    names = run.facts["channels"] or (dataset and dataset.channel_names)
    if not names:
        raise InputError(
            f"{run.path}: was imported without a dataset, and its channels are not known; name a dataset"
        )
    channels = len(names) * NORMALIZATIONS[run.recipe.input.normalize].copies
    model, _ = create_network(run.recipe, channels, run.class_names, run.facts.get("pretrained"))
    graphdef, params, stats = split_model(model)
    state = tree_to_state(tree, {"params": params, "stats": stats}, run.path)
    placement = choose_placement("auto") if placement is None else placement
    return Network(run, facts, placement, batch_size, graphdef, placement.replicate(state))


def _checkpoint_of(run: Run, checkpoint: Which, epoch: int) -> tuple[Tree, dict[str, Any]]:
    """Parameters and statistics of a run's checkpoint, and its facts."""
    checkpoints = Checkpoints(run.path)
    tree, facts = checkpoints.load(checkpoint, epoch or None)
    checkpoints.close()
    run.require_matching_files(facts, checkpoints.path)
    console.print(f"{run.path}: checkpoint of epoch {facts['epoch']} ({checkpoint})")
    return {
        name: value for name, value in tree.items() if name.startswith(("params/", "stats/"))
    }, facts
