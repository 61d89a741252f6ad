"""What can be audited: a table of features, a dataset, a run; each as the same material."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float32, Int, Shaped

from perturbjax.audit.audit_options import AuditConfig
from perturbjax.audit.controls import INTENSITY, UNTRAINED, add_intensity_features, measured
from perturbjax.core.config import TransferConfig
from perturbjax.core.errors import InputError
from perturbjax.data.normalization import count_input_channels
from perturbjax.data.splits import TEST, TRAIN
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.apply import EVALUATION, PREDICTIONS
from perturbjax.evaluation.predictions import read_predictions, select_predictions
from perturbjax.evaluation.wells import well_ids
from perturbjax.inference import BATCH_SIZE, Network
from perturbjax.models.weights import UNTRAINED as UNTRAINED_WEIGHTS
from perturbjax.profiles.profile_options import Preparation, ProfileConfig, SourceConfig
from perturbjax.profiles.profile_table import Profiles
from perturbjax.training.devices import choose_placement
from perturbjax.training.phases import create_network
from perturbjax.training.run_directory import Run, open_run
from perturbjax.training.step import split_model

#: What happens to measurements of brightness before the classifier.
BRIGHTNESS = Preparation(normalize_by="training")


@dataclass(frozen=True)
class Features:
    """A table of features as `profiles.table_steps.as_table` gives it, and what happens to it before a classifier."""

    table: pd.DataFrame
    preparation: Preparation

    def fitted(
        self,
        model: str,
        train: Int[np.ndarray, " train"],
        test: Int[np.ndarray, " test"],
        labels: Sequence[Int[np.ndarray, " train"]],
        *,
        classes: int,
        seed: int,
    ) -> list[Float[np.ndarray, "test classes"]]:
        """Probabilities of the rows at `test`, of a classifier for each of several labellings of those at `train`.

        Raises:
            InputError: the classifier cannot be fitted.
        """
        from perturbjax.profiles.classifiers import CLASSIFIERS, probabilities
        from perturbjax.profiles.preparation import fit_preparation

        rows = self.table.iloc[train]
        steps, x = fit_preparation(rows, self.preparation, seed, labels[0], well_ids(rows))
        z, found = steps.transform(self.table.iloc[test]), []
        for one in labels:
            classifier = CLASSIFIERS[model].make(len(one), len(np.unique(one)), seed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore"
                    )  # of classes with few rows: what that does is what is judged
                    classifier.fit(x, one)
            except (ValueError, np.linalg.LinAlgError) as error:
                why = " ".join(str(error).split())
                raise InputError(
                    f"--model {model}: cannot be fitted ({why}); choose another"
                ) from error
            found.append(probabilities(classifier, z, classes))
        return found


@dataclass(frozen=True)
class AuditData:
    """Sites, their classes, and their features.

    Attributes:
        what: it is, in words.
        label: the metadata column of the classes.
        index: one row a site: `site_id`, `Metadata_*`, `label`, and what controls look at.
        class_names: in the order of class numbers.
        features: what is audited; None where a run has answered already.
        controls: what the same model is given instead, by the name of the control.
    """

    what: str
    label: str
    index: pd.DataFrame
    class_names: list[str]
    features: Features | None
    controls: dict[str, Features]

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """Class numbers."""
        return np.asarray(
            pd.Categorical(self.index["label"], categories=self.class_names).codes, dtype=int
        )

    @property
    def wells(self) -> Int[np.ndarray, " n"]:
        """Number of each site's well."""
        return well_ids(self.index)


@dataclass(frozen=True)
class RunPredictions:
    """A run's own answers: the positions in the material that trained and judged, and what it said of the latter."""

    policy: str
    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]
    probabilities: Float[np.ndarray, "test classes"]


def of_features(config: AuditConfig) -> AuditData:
    """Tables of features, with what a dataset knows of their sites; or the dataset's own features, extracted.

    Raises:
        InputError: a file or column cannot be used, or the table's rows are not sites of the dataset.
    """
    data = config.source.data
    dataset = open_dataset(data) if data else None
    profiles, negcon, label = _read(config, config.source)
    index = profiles.metadata.assign(negcon=negcon)
    index = index if dataset is None else _with_dataset(index, dataset)
    names = [path.name for path in config.features] or list(map(str, data))
    what = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    material = build_audit_data(what, label, index, profiles, config)
    if config.untrained:
        blank, _, _ = _read(config, dataclasses.replace(config.source, weights=UNTRAINED_WEIGHTS))
        material.controls[UNTRAINED] = _as_features(index, _frame(blank), config.preparation)
    return material


def build_audit_data(
    what: str, label: str, index: pd.DataFrame, profiles: Profiles, config: AuditConfig
) -> AuditData:
    """Profiles with the controls that their index allows; `index` has a row a profile."""
    index = add_intensity_features(index.assign(label=index[label]), _frame(profiles))
    features = _as_features(index, _frame(profiles), config.preparation)
    names = sorted(index["label"].unique())
    return AuditData(what, label, index, names, features, _brightness(index))


def _frame(profiles: Profiles) -> pd.DataFrame:
    return pd.DataFrame(profiles.values, columns=list(profiles.names))


def _read(
    config: AuditConfig, source: SourceConfig
) -> tuple[Profiles, Bool[np.ndarray, " n"], str]:
    """Profiles that have a label, which of them are negative controls, and the label's column."""
    from perturbjax.profiles.profile_inputs import load_profiles

    label = config.label_column
    if config.features and source.data:
        label = label or open_dataset(source.data).label_column
    source = SourceConfig() if config.features else source
    profiles, negcon, label = load_profiles(ProfileConfig(config.features, source, label))
    return profiles, negcon, label


def _brightness(index: pd.DataFrame) -> dict[str, Features]:
    """The control that is the same model on the table's own measurements of brightness, where there are such."""
    values = pd.DataFrame(measured(index))
    return {INTENSITY: _as_features(index, values, BRIGHTNESS)} if len(values.columns) else {}


def _with_dataset(index: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """The index, and beside it what the dataset measured of each site: its cells and its brightness."""
    at = pd.Index(dataset.index["site_id"]).get_indexer(index["site_id"])
    if (at < 0).any():
        site = index["site_id"].iloc[int(np.argmin(at))]
        raise InputError(
            f"--features: row {site!r} is no site of {dataset.path}; extract them with --level site"
        )
    measured = [
        c for c in dataset.index.columns if c not in index.columns and not c.startswith("Metadata_")
    ]
    return pd.concat([index, dataset.index[measured].iloc[at].reset_index(drop=True)], axis=1)


def of_run(config: AuditConfig, path: Path) -> tuple[AuditData, RunPredictions]:
    """A run's dataset, and what `perturbjax evaluate` wrote of its judging sites.

    Raises:
        InputError: the run was not evaluated, or its predictions do not fit its split.
    """
    material, run, _, part = of_recipe(config, path)
    file = run.path / EVALUATION / PREDICTIONS
    if not file.is_file():
        raise InputError(f"{path}: was not evaluated; run `perturbjax evaluate --run {path}` first")
    train, test = (np.flatnonzero(part == name) for name in (TRAIN, TEST))
    _, probabilities = select_predictions(
        read_predictions(file), material.index.iloc[test], run.class_names
    )
    policy = run.recipe.split.split_file or run.recipe.split.split
    return material, RunPredictions(policy, train, test, probabilities)


def of_recipe(
    config: AuditConfig, path: Path
) -> tuple[AuditData, Run, Dataset, Shaped[np.ndarray, " n"]]:
    """The sites of a run's split, the run, its dataset, and the part of each site.

    Raises:
        InputError: a file of the run cannot be read.
    """
    run = open_run(path)
    dataset = run.open_data(config.source.data)
    manifest = run.manifest(dataset.index)
    positions = dataset.positions(list(manifest["site_id"]))
    index = dataset.index.iloc[positions].reset_index(drop=True)
    index = index.assign(label=index[run.label_column])
    controls: dict[str, Features] = {}
    if config.untrained:
        values = pd.DataFrame(untrained_features(run, dataset, positions)).add_prefix("feature ")
        controls[UNTRAINED] = _as_features(index, values, config.preparation)
    material = AuditData(str(path), run.label_column, index, run.class_names, None, controls)
    return material, run, dataset, manifest["part"].to_numpy()


def untrained_features(
    run: Run, dataset: Dataset, positions: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "n d"]:
    """What the last layer of the run's network sees before any training, its input as in evaluation."""
    placement = choose_placement("auto")
    recipe = dataclasses.replace(run.recipe, transfer=TransferConfig())
    channels = count_input_channels(dataset, recipe.input)
    model, _ = create_network(recipe, channels, run.class_names)
    graphdef, params, stats = split_model(model)
    state = placement.replicate({"params": params, "stats": stats})
    return (
        Network(run, {"epoch": 0}, placement, BATCH_SIZE, graphdef, state)
        .apply_to_dataset(dataset, positions)
        .features
    )


def _as_features(index: pd.DataFrame, values: pd.DataFrame, preparation: Preparation) -> Features:
    from perturbjax.profiles.table_steps import as_table

    profiles = Profiles(index, values.to_numpy(np.float32), tuple(map(str, values.columns)))
    negcon = index["negcon"] if "negcon" in index.columns else np.zeros(len(index), dtype=bool)
    return Features(as_table(profiles, np.asarray(negcon)), preparation)
