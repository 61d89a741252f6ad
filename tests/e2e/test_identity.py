"""Tests that commands refuse a run whose files differ from its checkpoint."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from commands import one_line

from perturbjax.cli import main

pytestmark = pytest.mark.full


def swap_split(run: Path) -> None:
    table = pd.read_parquet(run / "split.parquet")
    table["part"] = table["part"].map({"train": "test", "test": "train"})
    table.to_parquet(run / "split.parquet", index=False)


def reverse_labels(run: Path) -> None:
    names = json.loads((run / "labels.json").read_text())
    (run / "labels.json").write_text(json.dumps(names[::-1]))


def change_recipe(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["augment"]["crop"] = 32
    (run / "config.json").write_text(json.dumps(config))


def change_facts(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["facts"]["image_size"] = [1, 1]
    (run / "config.json").write_text(json.dumps(config))


def empty_config(run: Path) -> None:
    (run / "config.json").write_text("{}")


def flip_a_bit(run: Path) -> None:
    for epoch in (run / "checkpoints").glob(
        "*/*/"
    ):  # all checkpoints, because commands open different ones
        array = max(epoch.rglob("d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(array.read_bytes())
        data[len(data) // 2] ^= 16
        for path in epoch.rglob(f"d/{array.name}"):
            path.write_bytes(data)


CHANGES = {
    swap_split: "split.parquet: is not the split",
    reverse_labels: "labels.json: differs from the classes",
    change_recipe: "config.json: differs from the recipe",
    change_facts: "config.json: differs from the facts",
    empty_config: "config.json: is not the config.json of a run",
    flip_a_bit: "checkpoints",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["predict", "verify"])
def test_changed_run_is_refused(capsys, run, dataset, tmp_path, change, name):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    change(copy)
    out = tmp_path / "predictions.parquet"
    arguments = {
        "predict": ["predict", "--run", copy, "--data", dataset, "--out", out],
        "verify": ["verify", copy],
    }[name]
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    assert CHANGES[change] in one_line(capsys.readouterr().err)
    assert not out.exists()


def test_unchanged_run_is_verified(capsys, run):
    with pytest.raises(SystemExit) as exit_info:
        main(["verify", str(run)])
    assert exit_info.value.code == 0
    assert "match their checksums" in " ".join(capsys.readouterr().err.split())
