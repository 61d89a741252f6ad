"""The same pixels in different file formats give datasets with the same content checksum."""

from __future__ import annotations

import json
from pathlib import Path

import plate_formats
import pytest
from data_prep_builds import options

from data_prep.build import build
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


def content(dataset: Path) -> str:
    return json.loads((dataset / "provenance.json").read_text())["content_sha256"]


@pytest.fixture(scope="module")
def from_tiff(simulated, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("built") / "dataset"
    build(options(simulated, out, segmenter="watershed"))
    return content(out)


@pytest.mark.parametrize("kind", ["ome_tiff", "ome_stack", "png"])
def test_every_format_builds_the_same_dataset(simulated, from_tiff, tmp_path, kind):
    plate = getattr(plate_formats, f"as_{kind}")(simulated, tmp_path / "plate")
    project = "middle" if kind == "ome_stack" else "none"
    build(options(plate, tmp_path / "dataset", segmenter="watershed", project=project))
    assert content(tmp_path / "dataset") == from_tiff


def test_stack_requires_a_projection_which_is_recorded(simulated, tmp_path):
    plate = plate_formats.as_ome_stack(simulated, tmp_path / "plate")
    with pytest.raises(
        InputError, match=r"load_data.csv, row 2: .* is a stack of 3 planes; .*--project"
    ):
        build(options(plate, tmp_path / "dataset", segmenter="watershed"))
    assert [path.name for path in tmp_path.iterdir()] == ["plate"]
    build(options(plate, tmp_path / "dataset", segmenter="watershed", project="max"))
    assert json.loads((tmp_path / "dataset/provenance.json").read_text())["project"] == "max"
    with pytest.raises(InputError, match="contains a dataset of other settings"):
        build(options(plate, tmp_path / "dataset", segmenter="watershed", project="mean"))
    assert open_dataset(tmp_path / "dataset").channel_names == ["DNA", "Actin", "Tubulin"]
