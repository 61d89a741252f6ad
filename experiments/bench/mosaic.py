"""Simulated plates with fields of any size, composed of small tiles.

Drawing a field of 1080 x 1080 pixels directly needs an array of that size for each of its 700
cells. Instead a few tiles are drawn like the sites of `perturbjax simulate`. Each field is composed
of tiles that are rotated and flipped at random, so that all fields differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile
from jaxtyping import UInt16

from data_prep.simulate.cells import CHANNELS, draw_site
from data_prep.simulate.layout import TRAITS
from data_prep.simulate.plate import SimulateConfig, plan
from perturbjax.core.progress import track

#: Maximum size of a tile in pixels, number of tiles, and magnification of the cells of `simulate`.
#: Nuclei then have a diameter of 28 pixels, 170 in a field of 1080 pixels, as in JUMP images.
TILE, TILES, MAGNIFICATION = 270, 48, 2.0


def write_plates(out: Path, *, plates: int, wells: int, sites: int, size: int) -> Path:
    """Write uncompressed TIFF files to `images/PLATE/`, and load_data.csv for `--images images`.

    An existing folder is not changed.

    Args:
        out: folder to write.
        plates: number of plates.
        wells: wells per plate.
        sites: sites per well.
        size: height and width of a field in pixels.
    """
    if out.is_dir():
        return out
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    compounds = min(8, wells - 1)
    truth = plan(
        SimulateConfig(out, plates=plates, wells=wells, sites=sites, compounds=compounds, size=size)
    )
    tiles = _draw_tiles(truth, min(size, TILE))
    rows = []
    for number, site in enumerate(
        track(truth.to_dict("records"), total=len(truth), label="fields", unit="sites")
    ):
        field = _compose(tiles, size, np.random.default_rng([1, number]))
        plate, well = site["Metadata_Plate"], site["Metadata_Well"]
        row = {key: value for key, value in site.items() if key.startswith("Metadata_")}
        (work / "images" / plate).mkdir(parents=True, exist_ok=True)
        for channel, plane in zip(CHANNELS, np.moveaxis(field, -1, 0), strict=True):
            name = f"{well}_s{site['Metadata_Site']:02d}_{channel}.tiff"
            tifffile.imwrite(work / "images" / plate / name, plane, metadata=None)
            row |= {f"FileName_Orig{channel}": name, f"PathName_Orig{channel}": plate}
        rows.append(row)
    pd.DataFrame(rows).to_csv(work / "load_data.csv", index=False)
    work.rename(out)
    return out


def _draw_tiles(truth: pd.DataFrame, side: int) -> list[UInt16[np.ndarray, "side side 3"]]:
    chosen = truth.iloc[np.linspace(0, len(truth) - 1, TILES).astype(int)]
    return [
        draw_site(
            {name: site[name] for name in TRAITS},
            side,
            np.random.default_rng([0, number]),
            magnification=MAGNIFICATION,
        ).image
        for number, (_, site) in enumerate(chosen.iterrows())
    ]


def _compose(
    tiles: list[np.ndarray], size: int, rng: np.random.Generator
) -> UInt16[np.ndarray, "size size 3"]:
    across = -(-size // len(tiles[0]))

    def transformed() -> Iterator[np.ndarray]:
        for number in rng.integers(len(tiles), size=across):
            tile = np.rot90(tiles[number], rng.integers(4))
            yield tile[:, ::-1] if rng.random() < 0.5 else tile

    field = np.concatenate([np.concatenate(list(transformed()), axis=1) for _ in range(across)])
    return np.ascontiguousarray(field[:size, :size])


def as_ome_zarr(plates: Path, plate: str, out: Path) -> Path:
    """Convert a plate to OME-Zarr 0.5 with one Zstd chunk per channel."""
    import zarr

    if out.is_dir():
        return out
    work = out.with_name(f".{out.name}.tmp.zarr")
    shutil.rmtree(work, ignore_errors=True)
    table = pd.read_csv(plates / "load_data.csv", dtype=str)
    table = table[table["Metadata_Plate"] == plate]
    wells = {well: f"{well[0]}/{int(well[1:])}" for well in table["Metadata_Well"]}
    root = zarr.open_group(work, mode="w", zarr_format=3)
    root.attrs["ome"] = {
        "version": "0.5",
        "plate": {"name": plate, "wells": [{"path": p} for p in wells.values()]},
    }
    scales = {"datasets": [{"path": "0"}], "axes": [{"name": axis} for axis in "cyx"]}
    channels = {"channels": [{"label": channel} for channel in CHANNELS]}
    for well, path in wells.items():
        fields = table[table["Metadata_Well"] == well]
        group = root.create_group(path)
        group.attrs["ome"] = {
            "version": "0.5",
            "well": {"images": [{"path": str(k)} for k in range(len(fields))]},
        }
        for number, (_, row) in enumerate(fields.iterrows()):
            files = [
                plates / "images" / plate / row[f"FileName_Orig{channel}"] for channel in CHANNELS
            ]
            image = np.stack([tifffile.imread(file) for file in files])
            field = group.create_group(str(number))
            field.attrs["ome"] = {"version": "0.5", "multiscales": [scales], "omero": channels}
            field.create_array("0", data=image, chunks=(1, *image.shape[1:]))
    work.rename(out)
    return out
