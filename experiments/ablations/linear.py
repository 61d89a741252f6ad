"""Variants of preset `linear`: features, plate normalization, and the scale of components.

    perturbjax features --data DIR --backbone cellprofiler --out cellprofiler.parquet
    python -m experiments.ablation --ablation linear --data DIR --out runs/linear \
        --measurements cellprofiler.parquet

The training plates of every outer fold are split into three inner folds. Each variant is fitted on
two of them and evaluated on the third. Test plates of the outer folds are not used.

Cost: not recorded; features are extracted once per image size and number of views. Result: the
settings of `reference` were chosen on these folds. Their score on the outer folds of BBBC021 is
0.723 (accuracy) and 0.652 (balanced accuracy); docs/presets.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from experiments.ablation import Config
from experiments.ablations.inner_folds import inner_folds, score
from perturbjax.core.config import LINEAR_VARIANCE
from perturbjax.core.errors import InputError
from perturbjax.core.progress import track
from perturbjax.profiles.classifiers import CLASSIFIERS
from perturbjax.profiles.control_relative import GROUP
from perturbjax.profiles.preparation import preparation
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import (
    CLASSIFY_PRESETS,
    Preparation,
    ProfileConfig,
    SourceConfig,
)
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import STATISTIC, Profiles
from perturbjax.profiles.table_steps import as_table


@dataclass(frozen=True)
class Variant:
    """Changes of preset `linear`.

    Attributes:
        preparation: fields of `Preparation`.
        source: fields of `SourceConfig`.
        statistics: use the statistics of the index (intensities, cell count, cell area).
        measurements: CellProfiler features: not used, next to those of the network, or in place of
            them.
    """

    preparation: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    statistics: bool = True
    measurements: Literal["none", "joined", "only"] = "none"


REFERENCE = "reference"
_VARIANTS = {
    REFERENCE: Variant(),
    "last layer, 224 pixels": Variant(source={"pool": "last", "augmentations": 1}),
    "one view": Variant(source={"augmentations": 1}),
    "eight views": Variant(source={"augmentations": 8}),
    "CellProfiler": Variant(measurements="only"),
    "EfficientNet-Lite0 and CellProfiler": Variant(measurements="joined"),
    "EfficientNet-Lite2": Variant(source={"backbone": "efficientnet_lite2"}),
    "stages, 224 pixels": Variant(source={"size": 224, "augmentations": 1}),
    # Fields of more than 128 pixels, see `SourceConfig.unit`.
    "whole sites, 224 pixels": Variant(source={"unit": "site"}),
    "whole sites, 512 pixels": Variant(source={"unit": "site", "size": 512, "augmentations": 1}),
    "tiles": Variant(source={"unit": "tile"}),
    "cells, median": Variant(source={"summary": "median"}),
    "cells, mean and standard deviation": Variant(source={"summary": "mean-std"}),
    "all cells": Variant(source={"max_cells": 0}),
    "relative to plate mean": Variant({"relative": "plate"}),
    "not relative": Variant({"relative": "none"}),
    "no statistics": Variant(statistics=False),
    "not relative, no statistics": Variant({"relative": "none"}, statistics=False),
    "components not rescaled": Variant({"pca_variance": 0.0}),
    "variance / 4": Variant({"pca_variance": LINEAR_VARIANCE / 4}),
    "variance x 4": Variant({"pca_variance": LINEAR_VARIANCE * 4}),
}
VARIANTS = tuple(_VARIANTS)
#: Steps of the preparation that differ between variants. They are the last ones.
VARIED_STEPS = ("balance", "relative", "array")


def run(options: Config) -> Iterator[dict[str, object]]:
    """Evaluate the variants on all inner folds; those with the same features together.

    Raises:
        InputError: a variant needs the table of measurements, or this table cannot be used.
    """
    names = options.variants or VARIANTS
    measured = [name for name in names if _VARIANTS[name].measurements != "none"]
    if options.measurements is None:
        if options.variants and measured:
            raise InputError(f"--measurements: is required for variant {measured[0]}")
        names = tuple(name for name in names if name not in measured)
    by_source: dict[str, list[str]] = {}
    for name in names:
        variant = _VARIANTS[name]
        by_source.setdefault(f"{variant.source} {variant.measurements}", []).append(name)
    # Read first, so that an unusable table ends the command before minutes of work.
    measurements = None if options.measurements is None else read_profiles([options.measurements])
    for group in by_source.values():
        yield from _evaluate(options, group, measurements)


def _evaluate(
    options: Config, names: list[str], measurements: Profiles | None
) -> Iterator[dict[str, object]]:
    """Evaluate variants with the same features."""
    preset: Preparation = CLASSIFY_PRESETS["linear"]["preparation"]
    source = CLASSIFY_PRESETS["linear"]["source"] | _VARIANTS[names[0]].source
    assert options.data is not None
    profiles, negcon, column = load_profiles(
        ProfileConfig(source=SourceConfig(data=(options.data,), **source))
    )
    use = _VARIANTS[names[0]].measurements
    if measurements is not None and use != "none":
        profiles = _with_measurements(profiles, measurements, options.measurements, use)
    table, labels = as_table(profiles, negcon), pd.factorize(profiles.column(column), sort=True)[0]
    folds = [one for fold in options.folds for one in inner_folds(profiles.metadata, column, fold)]
    tracked = track(folds, total=len(folds), label="inner folds", unit="folds")
    for number, (train, test, groups) in enumerate(tracked):
        common = Pipeline(_steps(preset, varied=False))  # fitted once for all variants
        train_table = common.fit_transform(table.iloc[train].assign(**{GROUP: groups}))
        test_table = common.transform(table.iloc[test].assign(**{GROUP: ""}))
        for name in names:
            variant = _VARIANTS[name]
            x, z = train_table, test_table
            if not variant.statistics:
                x, z = _drop_statistics(x), _drop_statistics(z)
            changed = dataclasses.replace(preset, **variant.preparation)
            steps = Pipeline(_steps(changed, varied=True))
            x = steps.fit_transform(x, labels[train])
            classes = len(np.unique(labels[train]))
            model = CLASSIFIERS["logistic_balanced"].make(len(train), classes, 0)
            predicted = model.fit(x, labels[train]).predict(steps.transform(z))
            yield {"variant": name, "fold": number, **score(labels[test], predicted)}


def _with_measurements(
    profiles: Profiles, measured: Profiles, file: Path | None, use: str
) -> Profiles:
    """Add the measurements of a table, or replace all features but statistics by them.

    Sites without cells have no measurements and get the medians of all sites.
    """
    rows = pd.Index(measured.metadata["site_id"]).get_indexer(profiles.metadata["site_id"])
    if (missing := profiles.metadata["site_id"][rows < 0]).any():
        raise InputError(f"--measurements {file}: has no row of site {missing.iloc[0]}")
    if use == "only":
        network = [name for name in profiles.names if not name.startswith(STATISTIC)]
        profiles = profiles.drop_features(network)
    values = pd.DataFrame(measured.values)
    values = values.fillna(values.median()).to_numpy()[rows]
    return dataclasses.replace(
        profiles,
        values=np.concatenate([profiles.values, values], axis=1),
        names=(*profiles.names, *measured.names),
    )


def _steps(config: Preparation, *, varied: bool) -> list[tuple[str, BaseEstimator]]:
    """Select the steps of a preparation that differ between variants, or the common ones."""
    return [
        (name, step) for name, step in preparation(config).steps if (name in VARIED_STEPS) == varied
    ]


def _drop_statistics(table: pd.DataFrame) -> pd.DataFrame:
    return table[[name for name in table.columns if not name.startswith(STATISTIC)]]
