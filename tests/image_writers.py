"""Write arrays into image files, for tests of readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import zarr

#: Channels of OME-Zarr images.
NAMES = ("DNA", "AGP", "ER")


def tiff(path: Path, image: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, image, **{"metadata": None, **options})
    return path


def encoded(path: Path, image: np.ndarray, **options: Any) -> Path:
    codec = {"jp2": "jpeg2k", "jls": "jpegls", "jpg": "jpeg8"}.get(path.suffix[1:], path.suffix[1:])
    path.write_bytes(getattr(imagecodecs, f"{codec}_encode")(image, **options))
    return path


def ome_zarr(path: Path, pixels: np.ndarray, axes: str, version: int = 3) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=version)
    scales = {"datasets": [{"path": "0"}], "axes": [{"name": axis} for axis in axes]}
    labels = {"channels": [{"label": name} for name in NAMES]}
    metadata = {"multiscales": [scales], **({"omero": labels} if "c" in axes else {})}
    group.attrs.update({"ome": metadata} if version == 3 else metadata)
    group.create_array("0", data=pixels, chunks=(1,) * (pixels.ndim - 2) + pixels.shape[-2:])
    return path


def plate_store(
    folder: Path, pixels: np.ndarray, images: list[dict[str, Any]], *wells: str
) -> Path:
    """Write an OME-Zarr plate with images in well A/1 only; pixels: (channel, height, width)."""
    store = folder / "P1.zarr"
    plate = {"name": "P1", "wells": [{"path": path} for path in wells]}
    zarr.open_group(store, mode="w").attrs["ome"] = {"plate": plate}
    zarr.open_group(store, path="A/1", mode="a").attrs["ome"] = {"well": {"images": images}}
    for image in images:
        ome_zarr(store / "A/1" / image["path"], pixels, "cyx")
    return store
