import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tifffile

from perturbjax.core.errors import InputError
from perturbjax.segmentation import training_crops
from perturbjax.segmentation.image_folders import LabeledImage, read_folder
from perturbjax.segmentation.train import (
    TrainSegmenterConfig,
    segmentation_loss,
    split_images,
    train,
)
from perturbjax.segmentation.training_crops import CropConfig
from perturbjax.segmentation.weights import load_weights, read_card

pytestmark = pytest.mark.full

STILL = CropConfig(crop=64, diameter=16, zoom=1, gamma=1, contrast=1, brightness=0, noise=0)


def _disks(seed: int, size: int = 64) -> LabeledImage:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint32)
    for number, (row, column) in enumerate([(16, 16), (16, 46), (46, 20), (46, 48)], start=1):
        labels[(y - row) ** 2 + (x - column) ** 2 < rng.integers(36, 90)] = number
    image = (labels > 0) + rng.normal(0, 0.1, labels.shape)
    return LabeledImage(f"disks{seed}", image.astype(np.float32), labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(4):
        picture = _disks(seed)
        tifffile.imwrite(
            tmp_path / f"{picture.name}.tif", (1000 + 500 * picture.image).astype(np.uint16)
        )
        suffix = "_masks" if seed == 3 else "_labels"
        tifffile.imwrite(tmp_path / f"{picture.name}{suffix}.tif", picture.labels.astype(np.uint16))
    return tmp_path


def _config(folder: Path, out: Path, **changes) -> TrainSegmenterConfig:
    config = TrainSegmenterConfig(
        images=(folder,),
        out=out,
        widths=(4, 8),
        steps=4,
        batch=2,
        held_out=0.25,
        checkpoint_every=2,
        crops=STILL,
    )
    return replace(config, **changes)


def test_draw_rotates_flows_with_the_image():
    """In every crop the flow points into the disk."""
    pool = training_crops.make_pool([_disks(0)], STILL)
    drawn = training_crops.draw(pool, jax.random.split(jax.random.key(1), 8), STILL)
    for inside, flow in zip(np.asarray(drawn.inside), np.asarray(drawn.flow), strict=True):
        import scipy.ndimage as ndi

        depth = ndi.gaussian_filter(ndi.distance_transform_edt(inside > 0.5), 1)
        rise = np.stack(np.gradient(depth), -1)
        rim = (depth > 1) & (depth < 4)
        cosine = (rise * flow).sum(-1)[rim] / (
            np.linalg.norm(rise, axis=-1) * np.linalg.norm(flow, axis=-1)
        )[rim]
        assert np.median(cosine) > 0.95


@pytest.mark.slow
def test_draw_scales_objects_to_the_diameter():
    pool = training_crops.make_pool([_disks(0)], replace(STILL, diameter=32))
    scale = float(pool.scale[0])
    drawn = training_crops.draw(
        pool, jax.random.split(jax.random.key(0), 16), replace(STILL, diameter=32)
    )
    fractions = float(drawn.inside.mean()), float(pool.pixels[:, 1].mean())
    assert scale > 1.5 and fractions[0] == pytest.approx(fractions[1], rel=0.5)


@pytest.mark.slow
def test_segmentation_loss_ignores_pixels_outside_the_image():
    drawn = training_crops.draw(
        training_crops.make_pool([_disks(0, 64)], STILL),
        jax.random.split(jax.random.key(2), 4),
        STILL,
    )
    outside = np.asarray(drawn.weight) == 0
    assert outside.any()
    assert (np.asarray(drawn.image)[outside] == 0).all() and (
        np.asarray(drawn.inside)[outside] == 0
    ).all()
    maps = jax.numpy.zeros((*outside.shape, 3))
    spoiled = maps.at[..., 2].set(np.where(outside, 50.0, 0))
    assert segmentation_loss(maps, drawn) == segmentation_loss(spoiled, drawn)


@pytest.mark.slow
def test_train_lowers_the_loss_and_writes_weights(folder, tmp_path, capsys):
    out = tmp_path / "out" / "net.safetensors"
    train(_config(folder, out, steps=30, checkpoint_every=10, learning_rate=0.02))
    losses = [
        float(line.split()[-1])
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("step")
    ]
    assert losses[-1] < 0.7 * losses[0]
    config, _ = load_weights(out)
    assert config.nbase == (1, 4, 8) and config.diam_mean == 16
    assert read_card(out)["data"] == {folder.name: 4} and set(read_card(out)["held_out"]) == {
        folder.name
    }
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # the checkpoint is removed


@pytest.mark.slow
def test_train_resumes_to_the_same_weights(folder, tmp_path):
    whole, killed = tmp_path / "a" / "net.safetensors", tmp_path / "b" / "net.safetensors"
    train(_config(folder, whole))
    script = (
        "import os, perturbjax.segmentation.train as t, tests.segmentation.test_train as me\n"
        "from pathlib import Path\n"
        "save = t._save_checkpoint\n"
        "t._save_checkpoint = lambda *a: (save(*a), os._exit(9))\n"
        f"t.train(me._config(Path({str(folder)!r}), Path({str(killed)!r})))\n"
    )
    root = Path(__file__).parents[2]
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True).returncode
        == 9
    )
    assert not killed.exists()
    with pytest.raises(InputError, match="other settings"):
        train(_config(folder, killed, seed=1))
    train(_config(folder, killed))
    assert killed.read_bytes() == whole.read_bytes()


def test_split_images_keeps_validation_images_when_a_folder_grows():
    images = [_disks(0)._replace(name=str(number)) for number in range(40)]
    training, validation = split_images(images[:20], 0.2)
    assert len(validation) == 4 and not {i.name for i in training} & {i.name for i in validation}
    assert split_images(images[:20][::-1], 0.2)[1] == validation


def test_read_folder_refuses_masks_without_objects(folder, tmp_path):
    for path in [*folder.glob("*_labels.tif"), *folder.glob("*_masks.tif")]:
        tifffile.imwrite(path, np.zeros((64, 64), np.uint16))
    with pytest.raises(InputError, match="no mask contains an object"):
        train(_config(folder, tmp_path / "net.safetensors"))


def test_read_folder_separates_objects_of_a_binary_mask(folder, capsys):
    path = folder / "disks1_labels.tif"
    tifffile.imwrite(path, np.where(tifffile.imread(path) > 0, 255, 0).astype(np.uint8))
    images = {image.name: image for image in read_folder(folder)}
    assert images["disks1"].labels.max() == 4
    assert "1 masks have one value for all objects" in capsys.readouterr().err


def _break_missing(folder: Path) -> None:
    (folder / "disks1_labels.tif").unlink()


def _break_two(folder: Path) -> None:
    (folder / "disks1_masks.tif").write_bytes((folder / "disks1_labels.tif").read_bytes())


def _break_size(folder: Path) -> None:
    tifffile.imwrite(folder / "disks1_labels.tif", np.zeros((5, 5), np.uint16))


def _break_kind(folder: Path) -> None:
    tifffile.imwrite(folder / "disks1_labels.tif", np.zeros((64, 64), np.float32))


def _break_file(folder: Path) -> None:
    (folder / "disks1.tif").write_bytes(b"not an image")


def _break_colour(folder: Path) -> None:
    tifffile.imwrite(folder / "disks1.tif", np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("break_folder", "message"),
    [
        (_break_missing, "has no mask disks1_labels.tif"),
        (_break_two, "has both disks1_labels and disks1_masks"),
        (_break_size, r"\(5, 5\) pixels, but its image is \(64, 64\)"),
        (_break_kind, "whole numbers"),
        (_break_file, "cannot be read"),
        (_break_colour, "one channel"),
    ],
)
def test_read_folder_names_the_bad_file(folder, break_folder, message):
    break_folder(folder)
    with pytest.raises(InputError, match=message) as caught:
        read_folder(folder)
    assert "disks1" in str(caught.value) and "\n" not in str(caught.value)


def test_crop_config_refuses_sizes_that_are_not_multiples_of_16():
    with pytest.raises(InputError, match="--crop 50: must be a multiple of 16"):
        replace(STILL, crop=50)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"out": Path("net.pth")}, "--out"),
        ({"steps": 0}, "--steps"),
        ({"held_out": 1.0}, "--held-out"),
        ({"widths": (4, 0)}, "--widths"),
        ({"init_from": "no_such"}, "--init-from"),
        ({"images": (Path("no_such_folder"),)}, "--images"),
        ({"held_out": 0.9, "images": ()}, "--images"),
    ],
)
def test_train_names_the_bad_setting(folder, tmp_path, change, flag):
    with pytest.raises(InputError, match=flag):
        train(replace(_config(folder, tmp_path / "net.safetensors"), **change))
