"""A training's metrics where others look for them too: TensorBoard, Weights & Biases, MLflow.

`metrics.jsonl` is written in any case, and is what a run is resumed and reported by. A run that goes on after a kill
tells its epochs under the same name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from perturbjax.core.config import recipe_to_dict
from perturbjax.core.options import require
from perturbjax.training.processes import is_first_process
from perturbjax.training.run_directory import Run

LogTo = Literal["none", "tensorboard", "wandb", "mlflow"]
#: What is told of an epoch's rows, which are those of `metrics.jsonl`.
Log = Callable[[Sequence[dict[str, Any]]], None]
#: The package behind each name, and what brings it.
PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb",) * 2,
    "mlflow": ("mlflow", "mlflow-skinny"),
}


def require_package(to: LogTo) -> None:
    """Refuse what cannot be written to.

    Raises:
        InputError: its package is not installed.
    """
    if to != "none":
        module, package = PACKAGES[to]
        require(
            "log-to",
            to,
            importlib.util.find_spec(module) is not None,
            f"installed: pip install {package}",
        )


@contextmanager
def open_log(to: LogTo, run: Run) -> Iterator[Log]:
    """What a training tells its rows to, until the block ends; of several processes the first tells."""
    if to == "none" or not is_first_process():
        yield lambda rows: None
        return
    package = importlib.import_module(PACKAGES[to][0])
    with {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[to](
        package, run
    ) as tell:

        def log(rows: Sequence[dict[str, Any]]) -> None:
            values = {
                f"{row['split']}/{name}": row[name] for row in rows for name in ("loss", "accuracy")
            }
            tell({**values, "learning_rate": rows[0]["learning_rate"]}, rows[0]["epoch"])

        yield log


Tell = Callable[[dict[str, float], int], None]


@contextmanager
def _tensorboard(package: Any, run: Run) -> Iterator[Tell]:
    with package.SummaryWriter(str(run.path / "tensorboard")) as writer:

        def tell(values: dict[str, float], epoch: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, epoch)

        yield tell


@contextmanager
def _wandb(package: Any, run: Run) -> Iterator[Tell]:
    same = hashlib.sha256(str(run.path.absolute()).encode()).hexdigest()[
        :16
    ]  # a run that goes on is the same there
    settings = {"name": run.path.name, "dir": str(run.path), "config": recipe_to_dict(run.recipe)}
    with package.init(id=same, resume="allow", **settings) as told:
        yield lambda values, epoch: told.log(values, step=epoch)


@contextmanager
def _mlflow(package: Any, run: Run) -> Iterator[Tell]:
    with package.start_run(run_name=run.path.name):
        package.log_params(
            {
                "model": run.recipe.model.model,
                "split": run.recipe.split.split,
                "seed": run.recipe.seed,
            }
        )
        yield lambda values, epoch: package.log_metrics(values, step=epoch)
