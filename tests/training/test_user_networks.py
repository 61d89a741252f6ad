"""A network of a user: example of the documentation, trained, resumed and applied by name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flax import nnx
from tiny_dataset import write_dataset

from perturbjax import cli
from perturbjax.cli.evaluate import evaluate, predict
from perturbjax.core.errors import InputError
from perturbjax.models import create, user_networks
from perturbjax.training.fit import fit

PAGE = Path(__file__).parents[2] / "docs/howto/own-network.md"
NAME = "mynet:small"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Working directory with the module of the documentation; no network is allowed."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mynet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_networks, "_allowed", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    return tmp_path


def run(function: Callable, command: str, *words: object):
    return function(cli.parse_command(command, [*map(str, words)]))


def test_network_of_the_documentation_trains_resumes_and_predicts(folder, monkeypatch, capsys):
    data = write_dataset(folder / "data", sites=30, size=24, channels=["DNA"])
    words = ["--model", NAME, "--data", data, "--out", "run", "--crop", 16, "--batch-size", 8]
    words += ["--epochs", 2, "--checkpoint-every", 1, "--split", "well", "--folds", 3]
    run(fit, "train", *words)
    metrics = Path("run/metrics.jsonl").read_text().splitlines()

    # The run and its configuration do not allow the network; the user must.
    monkeypatch.setattr(user_networks, "_allowed", set())
    monkeypatch.delitem(sys.modules, "mynet")
    for command, function in (("evaluate", evaluate), ("train", fit)):
        more = ["--resume", "--out", "run"] if command == "train" else ["--run", "run"]
        with pytest.raises(InputError, match=f"set the environment variable .*={NAME}"):
            run(function, command, *more)
    with pytest.raises(InputError, match="named by a run or a recipe file"):
        words_of_recipe = ["--recipe", "run/config.json", "--data", data, "--out", "other"]
        run(fit, "train", *words_of_recipe)
    assert "mynet" not in sys.modules and not Path("other").exists()

    shutil.rmtree("run/checkpoints/latest/2")
    run(fit, "train", "--resume", "--out", "run", "--model", NAME)
    resumed = Path("run/metrics.jsonl").read_text().splitlines()
    for one, other in zip(metrics, resumed, strict=True):
        assert json.loads(one)["loss"] == json.loads(other)["loss"]

    monkeypatch.setattr(user_networks, "_allowed", set())
    monkeypatch.setenv("PERTURBJAX_MODEL", NAME)
    run(evaluate, "evaluate", "--run", "run", "--replicates", 20, "--no-attribution")
    run(predict, "predict", "--run", "run", "--data", data, "--out", "p.parquet")
    stored = pd.read_parquet("run/evaluation/predictions.parquet").set_index("site_id")
    table = pd.read_parquet("p.parquet").set_index("site_id").loc[stored.index]
    np.testing.assert_allclose(table["prob_taxol"], stored["prob_taxol"], atol=1e-6)
    assert "small_0001" in pd.read_parquet("run/evaluation/features.parquet")

    capsys.readouterr()
    with Path("mynet.py").open("a") as file:
        file.write("# changed\n")
    run(predict, "predict", "--run", "run", "--data", data, "--out", "p.parquet")
    assert "file of mynet:small was changed after the training" in " ".join(
        capsys.readouterr().err.split()
    )


BROKEN = """
from flax import nnx
from perturbjax import Outputs
class Network(nnx.Module):
    def __init__(self, rngs, logits=2, outputs=Outputs, inputs=2):
        self.head = nnx.Linear(inputs, logits, rngs=rngs)
        self.outputs = outputs
    def __call__(self, x, mode):
        x = x.mean((1, 2))
        return self.outputs(self.head(x), x)
class Dropout(Network):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
def wide(*, classes, channels, dropout, rngs): return Network(rngs, logits=5)
def pair(*, classes, channels, dropout, rngs): return Network(rngs, outputs=lambda *x: x)
def shallow(*, classes, channels, dropout, rngs): return Network(rngs, inputs=7)
def dropping(*, classes, channels, dropout, rngs): return Dropout(rngs)
def text(*, classes, channels, dropout, rngs): return "network"
def old(classes): return Network(nnx.Rngs(0))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide", r"logits have shape \(2, 5\); expected \(2, 2\) for 2 sites and 2 classes"),
        ("pair", "the network returns tuple; return perturbjax.Outputs"),
        ("shallow", r"fails on an input of shape \(2, 16, 16, 2\) \(\w+Error: "),
        ("dropping", "dropout.rngs.count is a RngCount; only Param and BatchStat"),
        ("text", "returns str; return a Flax network"),
        ("old", "the function fails .TypeError: "),
        ("absent", "broken has no function absent"),
    ],
)
def test_unusable_networks_give_one_line(folder, name, message):
    (folder / "broken.py").write_text(BROKEN)
    user_networks.allow_network(f"broken:{name}")
    with pytest.raises(InputError, match=f"--model broken:{name}: .*{message}"):
        create(f"broken:{name}", classes=2, image_size=16)


def test_names_and_modules_are_checked():
    for name, message in (
        ("no_such_module:f", "cannot be imported .ModuleNotFoundError"),
        ("mynet:small()", "write a network as package.module:function"),
        ("/tmp/mynet.py:small", "write a network as package.module:function"),
    ):
        user_networks.allow_network(name)
        with pytest.raises(InputError, match=re.escape(name) + f": .*{message}"):
            create(name, classes=2)
    words = ["--model", NAME, "--data", "d", "--out", "o"]
    with pytest.raises(InputError, match="must be a network of perturbjax with --weights"):
        cli.parse_command("train", [*words, "--weights", "package:efficientnet_lite0"])
    with pytest.raises(InputError, match="must be a network of perturbjax"):
        cli.parse_command("train", [*words, "--preset", "wells"])
    assert isinstance(create("masked_cnn", classes=2), nnx.Module)
