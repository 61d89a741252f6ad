"""Tests of the commands that import and export PyTorch checkpoints."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from commands import SMALL, one_line
from reference.original import Classifier

from perturbjax.cli import main
from perturbjax.dataset import Dataset, open_dataset

pytestmark = pytest.mark.full

SIDE = 64


@pytest.fixture(scope="module")
def sites(dataset) -> Dataset:
    return open_dataset(dataset)


@pytest.fixture(scope="module")
def checkpoint(sites, tmp_path_factory):
    """A checkpoint file in the format of the original program, and its network."""
    torch.manual_seed(0)
    network = Classifier(sites.column(sites.label_column).nunique()).eval()
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    torch.save({"epoch": 160, "model_state_dict": network.state_dict()}, path)
    return path, network


@pytest.fixture(scope="module")
def imported(command, checkpoint, sites, tmp_path_factory):
    """The checkpoint, imported as a run without a dataset."""
    folder = tmp_path_factory.mktemp("imported")
    labels = folder / "labels.json"
    labels.write_text(json.dumps(sorted(sites.column(sites.label_column).unique())))
    flags = ("--label-column", sites.label_column, "--crop", SIDE)
    command(
        "import-torch",
        *(
            "--checkpoint",
            checkpoint[0],
            "--model",
            "attention",
            "--out",
            folder / "run",
            "--labels",
            labels,
            *flags,
        ),
    )
    return folder / "run"


def test_imported_run_predicts_same_as_pytorch(command, checkpoint, imported, sites, tmp_path):
    command(
        "predict",
        "--run",
        imported,
        "--data",
        sites.path,
        "--out",
        tmp_path / "predictions.parquet",
    )
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    images, masks = sites.read(np.arange(len(sites)))
    x = np.concatenate([masks[..., None], images / np.iinfo(images.dtype).max], axis=-1).astype(
        np.float32
    )
    with torch.no_grad():
        expected = checkpoint[1](torch.tensor(x.transpose(0, 3, 1, 2))).softmax(1).numpy()
    ours = table[[column for column in table.columns if column.startswith("prob_")]].to_numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert set(table["part"]) == {"new"}


def test_imported_run_is_evaluated(command, imported, sites):
    command("evaluate", "--run", imported, "--data", sites.path, "--replicates", 100)
    evaluated = pd.read_parquet(imported / "evaluation" / "predictions.parquet")
    assert set(evaluated["part"]) == {"train", "test"} and len(evaluated) == len(sites)


def test_training_starts_from_imported_run(command, imported, sites, tmp_path):
    done = command(
        "train", "--data", sites.path, "--out", tmp_path / "run", "--init-from", imported, *SMALL
    )
    assert "initial parameters from" in done.stderr and "newly initialized" not in done.stderr


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_of_imported_run_is_bit_identical(checkpoint, imported, tmp_path, suffix):
    out = tmp_path / f"weights{suffix}"
    with pytest.raises(SystemExit) as exit_info:
        main(["export-torch", "--run", str(imported), "--out", str(out)])
    assert exit_info.value.code == 0
    if suffix == ".pth":
        back = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        back = load_file(out)
    expected = checkpoint[1].state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_trained_run_is_exported_to_pytorch(command, run, sites, tmp_path):
    command("export-torch", "--run", run, "--out", tmp_path / "weights.pth")
    network = Classifier(sites.column(sites.label_column).nunique())
    network.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert int(network.image_features[1].num_batches_tracked) > 0


@pytest.mark.parametrize("suffix", [pytest.param(".pth", marks=pytest.mark.slow), ".safetensors"])
def test_exported_and_reimported_run_predicts_the_same(command, run, sites, tmp_path, suffix):
    weights, back = tmp_path / f"weights{suffix}", tmp_path / "back"
    command("export-torch", "--run", run, "--out", weights)
    done = command("import-torch", "--checkpoint", weights, "--out", back)
    assert "guess" not in done.stderr + done.stdout
    tables = []
    for path in (run, back):
        command(
            "predict",
            "--run",
            path,
            "--data",
            sites.path,
            "--out",
            tmp_path / "predictions.parquet",
        )
        tables.append(pd.read_parquet(tmp_path / "predictions.parquet").drop(columns="part"))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_import_without_description_prints_assumptions(command, checkpoint, sites, tmp_path):
    done = command(
        "import-torch",
        "--checkpoint",
        checkpoint[0],
        "--data",
        sites.path,
        "--out",
        tmp_path / "run",
    )
    output = " ".join((done.stderr + done.stdout).split())
    assert "Assumed --crop 128 --normalize dtype --mask-encoding instance" in output
    assert "The order of the labels is a guess" in output


def test_description_of_another_file_is_refused(command, capsys, run, checkpoint, tmp_path):
    weights = tmp_path / "weights.pth"
    command("export-torch", "--run", run, "--out", weights)
    weights.write_bytes(checkpoint[0].read_bytes())
    output = error_line(capsys, "import-torch", "--checkpoint", weights, "--out", tmp_path / "back")
    assert "weights.pth.json: does not match the tensors" in output


def test_unusable_import_is_refused_in_one_line(capsys, checkpoint, imported, sites, tmp_path):
    labels, out = tmp_path / "labels.json", tmp_path / "a"
    labels.write_text('["one", "two"]')
    for flags, text in [
        (("--model", "attention_multiscale", "--out", out), "image_block1.0.weight"),
        (("--labels", labels, "--out", out), "labels.json"),
        (("--out", imported), "already contains another run"),
        (
            ("--data", sites.path, "--normalize", "log_plate", "--out", out),
            "has 2 channels with --normalize log_plate",
        ),
    ]:
        assert text in error_line(capsys, "import-torch", "--checkpoint", checkpoint[0], *flags)
        assert not out.exists()
    assert "--data" in error_line(capsys, "evaluate", "--run", imported)


def error_line(capsys, *arguments) -> str:
    """Return the error line of a command that runs in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    return one_line(capsys.readouterr().err)
