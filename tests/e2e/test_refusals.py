"""Tests of unusable input: one error line with the remedy, exit status 2, no partial output."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from commands import SMALL, command_line, one_line

from perturbjax.training.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (("--preset", "papre"), ["--preset papre", "paper"]),
        (("--model", "resnet81"), ["--model resnet81", "attention"]),
        (("--label-column", "Metadata_dose"), ["Metadata_dose", "Metadata_pert_iname"]),
        (("--split", "plate", "--folds", "3"), ["only 2 groups"]),
        (("--split", "compound", "--folds", "2"), ["nothing can be learned"]),
        (("--split-file", "nowhere.parquet"), ["nowhere.parquet"]),
        (("--epochs", "0"), ["--epochs", "at least 1"]),
        (("--crop", "0"), ["--crop 0"]),
        (("--batch-size", "0"), ["--batch-size 0"]),
        (("--device-count", "99"), ["--device-count: was removed", "--devices 1"]),
    ],
)
def test_invalid_flag_is_named(refused, dataset, tmp_path, flags, texts):
    line = refused(
        "train", "--data", dataset, "--out", tmp_path / "run", *flags, out=tmp_path / "run"
    )
    assert all(text in line for text in texts), line


def test_missing_dataset_is_named(refused, tmp_path):
    line = refused(
        "train", "--data", tmp_path / "none", "--out", tmp_path / "run", out=tmp_path / "run"
    )
    assert str(tmp_path / "none") in line and "perturbjax build" in line


@pytest.mark.parametrize("missing", ["index.parquet", "provenance.json", "dataset_info.json"])
def test_incomplete_dataset_is_refused(refused, dataset, tmp_path, missing):
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data" / missing).unlink()
    line = refused(
        "train", "--data", tmp_path / "data", "--out", tmp_path / "run", out=tmp_path / "run"
    )
    assert missing in line


def test_dataset_of_other_schema_version_is_refused(refused, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    provenance = json.loads((tmp_path / "data/provenance.json").read_text())
    (tmp_path / "data/provenance.json").write_text(
        json.dumps({**provenance, "schema_version": "0.1.0"})
    )
    line = refused(
        "train", "--data", tmp_path / "data", "--out", tmp_path / "run", out=tmp_path / "run"
    )
    assert "0.1.0" in line


def test_truncated_shard_is_refused(refused, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    shard = next((tmp_path / "data").glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert str(tmp_path / "data") in refused(
        "train", "--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL
    )


def test_train_does_not_write_into_foreign_folder(refused, dataset, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "contains no run" in refused("train", "--data", dataset, "--out", tmp_path, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_full_disk_is_one_line_and_command_can_be_repeated(
    environment, command, run, dataset, tmp_path
):
    command("export-torch", "--run", run, "--out", tmp_path / "w.safetensors")
    words = {
        "train": ("--data", dataset, "--out", tmp_path / "train", *SMALL),
        "import-torch": (
            "--checkpoint",
            tmp_path / "w.safetensors",
            "--out",
            tmp_path / "import-torch",
        ),
    }
    for name, flags in words.items():
        full = subprocess.run(
            [
                "bash",
                "-c",
                'ulimit -f 20; exec "$@"',
                "bash",
                *command_line(name),
                *map(str, flags),
            ],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (
            full.returncode == 2 and "No space" in one_line(full.stderr)
        ) or "no space" in one_line(full.stderr)
        command(name, *flags)
        assert Checkpoints(tmp_path / name).epochs()


def test_nonfinite_loss_stops_training(refused, dataset, tmp_path):
    out = tmp_path / "run"
    flags = (
        "--data",
        dataset,
        "--out",
        out,
        *SMALL[:4],
        "--epochs",
        "6",
        "--split",
        "well",
        "--folds",
        "3",
    )
    (tmp_path / "recipe.toml").write_text("[optim]\nwarmup = 1\n")
    wild = (
        *flags,
        "--learning-rate",
        "1e30",
        "--weight-decay",
        "0",
        "--checkpoint-every",
        "1",
        "--recipe",
        tmp_path / "recipe.toml",
    )
    line = refused("train", *wild)
    assert "not finite at step" in line and "--learning-rate" in line
    assert ("no checkpoint was saved" in line) == (not Checkpoints(out).epochs())


@pytest.mark.parametrize("words", [("evaluate", "--run"), ("report",)])
def test_folder_without_run_is_named(refused, tmp_path, words):
    assert str(tmp_path) in refused(*words, tmp_path)


def test_an_unknown_verb_lists_those_there_are(command):
    done = command("trian", status=2)
    assert "trian" in one_line(done.stderr) and "train" in done.stderr
