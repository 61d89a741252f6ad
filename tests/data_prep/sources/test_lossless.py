from __future__ import annotations

import imagecodecs
import numpy as np
import pytest

from data_prep.sources import Plane, probe_planes, read_planes
from perturbjax.core.errors import InputError

ENCODERS = {
    "png": imagecodecs.png_encode,
    "jls": imagecodecs.jpegls_encode,
    "jp2": imagecodecs.jpeg2k_encode,
}


def written(tmp_path, kind: str, image: np.ndarray):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(ENCODERS[kind](image, **({"level": 0} if kind == "jp2" else {})))
    return Plane(str(path), "DNA")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_pixels_come_back_as_they_were(tmp_path, kind, dtype):
    image = np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (40, 30), dtype=dtype, endpoint=True
    )
    plane = written(tmp_path, kind, image)
    found = read_planes([plane], "row 2")[plane]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, image)
    probe = probe_planes([plane], "row 2")[plane]
    assert (probe.dtype, probe.shape) == (dtype, (40, 30))


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_colours_are_refused(tmp_path, look):
    plane = written(tmp_path, "png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"row 2: .*a\.png has 3 samples a pixel"):
        look([plane], "row 2")


@pytest.mark.parametrize("look", [read_planes, probe_planes])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_file_that_is_none_of_its_kind_is_named(tmp_path, kind, look):
    path = tmp_path / f"a.{kind}"
    path.write_text("no image")
    with pytest.raises(InputError, match=rf"row 2: .*a\.{kind} is not a readable"):
        look([Plane(str(path))], "row 2")


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_file_that_is_cut_short_is_named(tmp_path, kind):
    plane = written(
        tmp_path, kind, np.random.default_rng(0).integers(0, 60_000, (40, 30), dtype=np.uint16)
    )
    with open(plane.file, "r+b") as file:
        file.truncate(1200)
    with pytest.raises(InputError, match=r"cut short|decodes to"):
        read_planes([plane], "row 2")


def test_a_header_that_claims_60000_squared_is_refused_before_anything_is_decoded(tmp_path):
    plane = written(tmp_path, "png", np.zeros((8, 8), np.uint8))
    with open(plane.file, "r+b") as file:
        file.seek(16)
        file.write((60_000).to_bytes(4, "big") * 2)
    with pytest.raises(InputError, match="more than any camera's; it was not decoded"):
        read_planes([plane], "row 2")


def test_jpeg_is_refused_by_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(np.zeros((8, 8), np.uint8)))
    with pytest.raises(InputError, match="JPEG, which does not keep pixels as they were"):
        probe_planes([Plane(str(tmp_path / "a.jpg"))], "row 2")
