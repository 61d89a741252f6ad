"""Feature extraction: order, resuming, devices, formats, adaptation of the input."""

import json
import os
import subprocess
import sys

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pycytominer
import pytest
import torch
from flax import nnx
from published import write_resnet18
from tiny_dataset import write_dataset

from perturbjax.core.errors import InputError
from perturbjax.data.augmentation import RawBatch
from perturbjax.dataset import open_dataset
from perturbjax.models import Mode
from perturbjax.models.backbone import IMAGENET_SCALING
from perturbjax.models.pooling import pool_stages
from perturbjax.models.symmetries import dihedral
from perturbjax.models.weights import load_pretrained
from perturbjax.profiles import extract as extraction
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.profiles.image_inputs import AdaptConfig, adapt, channel_triples, intensity_range

pytestmark = pytest.mark.full

SITES, CHANNELS = 26, ["DNA", "Actin"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), sites=SITES, size=40, channels=CHANNELS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.safetensors"))


SMALL = AdaptConfig(size=32)


def config(data, weights, out, adapt=SMALL, **changes) -> FeaturesConfig:
    return FeaturesConfig(
        data=(data,),
        out=out,
        backbone="resnet18",
        weights=weights,
        adapt=adapt,
        batch_size=4,
        **changes,
    )


@pytest.fixture(scope="module")
def table(data, weights, tmp_path_factory):
    return extract(config(data, weights, tmp_path_factory.mktemp("features") / "sites.parquet"))


def values(path) -> np.ndarray:
    frame = pd.read_parquet(path)
    return frame[[c for c in frame if not c.startswith("Metadata_")]].to_numpy()


def test_table_has_metadata_then_float32_features_in_record_order(data, table):
    frame, index = pd.read_parquet(table), open_dataset(data).index
    metadata = [column for column in frame if column.startswith("Metadata_")]
    features = list(frame.columns[len(metadata) :])
    assert list(frame.columns[: len(metadata)]) == metadata
    assert (
        features[0] == "resnet18_DNA_0001"
        and features[-1] == "resnet18_Actin_0512"
        and len(features) == 1024
    )
    assert set(frame[features].dtypes) == {np.dtype(np.float32)}
    assert list(frame["Metadata_site_id"]) == list(index["site_id"])
    assert list(frame["Metadata_Well"]) == list(index["Metadata_Well"])
    assert json.loads(pq.read_schema(table).metadata[b"perturbjax"])["naming"] == "torchvision"


def test_channels_as_mean_averages_features_of_channels(data, weights, table, tmp_path):
    mean = values(
        extract(
            config(
                data, weights, tmp_path / "mean.parquet", AdaptConfig(size=32, channels_as="mean")
            )
        )
    )
    joined = values(table)
    assert mean.shape == (SITES, 512)
    np.testing.assert_allclose(mean, (joined[:, :512] + joined[:, 512:]) / 2, atol=1e-6)


def test_features_match_network_on_single_site(data, weights, table):
    dataset = open_dataset(data)
    model = load_pretrained("resnet18", weights).model
    forward = nnx.jit(lambda model, x: model(x, Mode()).features)
    for position in (0, 3, SITES - 1):
        image = dataset.read([position])[0].astype(np.float32)
        for channel, name in enumerate(CHANNELS):
            low, high = (dataset.index.loc[position, f"{p}_{name}"] for p in ("p01", "p99"))
            x = np.clip((image[..., channel] - low) / (high - low if high > low else 1), 0, 1)
            x = jax.image.resize(x, (1, 32, 32), "bilinear", antialias=True)[..., None]
            x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
            row = values(table)[position, channel * 512 : (channel + 1) * 512]
            expected = np.asarray(forward(model, jnp.float32(x)))[0]
            np.testing.assert_allclose(row, expected, atol=1e-4 * np.abs(expected).max())


def test_interrupted_extraction_resumes_with_identical_file(
    data, weights, table, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "PART_BATCHES", 2)
    whole = extract(config(data, weights, tmp_path / "whole.parquet"))
    computed = []

    def interrupted(items, **_):
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    def counted(items, *, done, **_):
        computed.append(done)
        yield from items

    monkeypatch.setattr(extraction, "track", interrupted)
    resumed = config(data, weights, tmp_path / "resumed.parquet")
    with pytest.raises(KeyboardInterrupt):
        extract(resumed)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["whole.parquet"]
    monkeypatch.setattr(extraction, "track", counted)
    extract(resumed)
    assert computed == [4]  # two parts of two batches were finished
    assert resumed.out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.parquet", "whole.parquet"]
    np.testing.assert_array_equal(values(whole), values(table))


def test_parts_of_other_settings_are_not_used(data, weights, tmp_path):
    work = tmp_path / ".out.parquet.extracting"
    work.mkdir()
    (work / "settings.json").write_text('{"backbone": "resnet50"}')
    np.save(work / "part-000000.npy", np.full((64, 1024), 7, np.float32))
    out = extract(config(data, weights, tmp_path / "out.parquet"))
    assert len(values(out)) == SITES and not (values(out) == 7).any()


def test_four_devices_give_the_features_of_one(data, weights, table, tmp_path):
    script = (
        "import sys, jax; from pathlib import Path; from perturbjax.profiles.extract import *\n"
        "from perturbjax.profiles.image_inputs import AdaptConfig\n"
        "assert jax.device_count() == 4\n"
        "extract(FeaturesConfig(data=(Path(sys.argv[1]),), out=Path(sys.argv[3]), "
        "backbone='resnet18', "
        "weights=sys.argv[2], adapt=AdaptConfig(size=32), batch_size=6))"
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", script, str(data), weights, str(tmp_path / "four.parquet")]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    one, four = values(table), values(tmp_path / "four.parquet")
    np.testing.assert_allclose(four, one, atol=1e-4 * np.abs(one).max())


def test_well_level_averages_sites_and_anndata_has_the_same_values(data, weights, table, tmp_path):
    out = extract(config(data, weights, tmp_path / "wells.h5ad", level="well"))
    sites = pd.read_parquet(table)
    features = [c for c in sites if not c.startswith("Metadata_")]
    wells = anndata.read_h5ad(out)
    expected = sites.groupby(["Metadata_Plate", "Metadata_Well"], sort=False)[features].mean()
    assert list(zip(wells.obs["Metadata_Plate"], wells.obs["Metadata_Well"], strict=True)) == list(
        expected.index
    )
    np.testing.assert_allclose(wells.X, expected.to_numpy(), rtol=1e-4, atol=1e-5)
    assert list(wells.var_names) == features
    assert list(wells.obs["Metadata_Site_Count"]) == [3] * 8 + [2]
    assert "Metadata_Site" not in wells.obs and "Metadata_pert_iname" in wells.obs


def test_pycytominer_infers_features_with_prefix(data, weights, tmp_path):
    out = extract(config(data, weights, tmp_path / "sites.parquet", prefix="Cells_"))
    sites = pd.read_parquet(out)
    features = [c for c in sites if not c.startswith("Metadata_")]
    scaled = pycytominer.normalize(out, features="infer", samples="all", method="standardize")
    inferred = [c for c in scaled if c.startswith("Cells_")]
    assert inferred == features
    np.testing.assert_allclose(
        scaled[inferred].std(ddof=0)[sites[features].std() > 1e-6], 1, rtol=1e-3
    )
    strata = ["Metadata_Plate", "Metadata_Well"]
    wells = pycytominer.aggregate(sites, strata=strata, features="infer", operation="mean")
    np.testing.assert_allclose(
        wells[features], sites.groupby(strata)[features].mean(), rtol=1e-4, atol=1e-5
    )


def test_augmentations_average_over_flips_and_rotations(data, weights, tmp_path):
    settings = AdaptConfig(size=32, channels="Actin")
    averaged = values(
        extract(config(data, weights, tmp_path / "all.parquet", settings, augmentations=8))
    )
    model = load_pretrained("resnet18", weights).model
    forward = nnx.jit(lambda model, x: model(x, Mode()).features)
    x = adapted(data, settings, positions=[1])
    views = {
        np.asarray(view).tobytes(): view
        for view in (dihedral(jnp.asarray(x), element) for element in range(8))
    }
    assert len(views) == 8  # eight different images
    expected = np.mean([np.asarray(forward(model, view))[0] for view in views.values()], axis=0)
    np.testing.assert_allclose(averaged[1], expected, atol=1e-4 * np.abs(expected).max())


def test_pool_stages_uses_maps_and_mask_of_the_site(data, weights, tmp_path):
    settings = AdaptConfig(size=32, channels="Actin")
    features = values(
        extract(config(data, weights, tmp_path / "stages.parquet", settings, pool="stages"))
    )
    model, mask = load_pretrained("resnet18", weights).model, open_dataset(data).read([1])[1]
    x = jnp.asarray(adapted(data, settings, positions=[1]))
    expected = pool_stages(model.stage_maps(x, Mode()), jnp.asarray(mask))[0]
    assert features.shape == (SITES, 3 * (64 + 128 + 256))
    np.testing.assert_allclose(features[1], expected, atol=1e-4 * np.abs(expected).max())


def adapted(data, settings: AdaptConfig, positions: list[int]) -> np.ndarray:
    dataset = open_dataset(data)
    image, mask = dataset.read(positions)
    shift, scale = (part[positions] for part in intensity_range(dataset, settings.scale))
    none = np.zeros(len(positions))
    triples = np.array(list(channel_triples(settings.channels, dataset.channel_names).values()))
    return np.asarray(
        adapt(
            RawBatch(image, mask, none, none, none, shift, scale),
            settings,
            triples,
            IMAGENET_SCALING,
        )
    )


class TestAdaptation:
    def test_masked_sets_pixels_outside_cells_to_zero(self, data):
        plain = adapted(data, AdaptConfig(size=0), [1])
        masked = adapted(data, AdaptConfig(size=0, use="masked"), [1])
        inside = open_dataset(data).read([1])[1][0] > 0
        np.testing.assert_allclose(
            masked[:, ~inside],
            np.broadcast_to(
                adapted(data, AdaptConfig(size=0), [0])[0, 0, 0], masked[:, ~inside].shape
            ),
            atol=1e-6,
        )
        np.testing.assert_array_equal(masked[:, inside], plain[:, inside])

    def test_resizing_antialiases_like_torch(self, data):
        native = adapted(data, AdaptConfig(size=0), [1, 2])
        assert native.shape == (4, 40, 40, 3)
        small = adapted(data, AdaptConfig(size=16), [1, 2])
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(native.transpose(0, 3, 1, 2).copy()),
            (16, 16),
            mode="bilinear",
            antialias=True,
        )
        np.testing.assert_allclose(small, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4)

    def test_channel_triples_uses_names(self):
        assert channel_triples("each", ["A", "B"]) == {"A": (0, 0, 0), "B": (1, 1, 1)}
        assert channel_triples("C,A,B", ["A", "B", "C"]) == {"C-A-B": (2, 0, 1)}
        assert channel_triples("B", ["A", "B"]) == {"B": (1, 1, 1)}
        with pytest.raises(InputError, match=r"'D' is not stored \(available: A, B\)"):
            channel_triples("D", ["A", "B"])

    def test_channel_triples_joins_averages_or_forms_rgb(self):
        stored = ["A", "B", "C", "D"]
        assert channel_triples("C,A", stored) == {"C": (2, 2, 2), "A": (0, 0, 0)}
        for channels_as in ("joined", "mean"):
            assert list(channel_triples("C,A,B", stored, channels_as)) == ["C", "A", "B"]
        assert channel_triples("each", stored[:3], "rgb") == {"A-B-C": (0, 1, 2)}
        with pytest.raises(InputError, match='has 2 names, but channels_as="rgb" needs three'):
            channel_triples("A,B", stored, "rgb")
        with pytest.raises(InputError, match="names a channel twice"):
            channel_triples("A,B,A", stored, "joined")

    @pytest.mark.parametrize("scale", ["site", "plate", "dataset", "dtype"])
    def test_intensity_range_follows_scale(self, data, scale):
        dataset = open_dataset(data)
        shift, factor = intensity_range(dataset, scale)
        low, high = dataset.index["p01_Actin"], dataset.index["p99_Actin"]
        if scale == "plate":
            plates = dataset.index["Metadata_Plate"]
            low = plates.map({plate: rows.median() for plate, rows in low.groupby(plates)})
            high = plates.map({plate: rows.quantile(0.95) for plate, rows in high.groupby(plates)})
        if scale == "dataset":
            low, high = 0 * low + low.median(), 0 * high + high.quantile(0.95)
        if scale == "dtype":
            low, high = 0 * low, 0 * high + 65535
        np.testing.assert_allclose(shift[:, 1], low, rtol=1e-6)
        np.testing.assert_allclose((high - shift[:, 1]) * factor[:, 1], 1, rtol=1e-4)
        assert np.isfinite(factor).all()  # including a channel of constant intensity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": ""}, "--weights: is required"),
        (
            {"prefix": "Metadata_x"},
            "--prefix Metadata_x: must be text that does not start with Metadata_",
        ),
        ({"augmentations": 9}, "--augmentations 9: must be 1 to 8"),
        ({"adapt": AdaptConfig(channels="RNA")}, "'RNA' is not stored"),
        ({"backbone": "attention"}, "has no published weights; choose one of resnet18"),
    ],
)
def test_extract_refuses_bad_flags_and_writes_nothing(data, weights, tmp_path, changes, message):
    settings = {
        "data": (data,),
        "out": tmp_path / "out.parquet",
        "backbone": "resnet18",
        "weights": weights,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        extract(FeaturesConfig(**settings))
    assert list(tmp_path.iterdir()) == []
