"""A run's recipe trained anew on every fold of an audit: the network itself under every split."""

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

#: Where in the audit's folder the runs are kept; one that is finished is not trained again.
RUNS = "runs"


def answers(
    material: AuditData, dataset: Dataset, run: Run, dealt: tuple[SplitDesign, ...], out: Path
) -> Iterator[tuple[SplitDesign, int, Float[np.ndarray, "n classes"]]]:
    """Each split and fold, and the probabilities that a network trained on it gives to the sites it judges.

    Everything of the recipe stays (its seed too) but the split, which comes from a file. A run of `out` that was
    stopped goes on, so that an audit may be killed and started again. Beside each run its predictions are written.

    Args:
        material: the run's sites.
        dataset: what they are of.
        run: whose recipe is trained.
        dealt: splits of the material's rows.
        out: the audit's folder.

    Raises:
        InputError: `out` holds runs of another recipe or split, or a training's loss stopped being finite.
    """
    total = sum(len(one.folds) for one in dealt)
    jobs = [(one, fold) for one in dealt for fold in range(len(one.folds))]
    for number, (one, fold) in enumerate(jobs, start=1):
        console.print(
            f"audit: training {number} of {total}, {one.policy} split, fold {fold + 1} of {len(one.folds)}"
        )
        yield one, fold, _train_and_ask(material, dataset, run, one, fold, make_folder(out / RUNS))


def _train_and_ask(
    material: AuditData, dataset: Dataset, run: Run, dealt: SplitDesign, fold: int, folder: Path
) -> Float[np.ndarray, "n classes"]:
    name = f"{dealt.policy}_{fold}"
    split = folder / f"{name}.parquet"
    write_split(_manifest(material.index, dealt, fold), split)
    recipe = dataclasses.replace(
        run.recipe,
        input=dataclasses.replace(run.recipe.input, label_column=run.label_column),
        split=SplitConfig(split_file=str(split)),
    )
    epochs = recipe.optim.epochs
    trained = fit(
        TrainConfig(out=folder / name, data=dataset.paths, recipe=recipe, evaluate_every=epochs)
    )
    network = load_network(trained, dataset=dataset)
    judged = material.index["site_id"].to_numpy()[dealt.folds[fold][1]]
    found: Float32[np.ndarray, "n known"] = network.apply_to_dataset(
        dataset, dataset.positions(list(judged))
    ).probabilities
    rows = material.index.iloc[dealt.folds[fold][1]]
    table = predictions_table(rows, found, network.class_names, part=TEST, label=rows["label"])
    write_predictions(folder / f"{name}.predictions.parquet", table)
    every = np.zeros((len(found), len(material.class_names)), found.dtype)
    every[:, [material.class_names.index(one) for one in network.class_names]] = found
    return every


def _manifest(index: pd.DataFrame, dealt: SplitDesign, fold: int) -> pd.DataFrame:
    """A fold as `perturbjax split` writes one; sites that cannot be judged are in neither part."""
    train, test = dealt.folds[fold]
    rows = np.concatenate([train, test])
    part = np.repeat([TRAIN, TEST], [len(train), len(test)])
    groups = assign_groups(index, dealt.policy)[rows]
    return pd.DataFrame(
        {"site_id": index["site_id"].to_numpy()[rows], "group": groups, "part": part}
    )
