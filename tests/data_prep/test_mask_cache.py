"""Masks are cached under the checksum of pixels and settings."""

from __future__ import annotations

import os

import numpy as np
import pytest
from data_prep_builds import options, swap_pixels

from data_prep.build import build
from data_prep.channel_images import resize_mask
from data_prep.mask_cache import MaskStore, trim
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


def test_build_reuses_masks_of_the_same_pixels_and_settings(simulated, tmp_path, capsys):
    cache = {"mask_cache": str(tmp_path / "masks")}
    build(options(simulated, tmp_path / "one", **cache))
    cached = {path: path.stat().st_ino for path in (tmp_path / "masks").rglob("*.tiff")}
    assert len(cached) == 24
    capsys.readouterr()
    build(options(simulated, tmp_path / "two", label_column="Metadata_moa", resize=32, **cache))
    assert "reused masks: 24 of 24 sites" in capsys.readouterr().err
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    np.testing.assert_array_equal(resize_mask(one.pixels(3)[1], 32), two.pixels(3)[1])
    build(options(simulated, tmp_path / "three", diameter=20.0, **cache))
    assert "reused" not in capsys.readouterr().err
    assert {path: path.stat().st_ino for path in cached} == cached


def test_build_detects_changed_images(plate, tmp_path, capsys):
    out = tmp_path / "dataset"
    build(options(plate, out))
    before = open_dataset(out).pixels(0)
    swap_pixels(plate, "SIM001_A01_s01")
    with pytest.raises(
        InputError, match=r"other images \(1 of 24 sites, first .*row 2\).*--overwrite"
    ):
        build(options(plate, out))
    capsys.readouterr()
    build(options(plate, out, overwrite=True))
    assert "reused masks: 23 of 24" in capsys.readouterr().err
    for old, new in zip(before, open_dataset(out).pixels(0), strict=True):
        assert not np.array_equal(old, new)


def test_build_replaces_damaged_masks_and_works_without_a_cache(simulated, tmp_path):
    cache = tmp_path / "masks"
    build(options(simulated, tmp_path / "one", mask_cache=str(cache)))
    for path in cache.rglob("*.tiff"):
        path.write_bytes(path.read_bytes()[:40])
    build(options(simulated, tmp_path / "two", mask_cache=str(cache)))
    (tmp_path / "file").touch()
    build(options(simulated, tmp_path / "three", mask_cache=str(tmp_path / "file/masks")))
    fingerprints = {open_dataset(tmp_path / name).fingerprint for name in ("one", "two", "three")}
    assert len(fingerprints) == 1


def test_trim_drops_the_least_recently_used_masks(tmp_path):
    store = MaskStore(tmp_path / "own", tmp_path / "cache")
    for number in range(4):
        store.put(f"{number}" * 64, np.full((50, 50), number, np.uint16))
        os.utime(
            tmp_path / "cache" / f"{number}{number}" / (f"{number}" * 64 + ".tiff"),
            (number, number),
        )
    MaskStore(tmp_path / "another", tmp_path / "cache").find("0" * 64)  # used now
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tiff"))
    trim(tmp_path / "cache", most=size // 2)
    assert {path.name[0] for path in (tmp_path / "cache").rglob("*.tiff")} == {"0", "3"}
