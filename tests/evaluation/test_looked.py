"""What a network looked at is told in numbers: how unequal its attention is, and what it owes to the masks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_dataset import write_dataset

from perturbjax.config import InputConfig
from perturbjax.console import InputError
from perturbjax.dataset import open_dataset
from perturbjax.evaluation import looked
from perturbjax.training.predict import Predictions


class MaskReader:
    """Answers class 1 where a site's own mask is there, by its mean; it has attention where it is told so."""

    def __init__(self, *, attention: bool, mask_use: str = "keep"):
        self.run = SimpleNamespace(recipe=SimpleNamespace(input=InputConfig(mask_use=mask_use)))
        self.has = attention

    def with_masks(self, dataset, positions, change) -> Predictions:
        masks = change(np.stack([np.full((4, 4), position % 2, np.uint8) for position in positions]))
        one = masks.mean(axis=(1, 2)).astype(np.float32)
        return Predictions(np.stack([1 - one, one], axis=1), np.zeros((len(one), 2), np.float32))

    def attention_to(self, dataset, positions) -> np.ndarray:
        if not self.has:
            raise InputError("attention: masked_cnn has none")
        return np.tile(np.linspace(0.5, 1, 16, dtype=np.float32).reshape(4, 4), (len(positions), 1, 1))


def looks(tmp_path, **network) -> dict:
    dataset = open_dataset(write_dataset(tmp_path / "data", sites=20, size=8, channels=["DNA"]))
    positions = np.arange(10, 20)
    looked.look(MaskReader(**network), dataset, positions, positions % 2, tmp_path)
    return looked.read_looked(tmp_path)


def test_masks_of_others_and_none_show_what_the_score_owes_to_them(tmp_path):
    masks = looks(tmp_path, attention=True)["masks"]
    assert masks["as they are"]["balanced_accuracy"] == 1
    assert masks["of another site"]["balanced_accuracy"] == 0, "every neighbour is of the other class"
    assert masks["taken away"]["balanced_accuracy"] == 0.5


def test_maps_come_back_as_they_were_with_how_unequal_they_are(tmp_path):
    found = looks(tmp_path, attention=True)["attention"]
    assert found["low"] == pytest.approx(0.525) and found["contrast"] == pytest.approx(0.45)
    maps = looked.read_attention(tmp_path)
    assert set(maps) == {f"site{at}" for at in range(10, 20)}
    np.testing.assert_allclose(maps["site10"], np.linspace(0.5, 1, 16).reshape(4, 4), atol=1e-6)


def test_networks_without_attention_and_trained_without_masks_are_not_asked(tmp_path):
    assert looks(tmp_path, attention=False, mask_use="none") == {"sites": 10}
    assert looked.read_attention(tmp_path) == {}


def test_equal_attention_has_no_contrast():
    assert looked.spread(np.full((3, 4, 4), 0.9))["contrast"] == 0
