"""Visibility of shape and texture at native resolution and in shrunk fields.

    python -m experiments.simulated_plates --out runs/simulated --units large_fields --plates 3 \
        --aspects shape texture
    python -m experiments.resolution --simulated runs/simulated --out runs/resolution

A simulation states the true traits of every well. A ridge regression predicts them from features of
preset `linear` with different inputs. It is fitted on all plates except one and evaluated on that
plate. R² is relative to the mean of the plate: 1 if features determine the trait, 0 if they contain
nothing about it. This needs fewer wells than a classification of compounds, because
every well has its own trait values. Intervals are 95 %, from bootstrap samples of wells.

Cost: extraction of the features, 40 s per dataset and input. Result: R² of texture 0.99 with cells
and 0.90 with shrunk fields, of shape 0.71 and 0.70; docs/presets.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep.simulate.layout import ASPECTS
from data_prep.simulate.plate import SimulateConfig, plan
from experiments.runs import check_names, markdown, write_table
from experiments.simulated_plates import SITES, SIZES
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import read_json
from perturbjax.core.options import require, require_output, require_sound
from perturbjax.dataset import PLATE, WELL
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import CLASSIFY_PRESETS, ProfileConfig, SourceConfig

#: Fields of `SourceConfig` that differ from preset `linear`.
INPUTS = {
    "shrunk to 224 pixels": {"unit": "site", "size": 224},
    "shrunk to 512 pixels": {"unit": "site", "size": 512, "augmentations": 1},
    "tiles": {"unit": "tile"},
    "64 cells, mean": {"unit": "cell"},
    "64 cells, median": {"unit": "cell", "summary": "median"},
    "64 cells, mean and standard deviation": {"unit": "cell", "summary": "mean-std"},
    "256 cells, mean": {"unit": "cell", "max_cells": 256},
}
COMPONENTS = 32
PENALTIES = np.logspace(-2, 5, 15)


@dataclass(frozen=True)
class Config:
    simulated: Path
    """Folder written by experiments.simulated_plates with --units large_fields."""
    out: Path
    """Folder for scores."""
    aspects: tuple[str, ...] = ("shape", "texture")
    """Aspects of the datasets."""
    inputs: tuple[str, ...] = ()
    """Inputs of the network; all by default."""
    replicates: int = 1000
    """Bootstrap samples of each interval."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("replicates", self.replicates, self.replicates >= 1, "at least one")


def main(options: Config) -> None:
    """Evaluate every input on every dataset; write and print the table after each."""
    check_names("--inputs", options.inputs, tuple(INPUTS))
    check_names("--aspects", options.aspects, tuple(ASPECTS))
    rows: list[dict[str, object]] = []
    for aspect in options.aspects:
        for name in options.inputs or INPUTS:
            rows.append({"aspect": aspect, "input": name, **evaluate(options, aspect, name)})
            table = pd.DataFrame(rows)
            write_table(table, markdown(table) + "\n", options.out)
    print((options.out / "scores.md").read_text())


def evaluate(options: Config, aspect: str, name: str) -> dict[str, object]:
    """Return R² with its interval, averaged over the traits of an aspect."""
    started = time.process_time()
    source = CLASSIFY_PRESETS["linear"]["source"] | INPUTS[name] | {"statistics": False}
    data = options.simulated / f"large_fields_{aspect}"
    profiles, _, _ = load_profiles(ProfileConfig(source=SourceConfig(data=(data,), **source)))
    seconds = time.process_time() - started
    truth = read_truth(options.simulated / "plates" / data.name)
    traits = profiles.metadata[[PLATE, WELL]].merge(truth, how="left", validate="one_to_one")
    targets = np.log(traits[list(ASPECTS[aspect])].to_numpy())
    plates = traits[PLATE].to_numpy()
    residuals, deviations = predict_traits(profiles.values, targets, plates)
    low, high = interval(residuals, deviations, options.replicates)
    return {
        "R²": f"{r_squared(residuals, deviations):.2f}",
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "features": profiles.values.shape[1],
        "processor s": f"{seconds:.0f}",
    }


def read_truth(plates: Path) -> pd.DataFrame:
    """Compute the traits of all wells again, from the settings of the simulation.

    Returns:
        One row per well: plate, well, and all traits in their own units.

    Raises:
        InputError: the folder is not a simulation of large fields.
    """
    settings = plates / "truth/settings.json"
    if not settings.is_file():
        raise InputError(f"{settings}: does not exist. Run experiments.simulated_plates first")
    stored = read_json(settings)
    fields = SimulateConfig.__dataclass_fields__
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    config = SimulateConfig(
        out=plates, **{k: v for k, v in values.items() if k in fields and k != "out"}
    )
    if (config.sites, config.size) != (SITES["large_fields"], SIZES["large_fields"]):
        raise InputError(f"{plates}: must have one field of 1080 pixels per well")
    return plan(config)


def predict_traits(
    features: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "n t"],
    plates: Shaped[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "n t"], Float[np.ndarray, "n t"]]:
    """Predict the traits of each plate from the other plates.

    Features and targets are centered on every plate, because plates differ in staining.

    Returns:
        Squared errors of the prediction, and squared deviations from the mean of the plate.
    """
    x, y = center(features, plates), center(targets, plates)
    errors = np.empty_like(y)
    for plate in np.unique(plates):
        test = plates == plate
        model = make_pipeline(StandardScaler(), PCA(COMPONENTS, random_state=0), RidgeCV(PENALTIES))
        errors[test] = (model.fit(x[~test], y[~test]).predict(x[test]) - y[test]) ** 2
    return errors, y**2


def center(
    values: Float[np.ndarray, "n d"], plates: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Subtract the mean of the plate."""
    means = pd.DataFrame(values).groupby(plates).transform("mean").to_numpy()
    return values - means


def r_squared(errors: Float[np.ndarray, "n t"], deviations: Float[np.ndarray, "n t"]) -> float:
    """Return 1 - sum of errors / sum of deviations, averaged over traits."""
    return float(np.mean(1 - errors.sum(axis=0) / deviations.sum(axis=0)))


def interval(
    errors: Float[np.ndarray, "n t"], deviations: Float[np.ndarray, "n t"], replicates: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of R² over bootstrap samples of wells."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(errors), (replicates, len(errors)))
    values = [r_squared(errors[rows], deviations[rows]) for rows in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))
