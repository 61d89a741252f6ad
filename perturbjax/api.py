"""A trained network as an object: numpy arrays in, tables and arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.errors import InputError
from perturbjax.dataset import PLATE, Dataset, open_dataset
from perturbjax.dataset.summary_card import card, strip
from perturbjax.evaluation.apply import EVALUATION, run_predictions_table
from perturbjax.evaluation.evaluation_result import read_evaluation, summary_sentences
from perturbjax.inference import Network, load_network
from perturbjax.training.checkpoint import Which
from perturbjax.training.run_directory import Run


@dataclass(frozen=True)
class TrainedRun:
    """A run's network, ready for images. Made by `perturbjax.load`.

    In every method `images` are (n, h, w, c) stored intensities of the type and with the channels of training (uint8
    or uint16), `masks` (n, h, w) instance labels of the cells with 0 for background, and `sites` is None or a table of
    n rows with what is known of the images: `site_id` and `Metadata_*` columns, as a dataset's `index` has them. A run
    that normalises by plate needs `Metadata_Plate` there. A dataset in place of the images stands for all its sites.

    Nothing is random, and an image alone is answered as it is among a thousand, to the last bit.
    """

    network: Network
    """The network on its devices."""

    @property
    def run(self) -> Run:
        """The run directory: recipe, split and facts."""
        return self.network.run

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the probabilities."""
        return self.run.class_names

    @property
    def channels(self) -> list[str]:
        """The channels that images must have, in their order; empty where an imported network does not know."""
        return list(self.run.facts["channels"] or [])

    def predict(
        self,
        images: np.ndarray | Dataset,
        masks: np.ndarray | None = None,
        sites: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """The table that `perturbjax predict` writes: a row an image.

        Its columns are the `Metadata_*` of `sites`, `site_id` (numbers where none is given), `part` (train, test, or
        new where the run does not know the site), `label` (the true class, empty where it is not known), `predicted`,
        and `prob_<class>` (float32) of every class.

        Raises:
            InputError: the arrays do not fit each other or the run.
        """
        if isinstance(images, Dataset):
            answers, sites = (
                self.network.apply_to_dataset(images, np.arange(len(images))),
                images.index,
            )
        else:
            answers = self.network.apply(images, *self._masks_and_plates(masks, sites))
            sites = _numbered(sites, len(images))
        return run_predictions_table(self.run, sites, answers, self.run.parts(sites["site_id"]))

    def features(
        self,
        images: np.ndarray | Dataset,
        masks: np.ndarray | None = None,
        sites: pd.DataFrame | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """What the last layers see of every image.

        Raises:
            InputError: the arrays do not fit each other or the run.
        """
        if isinstance(images, Dataset):
            return self.network.apply_to_dataset(images, np.arange(len(images))).features
        return self.network.features(images, *self._masks_and_plates(masks, sites))

    def attention(
        self, images: np.ndarray, masks: np.ndarray, sites: pd.DataFrame | None = None
    ) -> Float32[np.ndarray, "n h2 w2"]:
        """By how much the mask let each place of the last feature map through, in (0, 1).

        Places divide the image evenly: the attention network makes 16×16 of a crop of 128 pixels. Where the whole map
        is nearly 1, the attention gates nothing.

        Raises:
            InputError: the network has no attention, or the arrays do not fit each other or the run.
        """
        return self.network.attention(images, *self._masks_and_plates(masks, sites))

    def _masks_and_plates(
        self, masks: np.ndarray | None, sites: pd.DataFrame | None
    ) -> tuple[np.ndarray, list[str] | None]:
        if masks is None:
            raise InputError("masks: are needed with images; perturbjax.segment makes them")
        by_plate = NORMALIZATIONS[self.run.recipe.input.normalize].uses_plates
        known = by_plate and sites is not None and PLATE in sites.columns
        return masks, sites[PLATE].astype(str).tolist() if known and sites is not None else None

    def __repr__(self) -> str:
        return (
            f"<run {self.run.path}: {self.run.recipe.model.model}, epoch {self.network.facts['epoch']}, "
            f"{len(self.class_names)} classes of {self.run.label_column}>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: what it is, its score, its classes, and a site of each of the first classes."""
        run, recipe = self.run, self.run.recipe
        facts: dict[str, object] = {
            "network": recipe.model.model,
            "epoch": self.network.facts["epoch"],
            "split": recipe.split.split,
            "channels": ", ".join(self.channels),
            f"classes of {run.label_column}": len(self.class_names),
        }
        judged = run.path / EVALUATION / "scores.json"
        if judged.is_file():
            facts["judged"] = " ".join(summary_sentences(read_evaluation(judged)))
        try:
            pictures = (
                strip(open_dataset(run.data), run.label_column, self.class_names)
                if run.data
                else ""
            )
        except InputError:  # the dataset is elsewhere by now: a run does without it
            pictures = ""
        return card(str(run.path), facts, self.class_names, pictures)


def load(path: Path | str, checkpoint: Which = "latest", epoch: int = 0) -> TrainedRun:
    """Open a trained network.

    Args:
        path: a run directory, or a `.safetensors` or `.pth` that `perturbjax export-torch` wrote with its description.
        checkpoint: of a run directory: latest, or best on the judging sites.
        epoch: of a run directory: the checkpoint of this epoch; 0 takes the newest, or the best.

    Raises:
        InputError: there is no run, or its files are damaged or belong to another.

    Examples:
        >>> run = perturbjax.load("run")
        >>> run.class_names
        ['DMSO', 'taxol']
        >>> images.shape, images.dtype, masks.shape
        ((30, 24, 24, 2), dtype('uint16'), (30, 24, 24))
        >>> run.predict(images, masks).columns.tolist()
        ['site_id', 'part', 'label', 'predicted', 'prob_DMSO', 'prob_taxol']
        >>> run.features(images, masks).shape
        (30, 256)
        >>> run.attention(images, masks).shape
        (30, 2, 2)
        >>> bool((run.predict(images[:1], masks[:1]) == run.predict(images, masks)[:1]).all(axis=None))
        True
    """
    return TrainedRun(load_network(path, checkpoint, epoch))


def _numbered(sites: pd.DataFrame | None, count: int) -> pd.DataFrame:
    """The table of the images, with a `site_id` where it has none."""
    sites = pd.DataFrame(index=range(count)) if sites is None else sites
    if len(sites) != count:
        raise InputError(f"sites: has {len(sites)} rows for {count} images; give one each")
    return (
        sites
        if "site_id" in sites.columns
        else sites.assign(site_id=[str(number) for number in range(count)])
    )
