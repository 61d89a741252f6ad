"""Training, from a dataset directory to a run directory. Read `fit` from top to bottom: it is the method section."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pandas as pd
import tyro
from jaxtyping import Int

from perturbjax.config import Recipe, check
from perturbjax.console import InputError, console, track
from perturbjax.dataset import SiteDataset, open_dataset
from perturbjax.feed import (
    FeedChoice,
    ResidentFeed,
    Sites,
    StreamedFeed,
    choose_feed,
    describe_sites,
    epoch_order,
    gather,
)
from perturbjax.splits import MEANING, TEST, TRAIN, split_for
from perturbjax.training.checkpoint import Checkpoints, state_to_tree, tree_to_state
from perturbjax.training.devices import DeviceKind, Placement, choose_placement, stack_steps, use_compilation_cache
from perturbjax.training.hosts import HostsConfig, connect, from_first, is_first, require_possible
from perturbjax.training.loss import class_weights
from perturbjax.training.phases import Phase, create_network, plan_phases
from perturbjax.training.predict import accuracy_and_loss, predict_sites
from perturbjax.training.profile import TRACED_STEPS, trace_steps
from perturbjax.training.run import Run, describe_run, open_run, start_run
from perturbjax.training.step import TrainState, initial_state, make_predict_step, make_train_step, split_model


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on a prepared dataset."""

    out: Path
    """Run directory to write. Where it holds an unfinished run of the same flags, that run goes on."""
    data: Path | None = None
    """Dataset directory, from `python -m data_prep build`."""
    resume: bool = False
    """Go on with the run in --out by the recipe saved in it; flags of the recipe are ignored."""
    init_from: Path | None = None
    """Run whose parameters are started from; layers of another shape (another number of classes) start anew."""
    feed: FeedChoice = "auto"
    """resident: the whole dataset on the device, one dispatch an epoch. streamed: decoded while the device computes.
    auto: resident where it fits."""
    workers: int = 0
    """Processes that decode for the streamed feed; 0 decodes in threads."""
    devices: DeviceKind = "auto"
    """1: one device. sharded: jit over a mesh of all. pmap: replicated. auto: sharded."""
    device_count: int = 0
    """How many devices at most; 0 takes all."""
    evaluate_every: int = 10
    """Epochs between two looks at the judging sites; the last epoch always looks."""
    checkpoint_every: int = 10
    """Epochs between two checkpoints; the last epoch always saves."""
    keep_latest: int = 2
    """Newest checkpoints kept, to resume from."""
    keep_best: int = 1
    """Checkpoints kept that scored best on the judging sites; a score of these is optimistic."""
    compile_cache: str = "default"
    """Folder that keeps compiled programs between runs; default: the user's cache directory; none: no cache."""
    profile: str = ""
    """Folder for a trace of a few steps (for Perfetto or XProf); where their time went is printed. --profile alone, or
    default: OUT/profile. Training is not changed by it."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


@dataclass(frozen=True)
class Experiment:
    """All that is decided before training: the recipe, who trains, who judges, and the fresh network."""

    recipe: Recipe
    dataset: SiteDataset
    manifest: pd.DataFrame
    label_column: str
    sites: Sites
    train: Int[np.ndarray, " n_train"]
    test: Int[np.ndarray, " n_test"]
    graphdef: Any
    params: Any
    stats: Any
    pretrained: dict[str, Any] | None
    """Where published weights in the network came from."""

    @property
    def class_names(self) -> list[str]:
        return list(self.sites.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.recipe.optim.batch_size)


def fit(config: TrainConfig) -> Run:
    """Train, or go on training, until the recipe's last epoch.

    A run that was killed goes on from its latest checkpoint and ends with bit-identical parameters: order and
    augmentation follow from (seed, epoch, record) alone.

    Raises:
        InputError: the input cannot be used, `out` holds another run, or the loss stopped being finite.
    """
    connect(config.hosts)
    use_compilation_cache(config.compile_cache)
    placement = choose_placement(config.devices, config.device_count)
    experiment = prepare_experiment(config)
    recipe = experiment.recipe
    require_possible(config.feed, config.devices, recipe.optim.batch_size)

    phases = plan_phases(recipe, experiment.graphdef, experiment.params, experiment.stats, experiment.steps_per_epoch)
    predict_step = placement.compile_predict(make_predict_step(experiment.graphdef, recipe))
    state = initial_state(experiment.params, experiment.stats, phases[0].optimizer)

    # All input has been checked by now, so that a refusal leaves no directory behind.
    run = describe_run(
        config.out,
        recipe=recipe,
        dataset=experiment.dataset,
        label_column=experiment.label_column,
        class_names=experiment.class_names,
        manifest=experiment.manifest,
        pretrained=experiment.pretrained,
    )
    checkpoints = Checkpoints(run.path, keep_latest=config.keep_latest, keep_best=config.keep_best)
    from_first(lambda: start_run(run, experiment.manifest), like=None)
    state, done = from_first(lambda: _resume(run, checkpoints, state), like=(state, 0))
    _say_what_runs(experiment, placement, phases, done)
    if done == recipe.optim.epochs:
        return run
    state = placement.replicate(state)
    feed = make_feed(config.feed, experiment, placement, workers=config.workers)

    phase, epochs = None, range(done, recipe.optim.epochs)
    for epoch in track(epochs, total=recipe.optim.epochs, done=done, label="train", unit="epochs"):
        started = time.monotonic()
        if phase is None or epoch == phase.stop:
            phase = next(p for p in phases if epoch < p.stop)
            run_epoch = _epoch_runner(feed, experiment, placement, phase)
        if epoch == phase.first:
            state = placement.replicate(state._replace(opt_state=phase.optimizer.init(state.params)))
        if config.profile and epoch == done:
            folder = run.path / "profile" if config.profile == "default" else Path(config.profile)
            steps = min(TRACED_STEPS, experiment.steps_per_epoch)
            trace_steps(functools.partial(run_epoch, epoch=epoch, steps=steps), state, folder, steps)
        state, sums = run_epoch(state, epoch)
        sums = jax.device_get(sums)
        _require_finite(sums.loss, epoch, experiment.steps_per_epoch, run)
        row = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * experiment.steps_per_epoch,
            "split": TRAIN,
            "loss": float(sums.loss.sum() / sums.loss_weight.sum()),
            "accuracy": float(sums.correct.sum() / sums.weight.sum()),
            "learning_rate": float(phase.learning_rate(int(state.step) - phase.first * experiment.steps_per_epoch - 1)),
            "seconds": round(time.monotonic() - started, 3),
        }
        rows, accuracy = [row], None
        last = epoch + 1 == recipe.optim.epochs
        if last or (epoch + 1) % config.evaluate_every == 0:
            answers = predict_sites(
                predict_step,
                state.params,
                state.stats,
                feed,
                experiment.test,
                recipe.optim.batch_size,
                multiple=placement.count if placement.processes > 1 else 1,
            )
            accuracy, loss = accuracy_and_loss(answers.probabilities, experiment.sites.labels[experiment.test])
            rows.append({**row, "split": TEST, "loss": loss, "accuracy": accuracy})
            _say_epoch(rows)
        if not is_first():  # of several processes one writes
            continue
        # Metrics before the checkpoint: a kill between the two leaves rows that resuming drops, never a gap.
        run.append_metrics(rows)
        if last or accuracy is not None or (epoch + 1) % config.checkpoint_every == 0:
            facts = {"split_fingerprint": run.facts["split_fingerprint"], "classes": run.class_names}
            checkpoints.save(state, epoch=epoch + 1, facts=facts, accuracy=accuracy)
    checkpoints.close()
    feed.close()
    return run


def prepare_experiment(config: TrainConfig) -> Experiment:
    """Open the data, deal the split and initialise the network; nothing is written."""
    if config.resume:
        run = open_run(config.out)
        recipe, dataset, label_column = run.recipe, run.open_data(config.data), run.label_column
        manifest = run.manifest(dataset.index)
    else:
        if config.data is None:
            raise InputError("--data: is required; give the dataset directory that `python -m data_prep build` wrote")
        recipe, dataset = config.recipe, open_dataset(config.data)
        check(recipe)
        label_column = dataset.column(recipe.input.label_column or dataset.label_column).name
        manifest = split_for(dataset.index, recipe.split, label=label_column, seed=recipe.seed)
    labels = dataset.index.set_index("site_id").loc[manifest["site_id"], label_column].astype(str)
    class_names = sorted(labels.unique())
    model, pretrained = create_network(recipe, dataset, class_names)
    graphdef, params, stats = split_model(model)
    if config.init_from is not None:
        params, stats = _parameters_from(config.init_from, params, stats)
    train, test = (positions_of(dataset, manifest, part) for part in (TRAIN, TEST))
    return Experiment(
        recipe=recipe,
        dataset=dataset,
        manifest=manifest,
        label_column=label_column,
        sites=describe_sites(dataset, recipe.input, class_names, seed=recipe.seed),
        train=train,
        test=test,
        graphdef=graphdef,
        params=params,
        stats=stats,
        pretrained=pretrained,
    )


def positions_of(dataset: SiteDataset, manifest: Any, part: str) -> Int[np.ndarray, " n"]:
    """Positions in the dataset of the sites of one part of a split."""
    sites = set(manifest.loc[manifest["part"] == part, "site_id"])
    return np.flatnonzero(dataset.index["site_id"].isin(sites)).astype(np.int32)


def make_feed(
    choice: FeedChoice, experiment: Experiment, placement: Placement, *, workers: int
) -> ResidentFeed | StreamedFeed:
    """The feed of an experiment, resident on every device or streamed."""
    dataset, sites, recipe = experiment.dataset, experiment.sites, experiment.recipe
    if placement.processes == 1 and choose_feed(dataset, recipe.input, choice, augment=recipe.augment) == "resident":
        return ResidentFeed(dataset, sites, recipe.input, augment=recipe.augment, place=placement.replicate)
    return StreamedFeed(
        dataset,
        sites,
        recipe.input,
        records=experiment.train,
        batch_size=recipe.optim.batch_size,
        seed=recipe.seed,
        augment=recipe.augment,
        workers=workers,
        shard=(jax.process_index(), placement.processes),
        place=placement.place_rows,
    )


def _epoch_runner(feed: ResidentFeed | StreamedFeed, experiment: Experiment, placement: Placement, phase: Phase) -> Any:
    """(state, epoch) → (state, sums a step), of the first `steps` of them or of all.

    One dispatch where the data is resident on an accelerator, one a step elsewhere.
    """
    recipe = experiment.recipe
    train_step = make_train_step(
        phase.graphdef,
        phase.optimizer,
        recipe,
        steps_per_epoch=experiment.steps_per_epoch,
        class_weight=_class_weight(experiment),
        axis_name=placement.axis_name,
    )
    if isinstance(feed, ResidentFeed):
        run_steps = placement.compile_epoch(train_step, gather)

        def run_resident(state: TrainState, epoch: int, steps: int | None = None) -> tuple[TrainState, Any]:
            order, weight = epoch_order(recipe.seed, epoch, experiment.train, recipe.optim.batch_size)
            return run_steps(state, feed.arrays, order[:steps], weight[:steps])

        return run_resident
    step = placement.compile_step(train_step)

    def run_streamed(state: TrainState, epoch: int, steps: int | None = None) -> tuple[TrainState, Any]:
        sums = []
        for batch in itertools.islice(feed.epoch(epoch), steps):
            state, step_sums = step(state, batch)
            sums.append(step_sums)
        return state, stack_steps(sums)

    return run_streamed


def _resume(run: Run, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, int]:
    """The state to go on from and the epochs it has behind it."""
    if not checkpoints.epochs():
        run.truncate_metrics(0)
        return state, 0
    tree, facts = checkpoints.load()
    if facts["split_fingerprint"] != run.facts["split_fingerprint"]:
        raise InputError(f"{checkpoints.path}: was trained on another split than {run.path} says; start a new --out")
    run.truncate_metrics(facts["epoch"])
    return tree_to_state(tree, state, checkpoints.path), facts["epoch"]


def _parameters_from(path: Path, params: Any, stats: Any) -> tuple[Any, Any]:
    """Parameters and statistics of another run; what has another shape here keeps its fresh value."""
    template = {"params": params, "stats": stats}
    fresh = state_to_tree(template)
    tree, _ = Checkpoints(path).load()
    taken = {k: tree[k] if k in tree and tree[k].shape == v.shape else v for k, v in fresh.items()}
    anew = [k for k, v in fresh.items() if taken[k] is v]
    if len(anew) == len(fresh):
        raise InputError(f"--init-from {path}: shares no array with this model")
    console.print(f"started from {path}" + (f"; fresh: {', '.join(anew)}" if anew else ""))
    merged = tree_to_state(taken, template, path)
    return merged["params"], merged["stats"]


def _class_weight(experiment: Experiment) -> np.ndarray | None:
    power = experiment.recipe.optim.balance
    if not power:
        return None
    counts = np.bincount(experiment.sites.labels[experiment.train], minlength=len(experiment.class_names))
    return class_weights(counts, power)


def _require_finite(losses: np.ndarray, epoch: int, steps_per_epoch: int, run: Run) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        step = epoch * steps_per_epoch + int(bad[0]) + 1
        raise InputError(
            f"the loss is not finite at step {step} (epoch {epoch + 1}); the last good checkpoint stays in {run.path}. "
            "Lower --learning-rate, or try --precision float32, in a new --out"
        )


def _say_what_runs(experiment: Experiment, placement: Placement, phases: list[Phase], done: int) -> None:
    recipe, policy = experiment.recipe, experiment.recipe.split
    device = placement.mesh.devices.flat[0]
    console.print(
        f"{recipe.model.model} on {placement.count} {device.platform} device(s), {recipe.model.precision}; "
        f"{len(experiment.train)} sites train, {len(experiment.test)} judge, {len(experiment.class_names)} classes "
        f"of {experiment.label_column}"
    )
    if experiment.pretrained is not None:
        moves = "; ".join(f"epochs {phase.first + 1} to {phase.stop}: {phase.name}" for phase in phases)
        console.print(
            f"weights from {experiment.pretrained['source']} (SHA-256 {experiment.pretrained['sha256'][:12]}…)"
        )
        console.print(f"{moves} move")
    if policy.split_file:
        console.print(f"split from {policy.split_file}")
    else:
        console.print(f"split by {policy.split}: {MEANING[policy.split]}")
    if done:
        console.print(f"going on after epoch {done} of {recipe.optim.epochs}")


def _say_epoch(rows: list[dict[str, Any]]) -> None:
    train, test = rows
    console.print(
        f"epoch {train['epoch']}: train loss {train['loss']:.3f}, accuracy {train['accuracy']:.3f}; "
        f"judged loss {test['loss']:.3f}, accuracy {test['accuracy']:.3f}; rate {train['learning_rate']:.2e}"
    )
