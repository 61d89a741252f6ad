from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest
import tifffile
from skimage.draw import disk

from data_prep import segment
from data_prep.segment import SegmenterConfig
from data_prep.segment.watershed import Watershed
from perturbjax.core.errors import InputError
from perturbjax.segmentation import average_precision as precision

pytestmark = pytest.mark.full


def average_precision(truth: np.ndarray, labels: np.ndarray, iou: float = 0.5) -> float:
    return float(precision.match(truth, labels, [iou]).average_precision[0])


@pytest.mark.parametrize("diameter", [0.0, 24.0])
def test_watershed_separates_touching_nuclei(diameter):
    image = np.full((96, 96), 300.0)
    for centre in ((30, 30), (30, 52), (60, 40)):
        image[disk(centre, 12)] = 5000
    image += np.random.default_rng(0).normal(0, 40, image.shape)
    mask = Watershed().segment(image.astype(np.uint16)[..., None], diameter)
    assert mask.dtype == np.uint16 and mask.max() == 3
    assert len({mask[30, 30], mask[30, 52], mask[60, 40]} - {0}) == 3


def test_watershed_segments_nuclei_in_haze():
    """A single threshold would make the haze one object."""
    rows, columns = np.mgrid[:256, :256]
    image = 200 + 2000 * np.exp(-((rows - 128) ** 2 + (columns - 90) ** 2) / 2 / 70**2)
    centres = [(row, column) for row in range(20, 256, 36) for column in range(20, 256, 36)]
    for centre in centres:
        image[disk(centre, 9)] += 2500
    mask = Watershed().segment(image.astype(np.uint16)[..., None])
    assert mask.max() == len(centres)


def test_watershed_returns_empty_mask_for_constant_image():
    assert Watershed().segment(np.full((32, 32, 1), 500, np.uint16)).max() == 0


def test_watershed_segments_simulated_nuclei(simulated):
    table = pd.read_csv(simulated / "load_data.csv")
    scores = []
    for name in table["FileName_OrigDNA"]:
        image = tifffile.imread(simulated / "images" / name[:6] / name)
        truth = tifffile.imread(simulated / "truth" / name.replace("DNA", "nuclei_mask"))
        scores.append(average_precision(truth, Watershed().segment(image[..., None])))
    assert np.mean(scores) > 0.9


@pytest.mark.shared
def test_watershed_on_real_nuclei(shared):
    """Every second of the 40 DSB2018 test images; measured on all: 0.74."""
    labels = sorted((shared / "data/dsb2018_nuclei/test").glob("*_labels.tif"))[::2]
    scores = []
    for path in labels:
        image = tifffile.imread(path.with_name(path.name.replace("_labels", "")))
        scores.append(
            average_precision(
                tifffile.imread(path).astype(int), Watershed().segment(image[..., None])
            )
        )
    print(f"watershed, mean AP at IoU 0.5: {np.mean(scores):.3f}")
    assert np.mean(scores) > 0.70


def test_watershed_has_no_weights():
    with pytest.raises(InputError, match="--weights nuclei: the watershed has no weights"):
        segment.create(SegmenterConfig("watershed", "nuclei"))


@pytest.mark.shared
def test_cellpose_agrees_with_the_package_and_describes_itself(shared):
    pytest.importorskip("cellpose")
    weights = shared / "data/weights/nuclei_dsb2018"
    engines = ("cellpose", "cellpose-torch")
    ours, oracle = (segment.create(SegmenterConfig(name, str(weights), 45.0)) for name in engines)
    for engine, name, version in (
        (ours, "cellpose", "perturbjax"),
        (oracle, "cellpose-torch", "3.1"),
    ):
        described = engine.describe()
        assert described["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert (described["engine"], described["weights"]) == (name, "nuclei_dsb2018")
        assert described["version"].startswith(version)
    assert ours.describe()["precision"] == "float32"
    files = sorted((shared / "data/bbbc021_cells/images/Week10_40111").glob("*_DNA.tiff"))[:4]
    images = [tifffile.imread(path)[..., None] for path in files]
    for image, mask in zip(
        images, ours.segment_all([(image, 0.0) for image in images]), strict=True
    ):
        assert mask.shape == image.shape[:2] and mask.dtype == np.uint16 and mask.max() >= 1
        assert average_precision(oracle.segment(image).astype(int), mask.astype(int), 0.9) == 1


def test_create_uses_the_precision():
    assert (
        segment.create(SegmenterConfig("nuclei", precision="bfloat16")).describe()["precision"]
        == "bfloat16"
    )


@pytest.fixture
def torch_file(tmp_path):
    torch = pytest.importorskip("torch")

    def write(**tensors):
        path = tmp_path / "some_weights"
        torch.save({name: torch.zeros(2) for name in tensors.get("names", ())}, path)
        return path

    return write


def test_check_weights_refuses_the_other_version(torch_file):
    pytest.importorskip("cellpose")
    from data_prep.segment.cellpose_torch import check_weights

    with pytest.raises(
        InputError, match=r"belong to cellpose 4, but cellpose 3\.1\.1 is installed"
    ):
        check_weights(
            path := torch_file(names=["module.W2", "module.out.weight"]), str(path), 3, "3.1.1"
        )
    with pytest.raises(
        InputError, match=r"belong to cellpose 3, but cellpose 4\.0\.6 is installed"
    ):
        check_weights(path := torch_file(names=["output.2.weight"]), str(path), 4, "4.0.6")
    with pytest.raises(InputError, match="is not a cellpose weights file"):
        check_weights(path := torch_file(names=["fc.weight"]), str(path), 3, "3.1.1")


def test_check_weights_does_not_run_a_pickle(tmp_path):
    pytest.importorskip("cellpose")
    import os
    import pickle

    from data_prep.segment.cellpose_torch import check_weights

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="is not a cellpose weights file"):
        check_weights(path, str(path), 3, "3.1.1")
    assert not (tmp_path / "sprung").exists()


def test_find_weights_lists_the_models():
    pytest.importorskip("cellpose")
    from data_prep.segment.cellpose_torch import find_weights

    with pytest.raises(
        InputError,
        match=r"--weights cyto9: no such file, and cellpose 3 has no model .* cyto3, nuclei",
    ):
        find_weights("cyto9", 3)
    with pytest.raises(InputError, match="needs --weights"):
        find_weights("", 3)


@pytest.mark.parametrize("installed", ["3.0.11", "2.2", "5.0"])
def test_installed_version_refuses_untested_versions(monkeypatch, installed):
    from data_prep.segment import cellpose_torch

    monkeypatch.setattr(cellpose_torch, "version", lambda _: installed)
    with pytest.raises(
        InputError, match=f"cellpose {installed} is installed; 3.1 and 4 are supported"
    ):
        cellpose_torch.installed_version()
