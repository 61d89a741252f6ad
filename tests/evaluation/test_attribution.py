"""What a network looked at is told in numbers: how unequal its attention is, and what it owes to the masks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_dataset import write_dataset

from perturbjax.core.config import InputConfig
from perturbjax.core.errors import InputError
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.mask_encodings import draw_disks
from perturbjax.dataset import open_dataset
from perturbjax.evaluation import attribution as looked
from perturbjax.training.apply_network import Predictions


class MaskReader:
    """Answers class 1 where a site's own mask is there, by its mean; it has attention where it is told so."""

    def __init__(self, *, attention: bool, mask_use: str = "keep"):
        self.run = SimpleNamespace(recipe=SimpleNamespace(input=InputConfig(mask_use=mask_use)))
        self.has = attention

    def apply_with_masks(self, dataset, positions, change, mask_transform=None) -> Predictions:
        masks = change(
            np.stack([np.full((4, 4), position % 2, np.uint8) for position in positions])
        )
        one = masks.mean(axis=(1, 2)).astype(np.float32)
        return Predictions(np.stack([1 - one, one], axis=1), np.zeros((len(one), 2), np.float32))

    def changed(self, dataset, positions, change) -> Predictions:
        """As sure of class 1 as the middle of the image is bright; two batches, as a network is asked."""
        parts = []
        for first in range(0, len(positions), 100):
            few = np.zeros(len(positions[first : first + 100]))
            image = np.zeros((len(few), 16, 16, 1), np.uint16)
            image[:, 7:9, 7:9] = 100
            mask = np.ones((len(few), 16, 16), np.uint8)
            batch = change(RawBatch(image, mask, few, few, few, few, few), first)
            bright = batch.image[:, 7:9, 7:9, 0].mean(axis=(1, 2)) / 100
            parts.append(0.5 + 0.4 * bright)
        one = np.concatenate(parts).astype(np.float32)
        return Predictions(np.stack([1 - one, one], axis=1), np.zeros((len(one), 2), np.float32))

    def attention_on_dataset(self, dataset, positions) -> np.ndarray:
        if not self.has:
            raise InputError("attention: masked_cnn has none")
        return np.tile(
            np.linspace(0.5, 1, 16, dtype=np.float32).reshape(4, 4), (len(positions), 1, 1)
        )


def looks(tmp_path, **network) -> dict:
    dataset = open_dataset(write_dataset(tmp_path / "data", sites=20, size=8, channels=["DNA"]))
    positions = np.arange(10, 20)
    one = (positions % 2).astype(np.float32)
    looked.write_attribution(
        MaskReader(**network),
        dataset,
        positions,
        positions % 2,
        np.stack([1 - one, one], axis=1),
        tmp_path,
    )
    return looked.read_attribution(tmp_path)


def test_masks_of_others_and_none_show_what_the_score_owes_to_them(tmp_path):
    masks = looks(tmp_path, attention=True)["masks"]
    assert masks["as they are"]["balanced_accuracy"] == 1
    assert masks["of another site"]["balanced_accuracy"] == 0, (
        "every neighbour is of the other class"
    )
    assert masks["taken away"]["balanced_accuracy"] == 0.5


def test_maps_come_back_as_they_were_with_how_unequal_they_are(tmp_path):
    found = looks(tmp_path, attention=True)["attention"]
    assert found["low"] == pytest.approx(0.525) and found["contrast"] == pytest.approx(0.45)
    maps = looked.read_maps(tmp_path, "attention")
    assert set(maps) == {f"site{at}" for at in range(10, 20)}
    np.testing.assert_allclose(maps["site10"], np.linspace(0.5, 1, 16).reshape(4, 4), atol=1e-6)


def test_networks_without_attention_and_trained_without_masks_are_not_asked(tmp_path):
    found = looks(tmp_path, attention=False, mask_use="none")
    assert set(found) == {"sites", "occlusion"}
    assert looked.read_maps(tmp_path, "attention") == {}


def test_equal_attention_has_no_contrast():
    assert looked.spread(np.full((3, 4, 4), 0.9))["contrast"] == 0


def test_what_a_network_without_attention_looks_at_is_found_by_hiding_it(tmp_path):
    """It looks at the middle of the image: windows there cost what the answer owes to it, those at the edge nothing."""
    found = looks(tmp_path, attention=False)["occlusion"]
    maps = looked.read_maps(tmp_path, "occlusion")
    assert len(maps) == 2, "a site a class"
    for lost in maps.values():
        assert lost.shape == (8, 8)
        assert lost[3:5, 3:5].min() == pytest.approx(0.4, abs=1e-6), (
            "windows of four pixels hide all of it"
        )
        assert abs(lost[0]).max() == abs(lost[:, -1]).max() == 0
    assert found["largest"] == pytest.approx(0.4, abs=1e-6) and 0 <= found["on_cells"] <= 1


def test_a_disc_holds_its_cell_and_tells_no_shape():
    mask = np.zeros((40, 40), np.uint16)
    mask[10, 5:16] = 3  # a line
    mask[30:34, 30:34] = 7
    drawn = draw_disks(mask)
    assert (drawn[mask == 3] == 3).all() and (drawn[mask == 7] == 7).all()
    assert drawn[5:16, 10].tolist() == [3] * 11 and drawn[5, 5] == 0, "round"
    assert (drawn == 7).sum() >= 16 and set(np.unique(drawn)) == {0, 3, 7}
    assert not draw_disks(np.zeros((4, 4), np.uint16)).any()
    assert (mask[10] == 3).sum() == 11, "the mask itself stays"
