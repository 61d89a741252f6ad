"""A PyTorch checkpoint becomes a run that evaluates, predicts, trains on and goes back to PyTorch, by the commands."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from commands import SMALL, one_line
from reference.original import Classifier

from perturbjax.cli import main
from perturbjax.dataset import Dataset, open_dataset

SIDE = 64


@pytest.fixture(scope="module")
def sites(dataset) -> Dataset:
    return open_dataset(dataset)


@pytest.fixture(scope="module")
def checkpoint(sites, tmp_path_factory):
    """The original's network for the simulated plates, and the file its program would have saved."""
    torch.manual_seed(0)
    network = Classifier(sites.column(sites.label_column).nunique()).eval()
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    torch.save({"epoch": 160, "model_state_dict": network.state_dict()}, path)
    return path, network


@pytest.fixture(scope="module")
def imported(command, checkpoint, sites, tmp_path_factory):
    """The run made of it, without a dataset."""
    folder = tmp_path_factory.mktemp("imported")
    labels = folder / "labels.json"
    labels.write_text(json.dumps(sorted(sites.column(sites.label_column).unique())))
    flags = ("--label-column", sites.label_column, "--crop", SIDE, "--folds", 3)
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


def test_the_imported_run_predicts_what_pytorch_predicts(
    command, checkpoint, imported, sites, tmp_path
):
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


def test_the_imported_run_is_judged(command, imported, sites):
    command("evaluate", "--run", imported, "--data", sites.path, "--replicates", 100)
    judged = pd.read_parquet(imported / "evaluation" / "predictions.parquet")
    assert set(judged["part"]) == {"train", "test"} and len(judged) == len(sites)


def test_training_starts_from_the_imported_run(command, imported, sites, tmp_path):
    done = command(
        "train", "--data", sites.path, "--out", tmp_path / "run", "--init-from", imported, *SMALL
    )
    assert "initial parameters from" in done.stderr and "newly initialized" not in done.stderr


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_was_imported_goes_back_bit_for_bit(checkpoint, imported, tmp_path, suffix):
    out = tmp_path / f"weights{suffix}"
    with pytest.raises(SystemExit) as left:
        main(["export-torch", "--run", str(imported), "--out", str(out)])
    assert left.value.code == 0
    if suffix == ".pth":
        back = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        back = load_file(out)
    expected = checkpoint[1].state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_a_trained_run_goes_to_pytorch(command, run, sites, tmp_path):
    command("export-torch", "--run", run, "--out", tmp_path / "weights.pth")
    network = Classifier(sites.column(sites.label_column).nunique())
    network.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert int(network.image_features[1].num_batches_tracked) > 0


@pytest.mark.parametrize("suffix", [pytest.param(".pth", marks=pytest.mark.slow), ".safetensors"])
def test_a_run_that_went_to_pytorch_and_back_predicts_the_same(
    command, run, sites, tmp_path, suffix
):
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


def test_a_bare_state_dict_says_what_was_assumed(command, checkpoint, sites, tmp_path):
    done = command(
        "import-torch",
        "--checkpoint",
        checkpoint[0],
        "--data",
        sites.path,
        "--out",
        tmp_path / "run",
    )
    said = " ".join((done.stderr + done.stdout).split())
    assert "Assumed --crop 128 --normalize dtype --mask-encoding instance" in said
    assert "The order of the labels is a guess" in said


def test_a_description_of_another_file_is_refused(command, capsys, run, checkpoint, tmp_path):
    weights = tmp_path / "weights.pth"
    command("export-torch", "--run", run, "--out", weights)
    weights.write_bytes(checkpoint[0].read_bytes())
    said = refusal(capsys, "import-torch", "--checkpoint", weights, "--out", tmp_path / "back")
    assert "weights.pth.json: does not match the tensors" in said


def test_what_cannot_be_imported_is_refused_in_one_line(
    capsys, checkpoint, imported, sites, tmp_path
):
    labels, out = tmp_path / "labels.json", tmp_path / "a"
    labels.write_text('["one", "two"]')
    for flags, named in [
        (("--model", "attention_multiscale", "--out", out), "image_block1.0.weight"),
        (("--labels", labels, "--out", out), "labels.json"),
        (("--out", imported), "already contains another run"),
        (
            ("--data", sites.path, "--normalize", "log_plate", "--out", out),
            "has 2 channels with --normalize log_plate",
        ),
    ]:
        assert named in refusal(capsys, "import-torch", "--checkpoint", checkpoint[0], *flags)
        assert not out.exists()
    assert "--data" in refusal(capsys, "evaluate", "--run", imported)


def refusal(capsys, *words) -> str:
    """The error of a command run in this process, which refuses before any heavy work."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 2
    return one_line(capsys.readouterr().err)
