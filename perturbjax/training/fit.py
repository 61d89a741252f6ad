"""Training, from a dataset directory to a run directory; see `fit`."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.memory import release_freed_memory
from perturbjax.core.messages import console
from perturbjax.core.options import (
    optional_value,
    python_only,
    require,
    require_output,
    require_sound,
)
from perturbjax.core.progress import track
from perturbjax.data.batches import BatchPipeline, PipelineChoice, open_batches
from perturbjax.data.splits import TEST, TRAIN, VALIDATION
from perturbjax.training.apply_network import SiteScores, apply_to_sites, score_sites
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.devices import ComputeConfig, Placement, open_devices, stack_steps
from perturbjax.training.ensemble_fit import initialize_ensemble
from perturbjax.training.metric_logs import Log, LogTo, open_log, require_package
from perturbjax.training.phases import Phase, plan_phases
from perturbjax.training.processes import (
    HostsConfig,
    connect,
    is_first_process,
    require_supported_job,
    run_on_first_process,
)
from perturbjax.training.profile import TRACED_STEPS, trace_steps
from perturbjax.training.progress import (
    Progress,
    first_progress,
    resume,
    save_interrupted,
    watch_sigterm,
)
from perturbjax.training.run_directory import Run, describe_run, open_run, start_run
from perturbjax.training.run_lock import lock_run
from perturbjax.training.setup import Experiment, prepare_experiment, print_training_summary
from perturbjax.training.step import (
    Sums,
    TrainState,
    initial_state,
    make_predict_step,
    make_train_step,
)


@dataclass(frozen=True)
class TrainConfig:
    """Train a network on a dataset."""

    out: Path
    """Run directory to write. An unfinished run with the same options is resumed."""
    data: tuple[Path, ...] = ()
    """Dataset directories from `perturbjax build`."""
    resume: bool = False
    """Resume the run in --out with its stored recipe."""
    init_from: Path | None = None
    """Run whose parameters initialize the network; layers of another shape are new."""
    feed: PipelineChoice = "auto"
    """Batch pipeline. resident: dataset on the device. streamed: decode during training. auto:
    resident if it fits.
    """
    workers: int = python_only(0)
    """Processes that decode records for the streamed pipeline; 0 decodes in threads."""
    evaluate_every: int = 10
    """Epochs between test evaluations."""
    checkpoint_every: int = 10
    """Epochs between checkpoints."""
    keep_latest: int = python_only(2)
    """Number of latest checkpoints to keep."""
    profile: str = optional_value("", "default")
    """Folder for a trace of a few steps (Perfetto, XProf); without a value OUT/profile."""
    log_to: LogTo = "none"
    """Additional metric logger (requires its package); metrics.jsonl is always written."""
    compute: ComputeConfig = ComputeConfig()
    hosts: HostsConfig = HostsConfig()
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        evaluate, checkpoint, latest = self.evaluate_every, self.checkpoint_every, self.keep_latest
        require("workers", self.workers, self.workers >= 0, "0 or more")
        require("evaluate-every", evaluate, evaluate >= 1, "at least 1")
        require("checkpoint-every", checkpoint, checkpoint >= 1, "at least 1")
        require("keep-latest", latest, latest >= 1, "at least 1")


def fit(config: TrainConfig) -> Run:
    """Train a network until the last epoch of the recipe, or resume such a training.

    A killed run resumes from its latest checkpoint with bit-identical numbers, because order and
    augmentation depend on (seed, epoch, record) only. After SIGTERM the state is saved within the
    epoch.

    Args:
        config: dataset, run directory, recipe and devices.

    Raises:
        InputError: the input is not usable, `out` contains another run or is in use, or the loss is
            not finite.
        Terminated: SIGTERM was received, and the state was saved.
    """
    require_package(config.log_to)
    # Processes must be connected before the first call that looks for devices.
    connect(config.hosts)
    placement = open_devices(config.compute)
    resumed = open_run(config.out) if config.resume else None
    experiment = prepare_experiment(
        config.recipe, config.data, resumed=resumed, init_from=config.init_from
    )
    recipe, steps = experiment.recipe, experiment.steps_per_epoch
    require_supported_job(config.feed, config.compute.devices, recipe.optim.batch_size)
    phases = plan_phases(recipe, experiment.graphdef, experiment.params, experiment.stats, steps)
    # Start of a new run, and the template for the structure of a checkpoint.
    fresh = initial_state(experiment.params, experiment.stats, phases[0].optimizer)
    run = describe_run(
        config.out,
        recipe=recipe,
        dataset=experiment.dataset,
        label_column=experiment.label_column,
        class_names=experiment.class_names,
        manifest=experiment.manifest,
        pretrained=experiment.pretrained,
    )
    # All input is checked before the first file is written, so that an error leaves no directory
    # behind.
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.path, keep_latest=config.keep_latest))
        start = _start_or_resume(run, experiment, checkpoints, first_progress(fresh, steps), stack)
        print_training_summary(experiment, placement, phases, start.step)
        # All epochs are complete: return before the dataset is decoded.
        if start.epoch == recipe.optim.epochs:
            return run
        feed = stack.enter_context(
            open_batches(experiment.decoder, placement, choice=config.feed, workers=config.workers)
        )
        log = stack.enter_context(open_log(config.log_to, run))
        stop_requested = stack.enter_context(watch_sigterm())
        training = _Training(
            config, experiment, placement, run, checkpoints, feed, log, stop_requested, start
        )
        state = training.initialize_state()
        for phase in phases:
            epochs = range(max(phase.first, int(start.epoch)), phase.stop)
            # A resumed training skips its complete phases.
            if not epochs:
                continue
            # One iterator serves all epochs of a phase, so that the pipeline reads ahead across
            # epochs.
            steps_of_phase = training.start_phase(phase, state)
            for epoch in track(
                epochs,
                total=phase.stop,
                done=epochs.start,
                label=f"Training {phase.name}",
                unit="epochs",
            ):
                state, row = training.train_epoch(phase, epoch, state, steps_of_phase)
                scores = training.evaluate(state, epoch + 1)
                training.record(state, row, scores)
    return run


def _start_or_resume(
    run: Run,
    experiment: Experiment,
    checkpoints: Checkpoints,
    fresh: Progress,
    stack: contextlib.ExitStack,
) -> Progress:
    """Lock, create or check the run directory, and return the progress of the run."""

    def open_directory() -> Progress:
        stack.enter_context(lock_run(run.path))
        start_run(run, experiment.manifest)
        return resume(run, checkpoints, fresh)

    return run_on_first_process(open_directory, like=fresh)


@dataclass(frozen=True)
class _Training:
    """The objects that all epochs of a training use."""

    config: TrainConfig
    experiment: Experiment
    placement: Placement
    run: Run
    checkpoints: Checkpoints
    feed: BatchPipeline
    log: Log
    stop_requested: Callable[[int], bool]
    start: Progress

    # Cached: a new function at each evaluation would be compiled from scratch.
    @functools.cached_property
    def _predict_step(self) -> Callable[..., Any]:
        step = make_predict_step(self.experiment.graphdef, self.experiment.recipe)
        return self.placement.compile_predict(step)

    def initialize_state(self) -> TrainState:
        """Put the state on the devices; fit the frozen members of a new ensemble."""
        state = self.placement.replicate(self.start.state)
        # The checkpoint of a resumed run already contains the fitted members.
        if self.start.step == 0 and self.experiment.recipe.transfer.head == "channels":
            fitted = initialize_ensemble(state, self.experiment, self.placement, self.feed.batches)
            state = self.placement.replicate(fitted)
        return state

    def start_phase(self, phase: Phase, state: TrainState) -> Iterator[tuple[TrainState, Sums]]:
        """Return an iterator over the remaining steps of a phase.

        The optimizer state is new at the first step of the phase.
        """
        experiment, steps = self.experiment, self.experiment.steps_per_epoch
        # Steps count from the start of the training. A resumed run can start within a phase.
        step = max(self.start.step, phase.first * steps)
        if step == phase.first * steps:
            opt_state = phase.optimizer.init(state.params)
            state = self.placement.replicate(state._replace(opt_state=opt_state))
        train_step = make_train_step(
            phase.graphdef,
            phase.optimizer,
            experiment.recipe,
            steps_per_epoch=steps,
            class_weight=experiment.class_weight,
            axis_name=self.placement.axis_name,
        )
        run_steps = self.placement.compile_training(train_step, self.feed)
        # Only the first phase of this command is traced.
        if self.config.profile and phase.first <= self.start.epoch:
            default = self.config.profile == "default"
            folder = self.config.out / "profile" if default else Path(self.config.profile)
            last = min(step + min(TRACED_STEPS, steps), experiment.order.stop)
            traced = experiment.order.select_steps(step, last)
            # A list, because `jax.block_until_ready` does not look into a deque.
            trace_steps(
                lambda state: list(collections.deque(run_steps(state, traced), maxlen=1)),
                state,
                folder,
                len(traced),
            )
        return run_steps(state, experiment.order.select_steps(step, phase.stop * steps))

    def train_epoch(
        self,
        phase: Phase,
        epoch: int,
        state: TrainState,
        steps_of_phase: Iterator[tuple[TrainState, Sums]],
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run the remaining steps of an epoch (from 0).

        Returns:
            The state after the epoch, and its row of the metrics.

        Raises:
            Terminated: SIGTERM was received, and the state was saved.
            InputError: the loss of a step is not finite.
        """
        release_freed_memory()
        start, steps = self.start, self.experiment.steps_per_epoch
        resumed = epoch == start.epoch
        # After an interruption, the metrics of the epoch include the steps before it.
        sums = start.partial_sums() if resumed else []
        step = start.step if resumed else epoch * steps
        started = time.monotonic() - (float(start.seconds) if resumed else 0.0)
        while step < (epoch + 1) * steps:
            state, part = next(steps_of_phase)
            sums.append(part)
            # A device call runs one step or all steps of the epoch.
            step += part.loss.size
            if self.stop_requested(step):
                raise save_interrupted(
                    self.checkpoints,
                    state,
                    epoch=epoch,
                    partial_sums=sums,
                    seconds=time.monotonic() - started,
                    facts=self.run.identity,
                )
        # This copy waits for the queued steps. Until here the host can run ahead of the device.
        total = stack_steps(sums)
        require_finite_loss(np.asarray(total.loss), epoch, self.checkpoints, self.run)
        row = {
            "epoch": epoch + 1,
            "step": step,
            "split": TRAIN,
            # Totals are divided once, because padded batches contain fewer sites.
            "loss": float(total.loss.sum() / total.loss_weight.sum()),
            "accuracy": float(total.correct.sum() / total.weight.sum()),
            # Rate of the last step. The schedule counts steps from the start of the phase.
            "learning_rate": float(phase.learning_rate(step - phase.first * steps - 1)),
            "seconds": round(time.monotonic() - started, 3),
        }
        return state, row

    def evaluate(self, state: TrainState, epoch: int) -> dict[str, SiteScores]:
        """Score validation and test sites after every `evaluate_every` epochs and after the last.

        Scores on test sites are for monitoring; no choice depends on them.

        Returns:
            Scores by part of the split; empty in other epochs.
        """
        experiment = self.experiment
        if epoch % self.config.evaluate_every and epoch < experiment.recipe.optim.epochs:
            return {}
        parts = {VALIDATION: experiment.validation, TEST: experiment.test}
        return {name: self._score(state, sites) for name, sites in parts.items() if len(sites)}

    def _score(self, state: TrainState, positions: Int[np.ndarray, " n"]) -> SiteScores:
        probabilities, _ = apply_to_sites(
            self._predict_step,
            state.params,
            state.stats,
            self.feed.batches,
            positions,
            min(self.experiment.recipe.optim.batch_size, len(positions)),
            multiple=self.placement.batch_multiple,
        )
        return score_sites(probabilities, self.experiment.sites.labels[positions])

    def record(self, state: TrainState, row: dict[str, Any], scores: dict[str, SiteScores]) -> None:
        """Print and write the metrics of an epoch, and save a checkpoint if it is time."""
        epoch, rows = row["epoch"], [row]
        for part, values in scores.items():
            rows.append({**row, "split": part, "loss": values.loss, "accuracy": values.accuracy})
        # Without validation sites no checkpoint is a candidate for the best.
        best_score = None
        if VALIDATION in scores:
            best_score = rows[1]["balanced_accuracy"] = scores[VALIDATION].balanced_accuracy
        if scores:
            console.print(_describe_epoch(row, scores))
        if not is_first_process():
            return
        # Metrics before the checkpoint: after a kill between the two, resuming removes the extra
        # rows.
        self.run.append_metrics(rows)
        self.log(rows)
        if scores or epoch % self.config.checkpoint_every == 0:
            self.checkpoints.save(state, epoch=epoch, facts=self.run.identity, score=best_score)


def require_finite_loss(losses: np.ndarray, epoch: int, checkpoints: Checkpoints, run: Run) -> None:
    """Check that the losses of all steps of an epoch (from 0) are finite.

    Raises:
        InputError: the message names the first bad step and the checkpoint that remains.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if not len(bad):
        return
    # Messages count steps from 1 over all epochs.
    step = epoch * len(losses) + int(bad[0]) + 1
    saved = checkpoints.epochs() if is_first_process() else []
    remaining = (
        f"the checkpoint of epoch {saved[-1]} remains in {run.path}"
        if saved
        else "no checkpoint was saved before"
    )
    raise InputError(
        f"the loss is not finite at step {step} (epoch {epoch + 1}); {remaining}. Lower "
        "--learning-rate, or use "
        "--precision float32, with a new --out."
    )


def _describe_epoch(row: dict[str, Any], scores: dict[str, SiteScores]) -> str:
    validation = ""
    if VALIDATION in scores:
        validation = f"validation balanced accuracy {scores[VALIDATION].balanced_accuracy:.3f}; "
    return (
        f"Epoch {row['epoch']}: training loss {row['loss']:.3f}, accuracy {row['accuracy']:.3f}; "
        f"{validation}"
        f"test loss {scores[TEST].loss:.3f}, accuracy {scores[TEST].accuracy:.3f} (monitoring "
        "only); "
        f"learning rate {row['learning_rate']:.2e}"
    )
