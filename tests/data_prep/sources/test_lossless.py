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


def write_image(tmp_path, kind: str, image: np.ndarray):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(ENCODERS[kind](image, **({"level": 0} if kind == "jp2" else {})))
    return Plane(str(path), "DNA")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_lossless_formats_keep_pixels(tmp_path, kind, dtype):
    image = np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (40, 30), dtype=dtype, endpoint=True
    )
    plane = write_image(tmp_path, kind, image)
    pixels = read_planes([plane], "row 2")[plane]
    assert pixels.dtype == dtype
    np.testing.assert_array_equal(pixels, image)
    probe = probe_planes([plane], "row 2")[plane]
    assert (probe.dtype, probe.shape) == (dtype, (40, 30))


@pytest.mark.parametrize("look", [read_planes, probe_planes])
def test_color_images_are_refused_without_a_sample(tmp_path, look):
    image = np.random.default_rng(0).integers(1, 250, (8, 8, 3), dtype=np.uint8)
    plane = write_image(tmp_path, "png", image)
    with pytest.raises(InputError, match=r"row 2: .*a\.png is a color image .* in R, G, B; select"):
        look([plane], "row 2")
    blue = Plane(plane.file, "B")
    np.testing.assert_array_equal(read_planes([blue], "row 2")[blue], image[..., 2])


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_gray_images_with_several_samples_are_read(tmp_path, samples):
    gray = np.random.default_rng(0).integers(1, 250, (8, 8), dtype=np.uint8)
    parts = {2: [gray], 3: [gray] * 3, 4: [gray] * 3}[samples]
    alpha = [] if samples == 3 else [np.full_like(gray, 255)]
    plane = write_image(tmp_path, "png", np.dstack([*parts, *alpha]))
    assert probe_planes([plane], "row 2")[plane].shape == (8, 8)
    np.testing.assert_array_equal(read_planes([plane], "row 2")[plane], gray)


@pytest.mark.parametrize("look", [read_planes, probe_planes])
@pytest.mark.parametrize("kind", ENCODERS)
def test_other_content_is_named(tmp_path, kind, look):
    path = tmp_path / f"a.{kind}"
    path.write_text("no image")
    with pytest.raises(InputError, match=rf"row 2: .*a\.{kind} is not a readable"):
        look([Plane(str(path))], "row 2")


@pytest.mark.parametrize("kind", ENCODERS)
def test_truncated_file_is_named(tmp_path, kind):
    plane = write_image(
        tmp_path, kind, np.random.default_rng(0).integers(0, 60_000, (40, 30), dtype=np.uint16)
    )
    with open(plane.file, "r+b") as file:
        file.truncate(1200)
    with pytest.raises(InputError, match=r"truncated|decodes to"):
        read_planes([plane], "row 2")


def test_huge_header_is_refused_before_decoding(tmp_path):
    plane = write_image(tmp_path, "png", np.zeros((8, 8), np.uint8))
    with open(plane.file, "r+b") as file:
        file.seek(16)
        file.write((60_000).to_bytes(4, "big") * 2)
    with pytest.raises(InputError, match="more than any camera image; it was not decoded"):
        read_planes([plane], "row 2")


def test_animation_and_objects_are_refused(tmp_path):
    gray = np.random.default_rng(0).integers(1, 250, (8, 8), dtype=np.uint8)
    (tmp_path / "a.gif").write_bytes(imagecodecs.gif_encode(np.stack([gray, gray])))
    with pytest.raises(InputError, match="it contains 2 images; export one"):
        read_planes([Plane(str(tmp_path / "a.gif"))], "row 2")
    np.save(tmp_path / "a.npy", np.array([["a"]], dtype=object))
    with pytest.raises(InputError, match="it contains Python objects"):
        probe_planes([Plane(str(tmp_path / "a.npy"))], "row 2")
