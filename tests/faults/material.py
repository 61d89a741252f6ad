"""Valid inputs for fault injection, written by the real commands: plate, dataset, run, weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tests.faults.arena import CommandServer, Request, words

SIMULATED = "--plates 2 --wells 6 --sites 2 --compounds 2 --size 48 --effect 3"
TRAINED = (
    "--preset paper --crop 16 --batch-size 8 --epochs 4 --folds 2 --split well --evaluate-every 2"
)
VALIDATED = f"{TRAINED} --validation-fraction 0.4"
BUILT = "--workers 1 --segmenter watershed --segment-channels DNA"


class Material:
    """Valid files and folders; each is written at first use and never changed."""

    def __init__(self, server: CommandServer, root: Path):
        self._server, self.root = server, root

    def make_all(self) -> Material:
        """Write everything, before several threads need it at the same time."""
        assert all((self.dataset, self.features, self.split, self.weights, self.safetensors))
        assert self.validated_run
        return self

    @cached_property
    def plates(self) -> Path:
        return self._make("plates", words(f"data_prep simulate {SIMULATED}"))

    @cached_property
    def dataset(self) -> Path:
        return self._make("dataset", [*words(f"data_prep build {BUILT}"), *plate_flags(self)])

    @cached_property
    def run(self) -> Path:
        run = self._make("run", words(f"perturbjax train --data {{}} {TRAINED}", self.dataset))
        self._run(words("perturbjax evaluate --run {} --replicates 50", run))
        return run

    @cached_property
    def validated_run(self) -> Path:
        """A run with a best checkpoint, chosen on validation sites."""
        return self._make(
            "validated", words(f"perturbjax train --data {{}} {VALIDATED}", self.dataset)
        )

    @cached_property
    def features(self) -> Path:
        return self.run / "evaluation" / "features.parquet"

    @cached_property
    def split(self) -> Path:
        return self._make(
            "split.parquet", words("perturbjax split --data {} --folds 2", self.dataset)
        )

    @cached_property
    def weights(self) -> Path:
        return self._make("weights.pth", words("perturbjax export-torch --run {}", self.run))

    @cached_property
    def safetensors(self) -> Path:
        return self._make(
            "weights.safetensors", words("perturbjax export-torch --run {}", self.run)
        )

    def _make(self, name: str, command: Sequence[str]) -> Path:
        self._run([*command, "--out", str(self.root / name)])
        return self.root / name

    def _run(self, command: Sequence[str]) -> None:
        self.root.mkdir(exist_ok=True)
        result = self._server.run(Request(command, self.root))
        assert result.status == 0, f"{command}: {result.stderr}"


def plate_flags(material: Material, table: Path | None = None) -> list[str]:
    """Return the flags of the simulated plates, optionally with another load_data.csv."""
    table = table or material.plates / "load_data.csv"
    return words("--load-data {} --images {}", table, material.plates)
