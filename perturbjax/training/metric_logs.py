"""Additional metric loggers: TensorBoard, Weights & Biases, MLflow.

`metrics.jsonl` is always written; resuming and reports use it. A resumed run logs its epochs under
the same name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from perturbjax.core.options import require
from perturbjax.core.recipe_files import recipe_to_dict
from perturbjax.training.processes import is_first_process
from perturbjax.training.run_directory import Run

LogTo = Literal["none", "tensorboard", "wandb", "mlflow"]
#: Function that logs the rows of an epoch, which are those of `metrics.jsonl`.
Log = Callable[[Sequence[dict[str, Any]]], None]
#: Function that logs named values of an epoch.
Writer = Callable[[dict[str, float], int], None]
#: Module of each logger, and the package that provides it.
PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}


def require_package(logger: LogTo) -> None:
    """Check that the package of a logger is installed.

    Raises:
        InputError: it is not installed.
    """
    if logger != "none":
        module, package = PACKAGES[logger]
        available = importlib.util.find_spec(module) is not None
        require("log-to", logger, available, f"installed: pip install {package}")


@contextmanager
def open_log(logger: LogTo, run: Run) -> Iterator[Log]:
    """Open a logger for the duration of a block. With several processes, process 0 logs."""
    if logger == "none" or not is_first_process():
        yield lambda rows: None
        return
    package = importlib.import_module(PACKAGES[logger][0])
    open_writer = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[logger]
    with open_writer(package, run) as write:

        def log(rows: Sequence[dict[str, Any]]) -> None:
            values = {
                f"{row['split']}/{name}": row[name]
                for row in rows
                for name in ("loss", "accuracy", "balanced_accuracy")
                if name in row
            }
            # All rows of an epoch share its number and learning rate.
            write({**values, "learning_rate": rows[0]["learning_rate"]}, rows[0]["epoch"])

        yield log


@contextmanager
def _tensorboard(package: Any, run: Run) -> Iterator[Writer]:
    with package.SummaryWriter(str(run.path / "tensorboard")) as summary:

        def write(values: dict[str, float], epoch: int) -> None:
            for name, value in values.items():
                summary.add_scalar(name, value, epoch)

        yield write


@contextmanager
def _wandb(package: Any, run: Run) -> Iterator[Writer]:
    # The same id for the same directory, so that a resumed run continues its record.
    run_id = hashlib.sha256(str(run.path.absolute()).encode()).hexdigest()[:16]
    settings = {"name": run.path.name, "dir": str(run.path), "config": recipe_to_dict(run.recipe)}
    with package.init(id=run_id, resume="allow", **settings) as record:
        yield lambda values, epoch: record.log(values, step=epoch)


@contextmanager
def _mlflow(package: Any, run: Run) -> Iterator[Writer]:
    recipe = run.recipe
    with package.start_run(run_name=run.path.name):
        package.log_params(
            {"model": recipe.model.model, "split": recipe.split.split, "seed": recipe.seed}
        )
        yield lambda values, epoch: package.log_metrics(values, step=epoch)
