"""Training, from a dataset directory to a run directory. Read `fit` from top to bottom: it is the method section."""

from __future__ import annotations

import collections
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.memory import give_back_freed_memory
from perturbjax.core.messages import console
from perturbjax.core.options import (
    optional_value,
    python_only,
    require,
    require_output,
    require_sound,
)
from perturbjax.core.progress import track
from perturbjax.data.batches import PipelineChoice, open_batches
from perturbjax.data.splits import TEST, TRAIN
from perturbjax.training.apply_network import accuracy_and_loss, apply_to_sites
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.devices import ComputeConfig, Dispatches, open_devices, stack_steps
from perturbjax.training.ensemble_fit import fit_ensemble_head
from perturbjax.training.metric_logs import LogTo, open_log, require_package
from perturbjax.training.phases import plan_phases
from perturbjax.training.processes import (
    HostsConfig,
    connect,
    is_first_process,
    require_supported_job,
    run_on_first_process,
)
from perturbjax.training.profile import TRACED_STEPS, trace_steps
from perturbjax.training.progress import Progress, leave, resume, watch_sigterm
from perturbjax.training.run_directory import Run, describe_run, locked, open_run, start_run
from perturbjax.training.setup import Experiment, prepare_experiment, print_training_summary
from perturbjax.training.step import (
    TrainState,
    initial_state,
    make_predict_step,
    make_site_features_step,
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
    """Batch pipeline. resident: dataset on the device. streamed: decode during training. auto: resident if it fits."""
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
    """Train, or go on training, until the recipe's last epoch.

    A run that was killed goes on from its latest checkpoint and ends with bit-identical parameters: order and
    augmentation follow from (seed, epoch, record) alone. One that gets SIGTERM saves first, within the epoch.

    Raises:
        InputError: the input cannot be used, `out` holds another run or is being trained in, or the loss stopped being
            finite.
        Terminated: SIGTERM came, and the run was saved.
    """
    require_package(config.log_to)
    connect(config.hosts)
    placement = open_devices(config.compute)
    resumed = open_run(config.out) if config.resume else None
    experiment = prepare_experiment(
        config.recipe, config.data, resumed=resumed, init_from=config.init_from
    )
    recipe, steps = experiment.recipe, experiment.steps_per_epoch
    require_supported_job(config.feed, config.compute.devices, recipe.optim.batch_size)

    phases = plan_phases(recipe, experiment.graphdef, experiment.params, experiment.stats, steps)
    predict_step = placement.compile_predict(make_predict_step(experiment.graphdef, recipe))
    fresh = initial_state(experiment.params, experiment.stats, phases[0].optimizer)

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
    with contextlib.ExitStack() as held:
        checkpoints = Checkpoints(run.path, keep_latest=config.keep_latest)
        held.callback(checkpoints.close)
        begun: Progress = run_on_first_process(
            lambda: _begin(run, experiment, checkpoints, fresh, held),
            like=Progress(fresh, 0, 0, np.zeros((4, steps), np.float32), 0.0),
        )
        done, step = int(begun.epoch), int(begun.epoch) * steps + int(begun.taken)
        print_training_summary(experiment, placement, phases, step)
        if done == recipe.optim.epochs:
            return run
        state = placement.replicate(begun.state)
        feed = held.enter_context(
            open_batches(experiment.decoder, placement, choice=config.feed, workers=config.workers)
        )
        log = held.enter_context(open_log(config.log_to, run))
        asked_to_end = held.enter_context(watch_sigterm())
        multiple = placement.count if placement.processes > 1 else 1
        if step == 0 and recipe.transfer.head == "channels":
            describe_step = placement.compile_predict(
                make_site_features_step(experiment.graphdef, recipe)
            )
            state = fit_ensemble_head(
                state, experiment, describe_step, feed.batches, multiple=multiple
            )
            state = fit_ensemble_head(
                state, experiment, describe_step, feed.batches, multiple=multiple
            )
            state = placement.replicate(state)

        phase, parts, before = None, begun.parts(), float(begun.seconds)
        for epoch in track(
            range(done, recipe.optim.epochs),
            total=recipe.optim.epochs,
            done=done,
            label="train",
            unit="epochs",
        ):
            give_back_freed_memory()
            started = time.monotonic() - before
            if phase is None or epoch == phase.stop:
                phase = next(p for p in phases if epoch < p.stop)
                if step == phase.first * steps:
                    state = placement.replicate(
                        state._replace(opt_state=phase.optimizer.init(state.params))
                    )
                train = placement.compile_training(
                    make_train_step(
                        phase.graphdef,
                        phase.optimizer,
                        recipe,
                        steps_per_epoch=steps,
                        class_weight=experiment.class_weight,
                        axis_name=placement.axis_name,
                    ),
                    feed,
                )
                if config.profile and epoch == done:
                    _profile(train, state, config, experiment, step)
                dispatches = train(state, experiment.order.select_steps(step, phase.stop * steps))
            while step < (epoch + 1) * steps:
                state, sums = next(dispatches)
                parts.append(sums)
                step += sums.loss.size
                if asked_to_end(step):
                    took = time.monotonic() - started
                    raise leave(
                        checkpoints,
                        state,
                        epoch=epoch,
                        parts=parts,
                        seconds=took,
                        facts=run.identity,
                    )
            sums, parts, before = stack_steps(parts), [], 0.0
            _require_finite(np.asarray(sums.loss), epoch, checkpoints, run)
            row = {
                "epoch": epoch + 1,
                "step": step,
                "split": TRAIN,
                "loss": float(sums.loss.sum() / sums.loss_weight.sum()),
                "accuracy": float(sums.correct.sum() / sums.weight.sum()),
                "learning_rate": float(phase.learning_rate(step - phase.first * steps - 1)),
                "seconds": round(time.monotonic() - started, 3),
            }
            rows, accuracy = [row], None
            last = epoch + 1 == recipe.optim.epochs
            if last or (epoch + 1) % config.evaluate_every == 0:
                probabilities, _ = apply_to_sites(
                    predict_step,
                    state.params,
                    state.stats,
                    feed.batches,
                    experiment.test,
                    min(recipe.optim.batch_size, len(experiment.test)),
                    multiple=multiple,
                )
                accuracy, loss = accuracy_and_loss(
                    probabilities, experiment.sites.labels[experiment.test]
                )
                rows.append({**row, "split": TEST, "loss": loss, "accuracy": accuracy})
                _say_epoch(rows)
            if not is_first_process():  # of several processes one writes
                continue
            # Metrics before the checkpoint: a kill between the two leaves rows that resuming drops, never a gap.
            run.append_metrics(rows)
            log(rows)
            if last or accuracy is not None or (epoch + 1) % config.checkpoint_every == 0:
                checkpoints.save(state, epoch=epoch + 1, facts=run.identity, accuracy=accuracy)
    return run


def _begin(
    run: Run,
    experiment: Experiment,
    checkpoints: Checkpoints,
    fresh: TrainState,
    held: contextlib.ExitStack,
) -> Progress:
    """Keep the run directory for this process, find or make the run there, and how far it is."""
    held.enter_context(locked(run.path))
    start_run(run, experiment.manifest)
    return resume(run, checkpoints, fresh, experiment.steps_per_epoch)


def _profile(
    train: Dispatches, state: TrainState, config: TrainConfig, experiment: Experiment, step: int
) -> None:
    """Trace the first steps that are to come, on a copy of the state."""
    folder = config.out / "profile" if config.profile == "default" else Path(config.profile)
    steps = min(TRACED_STEPS, experiment.steps_per_epoch)
    order = experiment.order.select_steps(step, min(step + steps, experiment.order.stop))
    # A list: JAX waits for what is in one, and for nothing in a deque.
    trace_steps(
        lambda state: list(collections.deque(train(state, order), maxlen=1)),
        state,
        folder,
        len(order),
    )


def _require_finite(losses: np.ndarray, epoch: int, checkpoints: Checkpoints, run: Run) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        step = epoch * len(losses) + int(bad[0]) + 1
        saved = checkpoints.epochs() if is_first_process() else []
        kept = (
            f"the checkpoint of epoch {saved[-1]} stays in {run.path}"
            if saved
            else "no checkpoint was saved before it"
        )
        raise InputError(
            f"the loss is not finite at step {step} (epoch {epoch + 1}); {kept}. "
            "Lower --learning-rate, or try --precision float32, in a new --out"
        )


def _say_epoch(rows: list[dict[str, Any]]) -> None:
    train, test = rows
    console.print(
        f"epoch {train['epoch']}: train loss {train['loss']:.3f}, accuracy {train['accuracy']:.3f}; "
        f"judged loss {test['loss']:.3f}, accuracy {test['accuracy']:.3f}; rate {train['learning_rate']:.2e}"
    )
