"""A run's network applied to a dataset: predictions as a table, and the judgement of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from perturbjax.console import InputError, console
from perturbjax.dataset import SiteDataset, open_dataset
from perturbjax.evaluation.judge import evaluate_predictions
from perturbjax.evaluation.retrieval import COMPOUND, evaluate_retrieval
from perturbjax.feed import FeedChoice, ResidentFeed, StreamedFeed, choose_feed, describe_sites
from perturbjax.files import atomic, make_folder
from perturbjax.splits import TEST, TRAIN
from perturbjax.training.checkpoint import Checkpoints, Which, tree_to_state
from perturbjax.training.devices import DeviceKind, choose_placement, use_compilation_cache
from perturbjax.training.hosts import HostsConfig, connect, is_first, require_possible
from perturbjax.training.phases import create_network
from perturbjax.training.predict import Predictions, predict_sites
from perturbjax.training.run import Run, open_run
from perturbjax.training.step import make_predict_step, split_model

EVALUATION, PREDICTIONS, FEATURES = "evaluation", "predictions.parquet", "features.parquet"


@dataclass(frozen=True)
class ApplyConfig:
    """Which checkpoint is applied, and on what."""

    run: Path
    """Run directory, as `perturbjax train` writes it."""
    checkpoint: Which = "latest"
    """latest: after the last epoch. best: the most accurate on the judging sites, whose score is optimistic."""
    epoch: int = 0
    """Apply the checkpoint of this epoch; 0 takes the newest, or the best."""
    batch_size: int = 128
    """Sites a step."""
    feed: FeedChoice = "auto"
    """resident: the whole dataset on the device. streamed: decoded while the device computes."""
    devices: DeviceKind = "auto"
    """1: one device. sharded, auto, pmap: all."""
    hosts: HostsConfig = field(default_factory=HostsConfig)


@dataclass(frozen=True)
class PredictConfig:
    """Predict the sites of any dataset with a trained run."""

    apply: ApplyConfig
    data: Path
    """Dataset directory; its channels must be those the run was trained on."""
    out: Path
    """Parquet to write: Metadata_*, site_id, part, label, predicted, and one probability a class."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a run on its own split."""

    apply: ApplyConfig
    data: Path | None = None
    """Dataset directory; by default the one the run was trained on."""
    replicates: int = 2000
    """Bootstrap resamples of whole wells behind each interval."""


def apply_run(run: Run, dataset: SiteDataset, positions: np.ndarray, config: ApplyConfig) -> Predictions:
    """Probabilities and features of the records at `positions`, without augmentation.

    Several processes each read their share, and all get all answers.

    Raises:
        InputError: the dataset's channels or pixel type are not those the run was trained on, or no checkpoint fits.
    """
    connect(config.hosts)
    require_possible(config.feed, config.devices, config.batch_size)
    use_compilation_cache("default")
    graphdef, state, _ = load_network(run, dataset, config.checkpoint, config.epoch)
    recipe = run.recipe
    placement = choose_placement("sharded" if config.devices in ("auto", "pmap") else config.devices)
    state = placement.replicate(state)
    sites = describe_sites(dataset, recipe.input, run.class_names, seed=recipe.seed)
    feed: ResidentFeed | StreamedFeed
    alone = placement.processes == 1
    if alone and choose_feed(dataset, recipe.input, config.feed, augment=recipe.augment) == "resident":
        feed = ResidentFeed(dataset, sites, recipe.input, augment=recipe.augment, place=placement.replicate)
    else:
        feed = StreamedFeed(
            dataset,
            sites,
            recipe.input,
            records=positions,
            batch_size=config.batch_size,
            seed=recipe.seed,
            augment=recipe.augment,
            shard=(jax.process_index(), placement.processes),
            place=placement.place_rows,
        )
    step = placement.compile_predict(make_predict_step(graphdef, recipe))
    multiple = 1 if alone else placement.count
    return predict_sites(step, state["params"], state["stats"], feed, positions, config.batch_size, multiple=multiple)


def load_network(
    run: Run, dataset: SiteDataset, checkpoint: Which = "latest", epoch: int = 0
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A run's network: graph definition, {"params", "stats"}, and the checkpoint's facts.

    Raises:
        InputError: the dataset's channels or pixel type are not those the run was trained on, or no checkpoint fits.
    """
    _require_fitting(run, dataset)
    recipe = run.recipe
    model, _ = create_network(recipe, dataset, run.class_names, run.facts.get("pretrained"))
    graphdef, params, stats = split_model(model)
    checkpoints = Checkpoints(run.path)
    tree, facts = checkpoints.load(checkpoint, epoch or None)
    checkpoints.close()
    wanted = ("params/", "stats/")
    tree = {name: value for name, value in tree.items() if name.startswith(wanted)}
    state = tree_to_state(tree, {"params": params, "stats": stats}, run.path)
    console.print(f"{run.path}: checkpoint of epoch {facts['epoch']} ({checkpoint})")
    return graphdef, state, facts


def predictions_table(run: Run, index: pd.DataFrame, probabilities: np.ndarray, part: Any) -> pd.DataFrame:
    """`Metadata_*`, site_id, part, label, predicted, and one `prob_<class>` a class: one row a row of `index`.

    `label` is empty where the index lacks the run's label column.
    """
    names = np.asarray(run.class_names, dtype=object)
    metadata = index[[column for column in index.columns if column.startswith("Metadata_")]].reset_index(drop=True)
    known = run.label_column in index.columns
    answers = pd.DataFrame(
        {
            "site_id": index["site_id"].to_numpy(),
            "part": part,
            "label": index[run.label_column].astype(str).to_numpy() if known else "",
            "predicted": names[probabilities.argmax(axis=1)],
        }
    )
    table = pd.DataFrame(probabilities, columns=[f"prob_{name}" for name in run.class_names])
    return pd.concat([metadata, answers, table], axis=1)


def predict(config: PredictConfig) -> Path:
    """Predict every site of a dataset, known to the run or not, and write the table (parquet).

    Of several processes the first writes.

    Raises:
        InputError: the run or dataset cannot be used, they do not fit, or --out cannot be written.
    """
    run, dataset, out = open_run(config.apply.run), open_dataset(config.data), config.out
    make_folder(out.parent)
    answers = apply_run(run, dataset, np.arange(len(dataset)), config.apply)
    if not is_first():
        return out
    part = run.parts(dataset.index["site_id"])
    with atomic(out) as temporary:
        predictions_table(run, dataset.index, answers.probabilities, part).to_parquet(temporary, index=False)
    console.print(f"{len(dataset)} sites predicted: {out}")
    return out


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Judge a run on its own split: write `evaluation/` (predictions, features, scores, tables) and return the scores.

    Of several processes the first judges and writes; the others return None.

    Raises:
        InputError: the run or its dataset cannot be used.
    """
    run = open_run(config.apply.run)
    dataset = run.open_data(config.data)
    manifest = run.manifest(dataset.index)
    index = dataset.index.set_index("site_id", drop=False).rename_axis(None)
    positions = dataset.index.reset_index().set_index("site_id").loc[manifest["site_id"], "index"].to_numpy()
    answers = apply_run(run, dataset, positions, config.apply)
    if not is_first():
        return None
    rows = index.loc[manifest["site_id"]].reset_index(drop=True)
    part = manifest["part"].to_numpy()
    table = predictions_table(run, rows, answers.probabilities, part)

    out = make_folder(run.path / EVALUATION)
    with atomic(out / PREDICTIONS) as temporary:
        table.to_parquet(temporary, index=False)
    features = features_table(run, rows, part, answers.features)
    with atomic(out / FEATURES) as temporary:
        features.to_parquet(temporary, index=False)
    replicates_of = COMPOUND if COMPOUND in rows.columns else run.label_column
    evaluate_retrieval(features[part == TEST], out, label_column=replicates_of)
    rows = rows.assign(label=table["label"])
    policy = run.recipe.split.split_file or run.recipe.split.split
    return evaluate_predictions(
        table,
        train_index=rows[part == TRAIN],
        test_index=rows[part == TEST],
        class_names=run.class_names,
        split_policy=policy,
        out=out,
        seed=run.recipe.seed,
        replicates=config.replicates,
    )


def features_table(run: Run, index: pd.DataFrame, part: np.ndarray, features: np.ndarray) -> pd.DataFrame:
    """`Metadata_*` (site and part among them) first, then one column a feature of the network."""
    metadata = index[[column for column in index.columns if column.startswith("Metadata_")]]
    metadata = metadata.assign(Metadata_site_id=index["site_id"], Metadata_part=part).reset_index(drop=True)
    names = [f"{run.recipe.model.model}_{number:04d}" for number in range(features.shape[1])]
    return pd.concat([metadata, pd.DataFrame(features, columns=names)], axis=1)


def _require_fitting(run: Run, dataset: SiteDataset) -> None:
    for what, here in (("channels", dataset.channel_names), ("image_dtype", str(dataset.image_dtype))):
        trained = run.facts[what]
        if trained is not None and trained != here:  # an imported network does not know
            raise InputError(
                f"{dataset.path}: {what} is {here}, {run.path} was trained on {trained}; build the dataset alike"
            )
