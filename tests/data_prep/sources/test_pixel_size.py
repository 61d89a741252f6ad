"""Pixel size in micrometers, from the metadata of each format."""

from __future__ import annotations

from pathlib import Path

import microscope_files
import numpy as np
import pytest
import tifffile
import zarr

from data_prep.sources import Plane, probe_planes
from data_prep.sources.pixel_size import common_size, czi_size

IMAGE = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)
SCENES = np.zeros((1, 1, 1, 24, 33), np.uint16)
CZI = "<ImageDocument><Metadata><Scaling><Items>{}</Items></Scaling></Metadata></ImageDocument>"


def probed(path: Path, **selection: object) -> float:
    plane = Plane(str(path), **selection)
    return probe_planes([plane], "row 2")[plane].pixel_size


def ome(path: Path, **metadata: object) -> Path:
    tifffile.imwrite(path, IMAGE, ome=True, metadata={"axes": "YX", **metadata})
    return path


def imagej(path: Path, unit: str, resolution: tuple[float, float] = (2.0, 2.0)) -> Path:
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=resolution, metadata={"unit": unit})
    return path


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"PhysicalSizeX": 0.65, "PhysicalSizeY": 0.65}, 0.65),
        ({"PhysicalSizeX": 650, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.65}, 0.65),
        ({"PhysicalSizeX": 0.65, "PhysicalSizeY": 1.3}, 0.0),
        ({"PhysicalSizeX": 0.65}, 0.0),
        ({"PhysicalSizeX": 1, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 1}, 0.0),
        ({}, 0.0),
    ],
)
def test_ome_tiff(tmp_path, metadata, expected):
    assert probed(ome(tmp_path / "a.ome.tif", **metadata)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("unit", "expected"), [("micron", 0.5), ("\\u00B5m", 0.5), ("cm", 0.0), ("pixel", 0.0)]
)
def test_imagej_tiff_needs_a_unit_of_length(tmp_path, unit, expected):
    assert probed(imagej(tmp_path / "a.tif", unit)) == expected


def test_print_resolution_of_other_tiffs_is_ignored(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, resolution=(1550, 1550), resolutionunit="CENTIMETER")
    assert probed(path) == 0.0


def test_metaxpress_tiff(tmp_path):
    tags = {"calibration-x": 0.65, "calibration-y": 0.65, "calibration-units": "um"}
    types = {float: "float", str: "string"}
    props = "".join(
        f'<prop id="spatial-{name}" type="{types[type(value)]}" value="{value}"/>'
        for name, value in tags.items()
    )
    text = f"<MetaData><PlaneInfo>{props}</PlaneInfo></MetaData>"
    tifffile.imwrite(
        tmp_path / "a.tif", IMAGE, description=text, software="MetaSeries", metadata=None
    )
    assert probed(tmp_path / "a.tif") == 0.65


def test_damaged_metadata_do_not_prevent_reading(tmp_path):
    text = '<?xml version="1.0"?><OME xmlns="x"><Image></OME>'
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, description=text, metadata=None)
    assert probed(tmp_path / "a.tif") == 0.0


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("unit", "expected"), [("micrometer", 0.65), ("second", 0), (None, 0)])
def test_ome_zarr_multiplies_its_scales(tmp_path, version, unit, expected):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    axes = [{"name": "c"}, *({"name": axis, **({"unit": unit} if unit else {})} for axis in "yx")]
    scale = {"type": "scale", "scale": [1, 0.325, 0.325]}
    scales = {
        "datasets": [{"path": "0", "coordinateTransformations": [scale]}],
        "axes": axes,
        "coordinateTransformations": [{"type": "scale", "scale": [1, 2, 2]}],
    }
    metadata = {"multiscales": [scales]}
    group.attrs.update({"ome": metadata} if version == 3 else metadata)
    group.create_array("0", data=IMAGE[None], chunks=(1, 24, 32))
    assert probed(tmp_path / "a.zarr", channel="0") == pytest.approx(expected)


def test_microscope_files(tmp_path):
    write_lif, write_nd2 = microscope_files.write_lif, microscope_files.write_nd2
    assert probed(write_lif(tmp_path / "a.lif", SCENES, 6.5e-7)) == pytest.approx(0.65)
    assert probed(write_lif(tmp_path / "b.lif", SCENES, 1.0)) == 0.0
    nd2 = write_nd2(tmp_path / "a.nd2", SCENES, ["DNA"], pixel_size=0.65)
    assert probed(nd2) == pytest.approx(0.65)
    # A file without calibration contains 1 µm.
    assert probed(write_nd2(tmp_path / "b.nd2", SCENES, ["DNA"])) == 0.0
    distances = "".join(f'<Distance Id="{a}"><Value>3.25e-07</Value></Distance>' for a in "XYZ")
    assert czi_size(CZI.format(distances)) == pytest.approx(0.325)
    assert czi_size(CZI.format("")) == 0.0


def test_sizes_agree_within_one_percent():
    assert common_size([0.65, 0.6501]) == 0.65
    assert common_size([0.65, 0.66]) == common_size([0.65, 0.0]) == common_size([]) == 0.0
