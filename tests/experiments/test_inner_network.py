"""The parts of the network are judged apart: each way to make a head, and the eyes at every weight."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from experiments import inner_network
from experiments.inner_network import HEADS, WEIGHTS, Config, answer, main


def blobs(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return (2 * rng.normal(size=(classes, 20))[labels] + rng.normal(size=(n, 20))).astype(
        np.float32
    ), labels


@pytest.mark.parametrize(
    "name", ["as it is", "the perceptron, without mixed pairs", "the linear model alone"]
)
@pytest.mark.parametrize("known", [2, 3])
def test_every_head_tells_sites_it_has_not_seen(name, known):
    z, labels = blobs(240, known)
    said = answer(HEADS[name], z[:160], labels[:160], np.arange(160) // 40, z[160:], classes=5)
    assert said.shape == (80, 5) and (said.argmax(1) == labels[160:]).mean() > 0.9


@pytest.mark.slow  # trains a network
def test_head_and_eyes_are_judged_on_inner_folds(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", sites=360, size=24, channels=["DNA"])
    small = dataclasses.replace(
        inner_network.PRESET,
        augment=dataclasses.replace(inner_network.PRESET.augment, crop=32),
        optim=dataclasses.replace(inner_network.PRESET.optim, epochs=1),
        transfer=dataclasses.replace(inner_network.PRESET.transfer, symmetries=1),
    )
    monkeypatch.setattr(inner_network, "PRESET", small)
    main(
        Config(
            data=tmp_path / "data",
            out=tmp_path / "out",
            folds=(1,),
            heads=("the perceptron, one view",),
            trainable_branch=True,
        )
    )
    found = pd.read_csv(tmp_path / "out" / "scores.csv").groupby("variant").size()
    assert found["the perceptron, one view"] == 3
    assert all(found[f"eyes weigh {weight:g}"] == 1 for weight in WEIGHTS)
