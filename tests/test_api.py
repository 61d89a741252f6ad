"""Public Python names: predictions for arrays equal those of the commands for datasets."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.export
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

import perturbjax
from perturbjax.cli.evaluate import ApplyConfig, PredictConfig, predict
from perturbjax.core.config import AugmentConfig, InputConfig, ModelConfig, OptimConfig, Recipe
from perturbjax.core.files import file_digest
from perturbjax.data.mask_encodings import encode
from perturbjax.dataset import open_dataset
from perturbjax.export import StableHLOConfig, export
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.pytorch_exchange import ExportConfig, export_run

SITES = 30
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_dataset(
        tmp_path_factory.mktemp("api") / "data", sites=SITES, size=24, channels=["DNA", "Actin"]
    )
    return perturbjax.open_dataset(folder)


def make_recipe(model="attention", normalize="log"):
    return Recipe(
        model=ModelConfig(model=model),
        input=InputConfig(normalize=normalize),
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=8),
    )


def train(dataset, name, model="attention", normalize="log"):
    recipe = make_recipe(model, normalize)
    return fit(
        TrainConfig(out=dataset.path.parent / name, data=(dataset.path,), recipe=recipe)
    ).path


@pytest.fixture(scope="module")
def run(dataset):
    return perturbjax.fit(dataset.path, dataset.path.parent / "run", make_recipe())


def test_classes_of_dataset_and_run_agree(dataset, run):
    assert dataset.class_names == run.class_names == ["DMSO", "taxol"]


def test_predict_equals_the_command(run, dataset, tmp_path):
    written = pd.read_parquet(
        predict(
            PredictConfig(
                ApplyConfig(CheckpointConfig(run.run.path)), (dataset.path,), tmp_path / "p.parquet"
            )
        )
    )
    images, masks = dataset.read(range(SITES))
    pd.testing.assert_frame_equal(
        run.predict(images, masks, dataset.index), written, check_exact=True
    )
    pd.testing.assert_frame_equal(run.predict(dataset), written, check_exact=True)
    assert set(written["part"]) == {"train", "test"} and set(written["label"]) == {"DMSO", "taxol"}


def test_predictions_do_not_depend_on_other_images(run, dataset):
    images, masks = dataset.read(range(SITES))
    together = run.predict(images, masks)
    assert list(together["site_id"]) == [str(number) for number in range(SITES)] and set(
        together["part"]
    ) == {"new"}
    probabilities = [f"prob_{name}" for name in run.class_names]
    for number in (0, 7):
        site = dataset[number]
        alone = run.predict(site["image"][None], site["mask"][None])
        assert np.array_equal(alone[probabilities].iloc[0], together[probabilities].iloc[number])
        assert np.array_equal(
            run.features(images[[number]], masks[[number]]), run.features(dataset)[[number]]
        )
        assert np.array_equal(
            run.attention(images[[number]], masks[[number]]), run.attention(images, masks)[[number]]
        )


def test_attention_maps_have_values_between_0_and_1(run, dataset):
    attention = run.attention(*dataset.read(range(SITES)))
    assert (
        attention.shape == (SITES, 2, 2) and attention.dtype == np.float32
    )  # 16 pixels, downsampled by 2 three times
    assert 0 < attention.min() < attention.max() < 1


@pytest.fixture(scope="module")
def plain(dataset):
    """A run without attention, normalized by the statistics of each site."""
    return perturbjax.load(train(dataset, "plain", model="masked_cnn", normalize="site"))


def test_attention_requires_a_network_with_attention(plain, dataset):
    with pytest.raises(perturbjax.InputError, match="masked_cnn has no attention map"):
        plain.attention(*dataset.read([0]))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_exported_weights_predict_like_their_run(run, dataset, tmp_path, name):
    exported = perturbjax.load(
        export_run(ExportConfig(CheckpointConfig(run.run.path), out=tmp_path / name))
    )
    images, masks = dataset.read(range(SITES))
    pd.testing.assert_frame_equal(
        exported.predict(images, masks), run.predict(images, masks), check_exact=True
    )


def test_load_refuses_weights_without_description(run, tmp_path):
    out = export_run(ExportConfig(CheckpointConfig(run.run.path), out=tmp_path / "w.pth"))
    (tmp_path / "w.pth.json").unlink()
    with pytest.raises(perturbjax.InputError, match="import-torch"):
        perturbjax.load(out)
    with pytest.raises(perturbjax.InputError, match="no such file"):
        perturbjax.load(tmp_path / "absent.safetensors")


def test_predict_requires_masks_and_one_row_per_image(run, dataset):
    images, masks = dataset.read([0, 1])
    with pytest.raises(perturbjax.InputError, match="masks: required with images"):
        run.predict(images)
    with pytest.raises(perturbjax.InputError, match="sites: 1 rows for 2 images"):
        run.predict(images, masks, dataset.index[:1])


def test_dataset_returns_sites_by_position(dataset):
    last = dataset[-1]
    assert last["site_id"] == f"site{SITES - 1}" and last["Metadata_pert_iname"] in (
        "DMSO",
        "taxol",
    )
    assert last["image"].shape == (24, 24, 2) and last["mask"].shape == (24, 24)
    with pytest.raises(IndexError):
        dataset[SITES]


def test_notebook_display_has_counts_classes_and_images(run, dataset):
    for page in (dataset._repr_html_(), run._repr_html_()):
        assert "DMSO" in page and "taxol" in page and "<b>DNA, Actin</b>" in page
        assert page.count("<img ") == 2 and 'alt="DMSO, site0"' in page
    assert "<b>30</b>" in dataset._repr_html_() and "30 sites of 24×24 pixels" in repr(dataset)
    assert "attention, epoch 1, 2 classes" in repr(run)


def test_notebook_display_escapes_compound_names(dataset):
    dataset = perturbjax.open_dataset(dataset.path)
    dataset.index["Metadata_pert_iname"] = "<script>"
    assert "<script>" not in dataset._repr_html_() and "&lt;script&gt;" in dataset._repr_html_()


def test_create_returns_a_network_for_custom_training():
    network = perturbjax.create("attention", classes=7)
    outputs = network(jnp.zeros((2, 32, 32, 2)), perturbjax.Mode())
    assert outputs.logits.shape == (2, 7) and outputs.attention.shape == (2, 4, 4)


def test_public_names_are_imported_at_first_use():
    code = (
        "import sys, perturbjax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; "
        + "; ".join(f"perturbjax.{name}" for name in perturbjax.__all__)
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert set(perturbjax.__all__) <= set(dir(perturbjax))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = perturbjax.lod


EXAMPLES = (
    perturbjax.load,
    perturbjax.open_dataset,
    perturbjax.create,
    perturbjax.segment,
    perturbjax.preset,
)


@pytest.mark.parametrize("documented", EXAMPLES, ids=lambda documented: documented.__name__)
def test_docstring_examples_run(documented, run, dataset, tmp_path, monkeypatch):
    (tmp_path / "run").symlink_to(run.run.path)
    (tmp_path / "dataset").symlink_to(dataset.path)
    monkeypatch.chdir(tmp_path)
    images, masks = dataset.read(range(SITES))
    names = {"perturbjax": perturbjax, "np": np, "jnp": jnp, "images": images, "masks": masks}
    (examples,) = doctest.DocTestFinder(recurse=False).find(documented, globs=names)
    assert (
        examples.examples
        and not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples).failed
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(
        StableHLOConfig(CheckpointConfig(run.run.path), out=tmp_path_factory.mktemp("exported"))
    )


def reloaded(folder):
    description = json.loads((folder / "description.json").read_text())
    file = folder / description["file"]
    assert file_digest(file) == description["sha256"]
    return jax.export.deserialize(file.read_bytes()), description


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCKS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


def write_profiles(path):
    """Profiles of 16 control wells, and of one compound at six doses, on each of two plates."""
    wells = [("DMSO", 0.0)] * 16 + [("taxol", 10.0**-step) for step in range(6)]
    rows = [(f"P{plate}", *well) for plate in (1, 2) for well in wells]
    table = pd.DataFrame(
        rows, columns=["Metadata_Plate", "Metadata_pert_iname", "Metadata_dose_uM"]
    )
    numbers = table.groupby("Metadata_Plate").cumcount()
    table["Metadata_Well"] = [f"{'ABCD'[n // 6]}{n % 6 + 1:02d}" for n in numbers]
    rng = np.random.default_rng(0)
    for name in ("n_cells", "Nuclei_Area", "Nuclei_Intensity"):
        table[name] = rng.normal(100, 5, len(table)) - 30 * (table["Metadata_dose_uM"] > 1e-3)
    table.to_parquet(path)


@pytest.mark.parametrize(
    ("page", "block"), BLOCKS, ids=[f"{page.stem}-{at}" for at, (page, _) in enumerate(BLOCKS)]
)
def test_python_blocks_of_the_pages_run(page, block, run, dataset, exported, tmp_path, monkeypatch):
    inputs = {"run": run.run.path, "dataset": dataset.path, "exported": exported}
    for name, path in {**inputs, "split.parquet": run.run.path / "split.parquet"}.items():
        (tmp_path / name).symlink_to(path)
    export_run(ExportConfig(CheckpointConfig(run.run.path), out=tmp_path / "weights.safetensors"))
    (tmp_path / "segmenter.safetensors").symlink_to(
        REPOSITORY / "perturbjax/segmentation/weights/nuclei_small.safetensors"
    )
    write_profiles(tmp_path / "profiles.parquet")
    monkeypatch.chdir(tmp_path)
    images, masks = dataset.read(range(4))
    names = {"perturbjax": perturbjax, "run": run, "images": images, "masks": masks}
    exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("count", [1, 7])
def test_exported_network_predicts_any_number_of_images(run, dataset, exported, count):
    network, description = reloaded(exported)
    images, masks = dataset.read(range(count))
    probabilities, features = network.call(images, (masks > 0).astype(np.uint8))
    expected = run.network.apply(images, masks)
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(features, expected.features, atol=1e-5)
    assert description["classes"] == run.class_names and description["channels"] == ["DNA", "Actin"]
    assert description["mask"] == "1 in cells, 0 for background"
    assert [one["shape"] for one in description["inputs"]] == [["b", 24, 24, 2], ["b", 24, 24]]


def test_exported_network_takes_image_statistics_as_input(plain, dataset, tmp_path):
    network, description = reloaded(
        export(StableHLOConfig(CheckpointConfig(plain.run.path), out=tmp_path / "out"))
    )
    images, masks = dataset.read(range(3))
    assert [one["name"] for one in description["inputs"]] == ["image", "mask", "shift", "scale"]
    probabilities, _ = network.call(
        images, (masks > 0).astype(np.uint8), *plain.network.intensities(images)
    )
    np.testing.assert_allclose(probabilities, plain.network.predict(images, masks), atol=1e-6)


def test_exported_network_supports_all_platforms(exported):
    network, _ = reloaded(exported)
    assert set(network.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.parametrize("encoding", [pytest.param("binary", marks=pytest.mark.full), "distance"])
def test_exported_network_downsamples_large_sites_like_predict(tmp_path, encoding):
    """Sites of 67 pixels and crops of 16: stored sites are downsampled by 2 with rounding."""
    data = open_dataset(
        write_dataset(tmp_path / "data", sites=24, size=67, channels=["DNA", "Actin"])
    )
    recipe = Recipe(
        model=ModelConfig(model="masked_cnn"),
        input=InputConfig(normalize="log", mask_encoding=encoding),
        augment=AugmentConfig(crop=16, crop_scale=(0.3, 1.0)),
        optim=OptimConfig(epochs=1, batch_size=8),
    )
    path = fit(TrainConfig(out=tmp_path / "run", data=(data.path,), recipe=recipe)).path
    network, description = reloaded(
        export(StableHLOConfig(CheckpointConfig(path), out=tmp_path / "exported"))
    )
    images, masks = data.read(range(6))
    stored = [encode(mask if encoding == "binary" else halve(mask), encoding) for mask in masks]
    probabilities, features = network.call(images, np.stack(stored))
    expected = perturbjax.load(path).network.apply(images, masks)
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(features, expected.features, atol=1e-4)
    assert ("downsampled by 2 1 times" in description["mask"]) == (encoding == "distance")


def halve(mask):
    """Downsample instance labels as `description.json` says."""
    return np.pad(mask, [(0, length % 2) for length in mask.shape], mode="edge")[1::2, 1::2]
