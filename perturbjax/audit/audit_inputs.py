"""Input of an audit from feature tables, a dataset or a run, in one form."""

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
from perturbjax.audit.controls import INTENSITY, UNTRAINED, add_intensity_features
from perturbjax.core.config import TransferConfig
from perturbjax.core.errors import InputError
from perturbjax.data.normalization import count_input_channels
from perturbjax.data.splits import TEST, TRAIN, split_name
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.apply import EVALUATION, PREDICTIONS
from perturbjax.evaluation.baselines import measured_intensities
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

#: Preparation of intensity measurements before the classifier.
INTENSITY_PREPARATION = Preparation(normalize_by="training")


@dataclass(frozen=True)
class Features:
    """Table of features as from `profiles.table_steps.as_table`, and its preparation."""

    table: pd.DataFrame
    preparation: Preparation

    def fit_predict(
        self,
        model: str,
        train: Int[np.ndarray, " train"],
        test: Int[np.ndarray, " test"],
        labels: Sequence[Int[np.ndarray, " train"]],
        *,
        classes: int,
        seed: int,
    ) -> list[Float[np.ndarray, "test classes"]]:
        """Fit one classifier per labeling of the training rows, and predict the test rows.

        Args:
            model: classifier, a name of `perturbjax classify --models`.
            train: positions of the training rows.
            test: positions of the test rows.
            labels: labelings of the training rows.
            classes: number of classes.
            seed: seed of preparation and classifier.

        Raises:
            InputError: the classifier cannot be fitted.
        """
        from perturbjax.profiles.classifiers import CLASSIFIERS, probabilities
        from perturbjax.profiles.preparation import fit_preparation

        rows = self.table.iloc[train]
        # All labelings share one preparation, which is fitted with the first of them.
        steps, x = fit_preparation(rows, self.preparation, seed, labels[0], well_ids(rows))
        z, predictions = steps.transform(self.table.iloc[test]), []
        for one in labels:
            classifier = CLASSIFIERS[model].make(len(one), len(np.unique(one)), seed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about classes with few rows
                    classifier.fit(x, one)
            except (ValueError, np.linalg.LinAlgError) as error:
                why = " ".join(str(error).split())
                raise InputError(
                    f"--model {model}: cannot be fitted ({why}); choose another"
                ) from error
            predictions.append(probabilities(classifier, z, classes))
        return predictions


@dataclass(frozen=True)
class AuditData:
    """Sites, their classes and features.

    Attributes:
        source: file, dataset or run, for messages.
        label: metadata column of the classes.
        index: `site_id`, `Metadata_*`, `label` and the columns that controls use, one row per site.
        class_names: classes in the order of their numbers.
        features: audited features; None if a run has predicted already.
        controls: other features for the same classifier, by name of the control.
    """

    source: str
    label: str
    index: pd.DataFrame
    class_names: list[str]
    features: Features | None
    controls: dict[str, Features]

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """Class number of each site."""
        codes = pd.Categorical(self.index["label"], categories=self.class_names).codes
        return np.asarray(codes, dtype=int)

    @property
    def wells(self) -> Int[np.ndarray, " n"]:
        """Well number of each site."""
        return well_ids(self.index)


@dataclass(frozen=True)
class RunPredictions:
    """Predictions of a run: split, training and test positions, probabilities of the test sites."""

    policy: str
    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]
    probabilities: Float[np.ndarray, "test classes"]


def load_features(config: AuditConfig) -> AuditData:
    """Load feature tables (with the measurements of a dataset), or extract features of a dataset.

    Raises:
        InputError: a file or column cannot be used, or a row of the table is not in the dataset.
    """
    data = config.source.data
    dataset = open_dataset(data) if data else None
    profiles, negcon, label = _read(config, config.source)
    index = profiles.metadata.assign(negcon=negcon)
    index = index if dataset is None else _add_measurements(index, dataset)
    names = [path.name for path in config.features] or list(map(str, data))
    source = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    audit_data = build_audit_data(source, label, index, profiles, config)
    if config.untrained:
        blank, _, _ = _read(config, dataclasses.replace(config.source, weights=UNTRAINED_WEIGHTS))
        audit_data.controls[UNTRAINED] = _as_features(index, _frame(blank), config.preparation)
    return audit_data


def build_audit_data(
    source: str, label: str, index: pd.DataFrame, profiles: Profiles, config: AuditConfig
) -> AuditData:
    """Combine profiles with the controls that their index (one row per profile) allows."""
    index = add_intensity_features(index.assign(label=index[label]), _frame(profiles))
    features = _as_features(index, _frame(profiles), config.preparation)
    values = pd.DataFrame(measured_intensities(index))
    controls: dict[str, Features] = {}
    if len(values.columns):
        controls[INTENSITY] = _as_features(index, values, INTENSITY_PREPARATION)
    names = sorted(index["label"].unique())
    return AuditData(source, label, index, names, features, controls)


def _frame(profiles: Profiles) -> pd.DataFrame:
    return pd.DataFrame(profiles.values, columns=list(profiles.names))


def _read(
    config: AuditConfig, source: SourceConfig
) -> tuple[Profiles, Bool[np.ndarray, " n"], str]:
    """Read profiles with a label; return them, the negative controls and the label column."""
    from perturbjax.profiles.profile_inputs import load_profiles

    label = config.label_column
    if config.features and source.data:
        label = label or open_dataset(source.data).label_column
    # With --features, the dataset of --data supplies measurements, not features.
    source = SourceConfig() if config.features else source
    profiles, negcon, label = load_profiles(ProfileConfig(config.features, source, label))
    return profiles, negcon, label


def _add_measurements(index: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """Add the cell counts and intensities of a dataset to the index."""
    # -1 for rows that are not sites of the dataset.
    positions = pd.Index(dataset.index["site_id"]).get_indexer(index["site_id"])
    if (positions < 0).any():
        site = index["site_id"].iloc[int(np.argmin(positions))]
        raise InputError(
            f"--features: row {site!r} is not a site of {dataset.path}; extract features with "
            "--level site"
        )
    columns = [
        column
        for column in dataset.index.columns
        if column not in index.columns and not column.startswith("Metadata_")
    ]
    added = dataset.index[columns].iloc[positions].reset_index(drop=True)
    return pd.concat([index, added], axis=1)


def load_run_predictions(config: AuditConfig, path: Path) -> tuple[AuditData, RunPredictions]:
    """Load the dataset of a run and the predictions that `perturbjax evaluate` wrote.

    Raises:
        InputError: the run was not evaluated, or its predictions do not match its split.
    """
    data, run, _, part = load_run_data(config, path)
    file = run.path / EVALUATION / PREDICTIONS
    if not file.is_file():
        raise InputError(f"{path}: was not evaluated; run `perturbjax evaluate --run {path}` first")
    train, test = (np.flatnonzero(part == name) for name in (TRAIN, TEST))
    _, probabilities = select_predictions(
        read_predictions(file), data.index.iloc[test], run.class_names
    )
    policy = split_name(run.recipe.split, run.manifest(data.index))
    return data, RunPredictions(policy, train, test, probabilities)


def load_run_data(
    config: AuditConfig, path: Path
) -> tuple[AuditData, Run, Dataset, Shaped[np.ndarray, " n"]]:
    """Load the sites of a run's split.

    Returns:
        Sites, run, dataset, and the part (train or test) of each site.

    Raises:
        InputError: a file of the run cannot be read.
    """
    run = open_run(path)
    dataset = run.open_data(config.source.data)
    # The manifest lists the sites of the run; excluded sites are not audited.
    manifest = run.manifest(dataset.index)
    positions = dataset.positions(list(manifest["site_id"]))
    index = dataset.index.iloc[positions].reset_index(drop=True)
    index = index.assign(label=index[run.label_column])
    controls: dict[str, Features] = {}
    if config.untrained:
        values = pd.DataFrame(untrained_features(run, dataset, positions)).add_prefix("feature ")
        controls[UNTRAINED] = _as_features(index, values, config.preparation)
    data = AuditData(str(path), run.label_column, index, run.class_names, None, controls)
    return data, run, dataset, manifest["part"].to_numpy()


def untrained_features(
    run: Run, dataset: Dataset, positions: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "n d"]:
    """Compute the features of the run's network before training, with the same input."""
    placement = choose_placement("auto")
    # The default has no pretrained weights, so all layers have random initial values.
    recipe = dataclasses.replace(run.recipe, transfer=TransferConfig())
    channels = count_input_channels(dataset, recipe.input)
    model, _ = create_network(recipe, channels, run.class_names)
    graphdef, params, stats = split_model(model)
    state = placement.replicate({"params": params, "stats": stats})
    network = Network(run, {"epoch": 0}, placement, BATCH_SIZE, graphdef, state)
    return network.apply_to_dataset(dataset, positions).features


def _as_features(index: pd.DataFrame, values: pd.DataFrame, preparation: Preparation) -> Features:
    from perturbjax.profiles.table_steps import as_table

    profiles = Profiles(index, values.to_numpy(np.float32), tuple(map(str, values.columns)))
    negcon = index["negcon"] if "negcon" in index.columns else np.zeros(len(index), dtype=bool)
    return Features(as_table(profiles, np.asarray(negcon)), preparation)
