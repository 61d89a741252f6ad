"""Train a run's recipe on every fold of an audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32

from perturbjax.audit.audit_inputs import AuditData
from perturbjax.audit.split_designs import SplitDesign
from perturbjax.core.config import SplitConfig
from perturbjax.core.files import make_folder
from perturbjax.core.messages import console
from perturbjax.data.splits import TEST, TRAIN, assign_groups, write_split
from perturbjax.dataset import Dataset
from perturbjax.evaluation.predictions import predictions_table, write_predictions
from perturbjax.inference import load_network
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import Run

#: Folder of the trained runs in the audit's folder.
RUNS = "runs"


def train_and_predict_folds(
    data: AuditData, dataset: Dataset, run: Run, designs: tuple[SplitDesign, ...], out: Path
) -> Iterator[tuple[SplitDesign, int, Float[np.ndarray, "n classes"]]]:
    """Train the recipe on every fold of every split, and predict the test sites.

    The recipe is unchanged (including its seed) except for the split. Finished runs in `out` are
    reused and interrupted runs are resumed. Predictions are written next to each run.

    Args:
        data: sites of the run.
        dataset: their images.
        run: run directory with the recipe.
        designs: splits of the sites.
        out: folder of the audit.

    Yields:
        Split, fold number and probabilities of the test sites.

    Raises:
        InputError: `out` contains runs of another recipe or split, or a training diverged.
    """
    jobs = [(design, fold) for design in designs for fold in range(len(design.folds))]
    for number, (design, fold) in enumerate(jobs, start=1):
        console.print(
            f"Training network {number}/{len(jobs)}: {design.policy} split, fold {fold + 1} of "
            f"{len(design.folds)}"
        )
        folder = make_folder(out / RUNS)
        yield design, fold, _train_and_predict(data, dataset, run, design, fold, folder)


def _train_and_predict(
    data: AuditData, dataset: Dataset, run: Run, design: SplitDesign, fold: int, folder: Path
) -> Float[np.ndarray, "n classes"]:
    name = f"{design.policy}_{fold}"
    split = folder / f"{name}.parquet"
    write_split(_manifest(data.index, design, fold), split)
    # An empty label column would mean that of the dataset, so the one of the run is written.
    recipe = dataclasses.replace(
        run.recipe,
        input=dataclasses.replace(run.recipe.input, label_column=run.label_column),
        split=SplitConfig(split_file=str(split)),
    )
    epochs = recipe.optim.epochs
    # The test set is not needed during training, so it is evaluated at the last epoch only.
    trained = fit(
        TrainConfig(out=folder / name, data=dataset.paths, recipe=recipe, evaluate_every=epochs)
    )
    network = load_network(trained, dataset=dataset)
    rows = data.index.iloc[design.folds[fold][1]]
    positions = dataset.positions(list(rows["site_id"]))
    own: Float32[np.ndarray, "n own"] = network.apply_to_dataset(dataset, positions).probabilities
    table = predictions_table(rows, own, network.class_names, part=TEST, label=rows["label"])
    write_predictions(folder / f"{name}.predictions.parquet", table)
    # Classes without training sites in this fold get probability 0.
    probabilities = np.zeros((len(own), len(data.class_names)), own.dtype)
    probabilities[:, [data.class_names.index(one) for one in network.class_names]] = own
    return probabilities


def _manifest(index: pd.DataFrame, design: SplitDesign, fold: int) -> pd.DataFrame:
    """Split manifest of a fold; excluded sites are in neither part."""
    train, test = design.folds[fold]
    rows = np.concatenate([train, test])
    part = np.repeat([TRAIN, TEST], [len(train), len(test)])
    groups = assign_groups(index, design.policy)[rows]
    return pd.DataFrame(
        {"site_id": index["site_id"].to_numpy()[rows], "group": groups, "part": part}
    )
