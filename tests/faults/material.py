"""What the storms spoil: a small plate, its dataset, a run, tables and weights, made by the real commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tests.faults.arena import Arena, Order

#: A shared cache of masks would finish the work of a killed build.
os.environ["PERTURBJAX_MASK_CACHE"] = "none"
SIMULATED = (
    *("--plates", 2, "--wells", 6, "--sites", 2),
    *("--compounds", 2, "--size", 48, "--effect", 3),
)
TRAINED = (
    *("--crop", 16, "--batch-size", 8, "--epochs", 4, "--folds", 2),
    *("--split", "well", "--evaluate-every", 2),
)
BUILT = ("--workers", 1, "--segmenter", "watershed", "--segment-channels", "DNA")


class Material:
    """Folders and files that are whole, each made when it is first asked for; never written to again."""

    def __init__(self, arena: Arena, root: Path):
        self._arena, self.root = arena, root

    def make(self) -> Material:
        """All of it, before several processes ask for it at once."""
        assert all((self.dataset, self.features, self.split, self.weights, self.safetensors))
        return self

    @cached_property
    def plates(self) -> Path:
        return self._made("plates", "data_prep", "simulate", *SIMULATED)

    @cached_property
    def dataset(self) -> Path:
        return self._made("dataset", "data_prep", "build", *read_plates(self), *BUILT)

    @cached_property
    def run(self) -> Path:
        made = self._made("run", "perturbjax", "train", "--data", self.dataset, *TRAINED)
        self._order("perturbjax", "evaluate", "--run", made, "--replicates", 50)
        return made

    @cached_property
    def features(self) -> Path:
        return self.run / "evaluation" / "features.parquet"

    @cached_property
    def split(self) -> Path:
        return self._made(
            "split.parquet", "perturbjax", "split", "--data", self.dataset, "--folds", 2
        )

    @cached_property
    def weights(self) -> Path:
        return self._made("weights.pth", "perturbjax", "export-torch", "--run", self.run)

    @cached_property
    def safetensors(self) -> Path:
        return self._made("weights.safetensors", "perturbjax", "export-torch", "--run", self.run)

    def _made(self, name: str, *command: object) -> Path:
        self._order(*command, "--out", self.root / name)
        return self.root / name

    def _order(self, *command: object) -> None:
        self.root.mkdir(exist_ok=True)
        ended = self._arena.run(Order(command, self.root))
        assert ended.status == 0, f"{command}: {ended.stderr}"


def read_plates(made: Material, table: Path | None = None) -> Sequence[object]:
    """The flags that name the simulated plates, or other sites in their images."""
    return ("--load-data", table or made.plates / "load_data.csv", "--images", made.plates)
