"""Attribution of classes to compartments and channels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from perturbjax import dataset as datasets
from perturbjax.cli.evaluate import ApplyConfig, EvaluateConfig, evaluate
from perturbjax.core.config import AugmentConfig, SplitConfig, preset
from perturbjax.data.augmentation import RawBatch
from perturbjax.dataset import open_dataset
from perturbjax.evaluation.class_attribution import (
    CLASS_ATTRIBUTION,
    choose_sites,
    compartments,
    part_losses,
    summarize,
)
from perturbjax.inference import Network
from perturbjax.report.run_page import write_report
from perturbjax.training.apply_network import Predictions
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.fit import TrainConfig, fit

SIZE = 32


def write_plate(path, *, sites: int = 48, has_nuclei: bool = False):
    """Write two classes that differ by the stripes of channel Actin in the cells only."""
    rng = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE), np.uint16)
    mask[8:24, 8:24] = 1
    nuclei = np.zeros_like(mask)
    nuclei[12:20, 12:20] = 1
    striped = np.arange(sites) // 2 % 2
    images = rng.integers(900, 1100, (sites, SIZE, SIZE, 2)).astype(np.uint16)
    for image, has_stripes in zip(images, striped, strict=True):
        image[mask > 0] += 500
        if has_stripes:
            image[8:24:4, 8:24, 1] += 1500
    table = pd.DataFrame(
        {
            "site_id": [f"s{number}" for number in range(sites)],
            "Metadata_Plate": "P1",
            "Metadata_Well": [f"{'ABCDEF'[n // 8]}{n // 2 % 4 + 1:02d}" for n in range(sites)],
            "Metadata_Site": [str(number % 2 + 1) for number in range(sites)],
            "Metadata_pert_iname": np.where(striped, "striped", "DMSO"),
        }
    )
    kinds = {"nuclei": nuclei} if has_nuclei else {}
    return datasets.write_dataset(
        path,
        table,
        (datasets.SitePixels(image, mask, **kinds) for image in images),
        channel_names=["DNA", "Actin"],
        image_dtype=np.uint16,
        label_column="Metadata_pert_iname",
        has_nuclei=has_nuclei,
    )


class ActinReader(Network):
    """Network whose class 1 is the standard deviation of Actin in the nuclei."""

    def __init__(self):
        object.__setattr__(self, "run", SimpleNamespace(class_names=["DMSO", "striped"]))

    def site_features(self, *_):
        return None  # no frozen backbone

    def changed(self, dataset, positions, change, site_features=None) -> Predictions:
        images = np.stack([dataset.pixels(int(position))[0] for position in positions])
        rest = np.zeros(len(positions))
        batch = change(RawBatch(images, rest, rest, positions, rest, rest, rest), 0)
        one = np.minimum(batch.image[:, 12:20, 12:20, 1].std(axis=(1, 2)) / 1000, 1)
        probabilities = np.stack([1 - one, one], axis=1).astype(np.float32)
        return Predictions(probabilities, np.zeros((len(one), 2), np.float32))


def test_losses_locate_the_compartment_and_channel(tmp_path):
    dataset = open_dataset(write_plate(tmp_path / "data", sites=8, has_nuclei=True))
    striped = np.array([2, 3])
    network = ActinReader()
    unchanged = network.changed(dataset, striped, lambda batch, first: batch).probabilities
    losses = part_losses(network, dataset, striped, unchanged)
    assert losses.shape == (2, 3, 2)
    assert losses[:, 0, 1].min() > 0.3
    assert abs(losses[:, 1:]).max() == abs(losses[..., 0]).max() == 0
    table = summarize(losses, np.array([1, 1]), ["DMSO", "striped"], dataset)
    assert list(table["compartment"].unique()) == ["nucleus", "cytoplasm", "background"]
    assert table.set_index(["compartment", "channel"])["fraction"]["nucleus", "Actin"] == 1
    assert set(table["class"]) == {"striped"} and set(table["sites"]) == {2}
    assert summarize(0 * losses, np.array([1, 1]), ["a", "b"], dataset)["fraction"].isna().all()


def test_compartments_divide_the_site_at_any_resolution(tmp_path):
    dataset = open_dataset(write_plate(tmp_path / "data", sites=2, has_nuclei=True))
    for shape in ((SIZE, SIZE), (16, 16)):
        parts = np.stack(compartments(dataset, 0, shape))
        assert (parts.sum(axis=0) == 1).all()
        np.testing.assert_allclose(parts.mean(axis=(1, 2)), [1 / 16, 3 / 16, 12 / 16])


def test_only_correct_sites_are_chosen():
    labels = np.array([0] * 20 + [1, 1])
    probabilities = np.tile([0.9, 0.1], (22, 1))
    rows = choose_sites(labels, probabilities)
    assert len(rows) == 8 and rows[0] == 0 and rows[-1] == 19
    assert not len(choose_sites(labels[20:], probabilities[20:]))


@pytest.mark.slow  # trains a network, about 20 s
def test_channel_with_the_effect_has_the_largest_fraction(tmp_path):
    data = write_plate(tmp_path / "data")
    recipe = replace(
        preset("demo"),
        augment=AugmentConfig(crop=64, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0)),
        split=SplitConfig(split="well", folds=3),
    )
    run = fit(TrainConfig(out=tmp_path / "run", data=(data,), recipe=recipe)).path
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run)), replicates=20))
    table = pd.read_csv(run / "evaluation" / CLASS_ATTRIBUTION)
    table = table[table["class"] == "striped"]
    fractions = table.set_index(["compartment", "channel"])["fraction"]
    assert fractions.sum() == pytest.approx(1)
    # A background without noise is unlike any site, so that only the cells are compared.
    assert fractions["mask", "Actin"] > 0.4 and fractions["mask", "DNA"] < 0.1
    largest = table.loc[table["fraction"].idxmax()]
    assert (largest["compartment"], largest["channel"]) == ("mask", "Actin")
    page = write_report(run).read_text()
    assert "Channels and compartments of each class" in page and 'class="heat"' in page
