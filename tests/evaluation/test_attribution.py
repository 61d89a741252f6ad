"""Attribution: attention contrast, occlusion and changed masks."""

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
from perturbjax.evaluation import attribution
from perturbjax.inference import Network
from perturbjax.training.apply_network import Predictions


class MaskReader(Network):
    """Network that predicts class 1 from the mean of the mask, with optional attention."""

    def __init__(self, *, attention: bool, mask_use: str = "keep"):
        recipe = SimpleNamespace(input=InputConfig(mask_use=mask_use))
        object.__setattr__(self, "run", SimpleNamespace(recipe=recipe, class_names=["a", "b"]))
        object.__setattr__(self, "has_attention", attention)

    def apply_with_masks(self, dataset, positions, changes) -> list[Predictions]:
        masks = np.stack([np.full((4, 4), position % 2, np.uint8) for position in positions])
        return [self._read(one.change(masks)) for one in changes.values()]

    def _read(self, masks) -> Predictions:
        one = masks.mean(axis=(1, 2)).astype(np.float32)
        return Predictions(np.stack([1 - one, one], axis=1), np.zeros((len(one), 2), np.float32))

    def site_features(self, *_):
        return None  # no frozen backbone

    def changed(self, dataset, positions, change, site_features=None) -> Predictions:
        """Predict class 1 from the brightness of the image center, in two batches."""
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
        if not self.has_attention:
            raise InputError("attention: masked_cnn has none")
        return np.tile(
            np.linspace(0.5, 1, 16, dtype=np.float32).reshape(4, 4), (len(positions), 1, 1)
        )


def compute_attribution(tmp_path, **network) -> dict:
    dataset = open_dataset(write_dataset(tmp_path / "data", sites=20, size=8, channels=["DNA"]))
    positions = np.arange(10, 20)
    one = (positions % 2).astype(np.float32)
    attribution.write_attribution(
        MaskReader(**network),
        dataset,
        positions,
        positions % 2,
        np.stack([1 - one, one], axis=1),
        tmp_path,
    )
    return attribution.read_attribution(tmp_path)


def test_changed_masks_lower_the_score(tmp_path):
    masks = compute_attribution(tmp_path, attention=True)["masks"]
    assert masks["unchanged"]["balanced_accuracy"] == 1
    assert masks["masks of another site"]["balanced_accuracy"] == 0, (
        "neighbors have the other class"
    )
    assert masks["no masks"]["balanced_accuracy"] == 0.5


def test_attention_maps_round_trip(tmp_path):
    result = compute_attribution(tmp_path, attention=True)["attention"]
    assert result["low"] == pytest.approx(0.525) and result["contrast"] == pytest.approx(0.45)
    maps = attribution.read_maps(tmp_path, "attention")
    assert set(maps) == {f"site{at}" for at in range(10, 20)}
    np.testing.assert_allclose(maps["site10"], np.linspace(0.5, 1, 16).reshape(4, 4), atol=1e-6)


def test_attribution_without_attention_and_masks(tmp_path):
    result = compute_attribution(tmp_path, attention=False, mask_use="none")
    assert set(result) == {"sites", "occlusion"}
    assert attribution.read_maps(tmp_path, "attention") == {}


def test_read_attribution_reads_former_file(tmp_path):
    (tmp_path / "looked.json").write_text('{"sites": 3}')
    assert attribution.read_attribution(tmp_path) == {"sites": 3}


def test_attention_contrast_of_uniform_attention_is_zero():
    assert attribution.attention_contrast(np.full((3, 4, 4), 0.9))["contrast"] == 0


def test_occlusion_maps_locate_informative_windows(tmp_path):
    """The network uses the image center, so only central windows lower the probability."""
    result = compute_attribution(tmp_path, attention=False)["occlusion"]
    maps = attribution.read_maps(tmp_path, "occlusion")
    assert len(maps) == 2, "one site per class"
    for drops in maps.values():
        assert drops.shape == (8, 8)
        assert drops[3:5, 3:5].min() == pytest.approx(0.4, abs=1e-6), (
            "windows of four pixels cover the center"
        )
        assert abs(drops[0]).max() == abs(drops[:, -1]).max() == 0
    assert result["largest"] == pytest.approx(0.4, abs=1e-6) and 0 <= result["on_cells"] <= 1


def test_draw_disks_covers_cells():
    mask = np.zeros((40, 40), np.uint16)
    mask[10, 5:16] = 3  # a line
    mask[30:34, 30:34] = 7
    drawn = draw_disks(mask)
    assert (drawn[mask == 3] == 3).all() and (drawn[mask == 7] == 7).all()
    assert drawn[5:16, 10].tolist() == [3] * 11 and drawn[5, 5] == 0, "round"
    assert (drawn == 7).sum() >= 16 and set(np.unique(drawn)) == {0, 3, 7}
    assert not draw_disks(np.zeros((4, 4), np.uint16)).any()
    assert (mask[10] == 3).sum() == 11, "the input is unchanged"
