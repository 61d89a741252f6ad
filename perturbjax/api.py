"""Python functions: trained networks, and the four screening commands on tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float32

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import Recipe, preset
from perturbjax.core.errors import InputError
from perturbjax.core.options import require
from perturbjax.dataset import PLATE, Dataset, open_dataset
from perturbjax.dataset.summary_card import card, strip
from perturbjax.evaluation.apply import EVALUATION, run_predictions_table
from perturbjax.evaluation.evaluation_result import read_evaluation, summary_sentences
from perturbjax.evaluation.run_sets import predict_sets, read_calibration
from perturbjax.inference import Network, load_network
from perturbjax.training.checkpoint import Which
from perturbjax.training.run_directory import Run

if TYPE_CHECKING:
    from perturbjax.screening.wells import Wells


@dataclass(frozen=True)
class TrainedRun:
    """The network of a run, returned by `perturbjax.load`.

    All methods have these arguments:

    * `images`: (n, h, w, c) intensities with the data type (uint8 or uint16) and the channels of
      the training data; or a dataset, for all its sites.
    * `masks`: (n, h, w) instance labels of the cells; 0 is background.
    * `sites`: None, or a table of n rows with `site_id` and `Metadata_*` columns, such as the
      `index` of a dataset. Normalization by plate requires `Metadata_Plate`.

    The predictions are deterministic and do not depend on the other images of a call.
    """

    network: Network
    """Network on its devices."""

    @property
    def run(self) -> Run:
        """Run directory: recipe, split and facts."""
        return self.network.run

    @property
    def class_names(self) -> list[str]:
        """Class names, in the order of the probabilities."""
        return self.run.class_names

    @property
    def channels(self) -> list[str]:
        """Channels of the images, in their order; empty if an imported network does not store
        them."""
        return list(self.run.facts["channels"] or [])

    def predict(
        self,
        images: np.ndarray | Dataset,
        masks: np.ndarray | None = None,
        sites: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """Predict the class of each image.

        Returns:
            The table of `perturbjax predict`, one row per image: the `Metadata_*` columns of
            `sites`, `site_id` (row numbers by default), `part` (train or test; new for sites that
            are not in the split of the run), `label` (true class, or empty), `predicted`,
            prediction sets if the checkpoint was evaluated, and `prob_<class>` (float32) for each
            class.

        Raises:
            InputError: the arrays do not match each other or the run.
        """
        if isinstance(images, Dataset):
            predictions = self.network.apply_to_dataset(images, np.arange(len(images)))
            sites = images.index
        else:
            predictions = self.network.apply(images, *self._masks_and_plates(masks, sites))
            sites = _numbered(sites, len(images))
        part = self.run.parts(sites["site_id"])
        stored = read_calibration(self.run, self.network.facts["epoch"])
        sets = predict_sets(stored, sites["site_id"], predictions, self.class_names)
        return run_predictions_table(self.run, sites, predictions, part, sets)

    def features(
        self,
        images: np.ndarray | Dataset,
        masks: np.ndarray | None = None,
        sites: pd.DataFrame | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """Compute the features of each image, which are the input of the last layer.

        Returns:
            (n, d) features.

        Raises:
            InputError: the arrays do not match each other or the run.
        """
        if isinstance(images, Dataset):
            return self.network.apply_to_dataset(images, np.arange(len(images))).features
        return self.network.features(images, *self._masks_and_plates(masks, sites))

    def attention(
        self, images: np.ndarray, masks: np.ndarray, sites: pd.DataFrame | None = None
    ) -> Float32[np.ndarray, "n h2 w2"]:
        """Compute the attention map of each image.

        Returns:
            (n, h2, w2) factors in (0, 1) on the last feature map, which covers the image evenly:
            16 x 16 for a network input of 128 pixels. A map of values near 1 has no effect.

        Raises:
            InputError: the network has no attention, or the arrays do not match.
        """
        return self.network.attention(images, *self._masks_and_plates(masks, sites))

    def _masks_and_plates(
        self, masks: np.ndarray | None, sites: pd.DataFrame | None
    ) -> tuple[np.ndarray, list[str] | None]:
        if masks is None:
            raise InputError("masks: required with images. Compute them with perturbjax.segment.")
        uses_plates = NORMALIZATIONS[self.run.recipe.input.normalize].uses_plates
        if sites is None or not uses_plates or PLATE not in sites.columns:
            return masks, None
        return masks, sites[PLATE].astype(str).tolist()

    def __repr__(self) -> str:
        return (
            f"<run {self.run.path}: {self.run.recipe.model.model}, epoch "
            f"{self.network.facts['epoch']}, "
            f"{len(self.class_names)} classes of {self.run.label_column}>"
        )

    def _repr_html_(self) -> str:
        """Notebook display: network, score, classes, and an example site of the first classes."""
        run, recipe = self.run, self.run.recipe
        facts: dict[str, object] = {
            "network": recipe.model.model,
            "epoch": self.network.facts["epoch"],
            "split": recipe.split.split,
            "channels": ", ".join(self.channels),
            f"classes of {run.label_column}": len(self.class_names),
        }
        scores = run.path / EVALUATION / "scores.json"
        if scores.is_file():
            facts["evaluation"] = " ".join(summary_sentences(read_evaluation(scores)))
        try:
            pictures = (
                strip(open_dataset(run.data), run.label_column, self.class_names)
                if run.data
                else ""
            )
        except InputError:  # the dataset was moved; the run does not require it
            pictures = ""
        return card(str(run.path), facts, self.class_names, pictures)


def fit(
    data: Path | str, out: Path | str, recipe: Recipe | None = None, **options: Any
) -> TrainedRun:
    """Train a network on a dataset, or resume a training, as `perturbjax train` does.

    Args:
        data: dataset directory.
        out: run directory to write.
        recipe: settings of the training; by default those of `perturbjax.preset("pretrained")`.
        options: further fields of `perturbjax.training.fit.TrainConfig`, such as
            `checkpoint_every`.

    Returns:
        The trained network, see `load`.

    Raises:
        InputError: the data or the recipe cannot be used, or `out` contains another run.
    """
    from perturbjax.training.fit import TrainConfig
    from perturbjax.training.fit import fit as train

    recipe = preset("pretrained") if recipe is None else recipe
    run = train(TrainConfig(out=Path(out), data=(Path(data),), recipe=recipe, **options))
    return load(run.path)


def load(path: Path | str, checkpoint: Which = "latest", epoch: int = 0) -> TrainedRun:
    """Load a trained network.

    Args:
        path: run directory, or a `.safetensors` or `.pth` file from `perturbjax export-torch`.
        checkpoint: "latest" or "best", for run directories.
        epoch: epoch of the checkpoint, for run directories; 0 uses `checkpoint`.

    Raises:
        InputError: there is no run, or its files are damaged or do not belong together.

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
        >>> first = run.predict(images[:1], masks[:1])
        >>> bool((first == run.predict(images, masks)[:1]).all(axis=None))
        True
    """
    return TrainedRun(load_network(path, checkpoint, epoch))


def _numbered(sites: pd.DataFrame | None, count: int) -> pd.DataFrame:
    """The table of the images, with row numbers as `site_id` if it has none."""
    sites = pd.DataFrame(index=range(count)) if sites is None else sites
    if len(sites) != count:
        raise InputError(f"sites: {len(sites)} rows for {count} images. Pass one row per image.")
    return (
        sites
        if "site_id" in sites.columns
        else sites.assign(site_id=[str(number) for number in range(count)])
    )


def hits(
    table: Any,
    *,
    label_column: str = "",
    negcon: str = "",
    poscon: str = "",
    dose_column: str = "",
    fdr: float = 0.05,
    permutations: int = 20_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Find the treatments that differ from the negative controls.

    Args:
        table: profiles with `Metadata_Plate`, `Metadata_Well` and a treatment: a DataFrame, an
            AnnData object, or the path of a parquet, CSV or .h5ad file. Rows of sites or cells are
            aggregated to wells by the median, because wells are the replicates.
        label_column: column with the treatment; Metadata_pert_iname by default.
        negcon: negative controls as COLUMN=VALUE; see `perturbjax hits --help`.
        poscon: positive controls as COLUMN=VALUE.
        dose_column: column with the dose; each dose is then tested as a treatment of its own.
        fdr: false discovery rate of each method.
        permutations: maximum number of permutations per test.
        seed: of the permutations.

    Returns:
        One row per treatment, most significant first; see `perturbjax.screening.hits.hit_table`.

    Raises:
        InputError: the table cannot be used, or no well is a negative control.
    """
    from perturbjax.screening.hits import Settings, hit_table

    require("fdr", fdr, 0 < fdr < 1, "greater than 0 and less than 1")
    wells = _wells(table, label_column, negcon, dose_column=dose_column, poscon=poscon)
    return hit_table(wells, Settings(permutations, fdr, seed))


def doses(
    table: Any,
    dose_column: str,
    *,
    response: str = "distance",
    label_column: str = "",
    negcon: str = "",
    baseline: Path | str | pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit dose-response curves, and find EC50s and lowest effective doses.

    Args:
        table: profiles, see `hits`.
        dose_column: column with the concentration.
        response: "distance" from the negative controls, "cell_count", or the name of a feature.
        label_column: column with the treatment; Metadata_pert_iname by default.
        negcon: negative controls as COLUMN=VALUE.
        baseline: table of the same wells before treatment, by which the response is divided.
        seed: of permutations and resamples.

    Returns:
        One row per treatment; see `perturbjax.screening.commands.compute_doses`.

    Raises:
        InputError: the table cannot be used, or no treatment has two doses.
    """
    from perturbjax.screening.commands import compute_doses

    needs_controls = response == "distance"
    wells = _wells(table, label_column, negcon, needs_controls=needs_controls)
    return compute_doses(
        wells, dose_column=dose_column, response=response, baseline=baseline, seed=seed
    ).table


def similar(
    table: Any,
    *,
    restriction: str = "none",
    neighbors: int = 5,
    label_column: str = "",
    negcon: str = "",
    dose_column: str = "",
    seed: int = 0,
) -> pd.DataFrame:
    """Find the most similar treatments of every treatment.

    Args:
        table: profiles, see `hits`.
        restriction: compare only wells that do not share this: "none", "plate", "position",
            "layout", or a metadata column.
        neighbors: neighbors per treatment.
        label_column: column with the treatment; Metadata_pert_iname by default.
        negcon: negative controls as COLUMN=VALUE.
        dose_column: column with the dose. Each dose is then a treatment, and neighbors are other
            compounds.
        seed: of the random control profiles.

    Returns:
        One row per treatment and neighbor; see `perturbjax.screening.similarity.neighbor_table`.

    Raises:
        InputError: the table cannot be used.
    """
    from perturbjax.screening.similarity import neighbor_table

    wells = _wells(table, label_column, negcon, dose_column=dose_column)
    return neighbor_table(wells, restriction=restriction, top=neighbors, seed=seed)


def differences(
    table: Any,
    *,
    treatments: tuple[str, ...] = (),
    label_column: str = "",
    negcon: str = "",
) -> pd.DataFrame:
    """Compare every feature of every treatment with the negative controls.

    Args:
        table: profiles, see `hits`.
        treatments: names of treatments; by default all.
        label_column: column with the treatment; Metadata_pert_iname by default.
        negcon: negative controls as COLUMN=VALUE.

    Returns:
        One row per treatment and feature; see `perturbjax.screening.differences.difference_table`.

    Raises:
        InputError: the table cannot be used, or a treatment does not exist.
    """
    from perturbjax.screening.commands import compute_differences

    return compute_differences(_wells(table, label_column, negcon), treatments).features


def _wells(table: Any, label_column: str, negcon: str, **settings: Any) -> Wells:
    """Read the wells of a DataFrame, an AnnData object or a file."""
    from perturbjax.profiles.profile_reader import combine_anndata
    from perturbjax.screening.screen_inputs import load_wells
    from perturbjax.screening.screen_options import ScreenConfig

    if isinstance(table, str | Path):
        screen = ScreenConfig((Path(table),), label_column=label_column, negcon=negcon)
        return load_wells(screen, **settings)
    if not isinstance(table, pd.DataFrame):
        if not all(hasattr(table, name) for name in ("obs", "var", "X")):
            raise InputError(
                f"table: is {type(table).__name__}. Pass a DataFrame, an AnnData object or a path."
            )
        table = combine_anndata(table.obs, table.var, table.X)
    # The path only names the table in messages.
    screen = ScreenConfig((Path("table"),), label_column=label_column, negcon=negcon)
    return load_wells(screen, table=table, **settings)
